"""Stacks of the flat weights of many nodes, and views of a stack by name.

Letters: `G` nodes, `P` numbers in one node's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Stack", "blocks_of", "part"]


def blocks_of(sizes: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """Return rows and number of groups of each block: as many whole groups as fit into `rows`, or one."""
    blocks: list[tuple[int, int]] = []
    for size in sizes:
        if blocks and blocks[-1][0] + size <= rows:
            blocks[-1] = (blocks[-1][0] + size, blocks[-1][1] + 1)
        else:
            blocks.append((size, 1))
    return blocks


def part(flat: Tensor, sizes: list[tuple[torch.Size, int]]) -> tuple[Tensor, ...]:
    """Split flat weights `(G, P)` into views of consecutive shapes, each `(G, ...)`."""
    pieces = flat.split([size for _, size in sizes], 1)
    return tuple(
        (piece if size == shape.numel() else piece[:, : shape.numel()]).view(len(flat), *shape)
        for piece, (shape, size) in zip(pieces, sizes, strict=True)
    )


class Stack(torch.autograd.Function):
    """Stack of flat weights, split by name; the backward pass collects all gradients in one tensor."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        sizes: list[tuple[torch.Size, int]],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return views `(G, ...)` of all shapes, of stacked flat weights `(P,)`."""
        ctx.sizes, ctx.count = sizes, len(weights)
        ctx.set_materialize_grads(False)
        return part(torch.stack(weights), sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradient of each flat weight."""
        found = next(grad for grad in grads if grad is not None)
        pieces = []
        for grad, (shape, size) in zip(grads, ctx.sizes, strict=True):
            piece = found.new_zeros(ctx.count, size) if grad is None else grad.reshape(ctx.count, shape.numel())
            pieces.append(piece if piece.shape[1] == size else F.pad(piece, (0, size - piece.shape[1])))
        flat = torch.cat(pieces, 1)
        return None, *flat.unbind()

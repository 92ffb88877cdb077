"""Layers with weights per group as one function of autograd.

Layer by layer, autograd records each operation and returns to Python for each matmul. On the few rows of a node this
overhead takes as long as the arithmetic. Here the layers run one after the other, their backward passes run in reverse,
and autograd records one function. This function has a gradient, but no gradient of the gradient.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from treediff.core.groups import Groups
from treediff.layers.grouped._products import Need

__all__ = ["Done", "Kept", "Link", "Step", "run"]

Kept = tuple[Tensor, ...]


class Done(NamedTuple):
    """Record of a layer's forward pass for the backward pass.

    Attributes:
        module: the layer.
        weights: the layer's weights, each `(G, ...)`.
        kept: the tensors that `Step.forward` kept.
        shape: of the input.
        groups: the groups of the rows.
        need: the gradients to compute.
    """

    module: Any
    weights: Sequence[Tensor]
    kept: Kept
    shape: torch.Size
    groups: Groups
    need: Need


class Step(Protocol):
    """Forward and backward pass of one kind of layer, for all groups."""

    def forward(self, module: Any, weights: Sequence[Tensor], x: Tensor, groups: Groups) -> tuple[Tensor, Kept]:  # noqa: ANN401
        """Return the layer's output, and the tensors to keep for the backward pass."""
        ...

    def backward(self, done: Done, grad: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """Return the gradients of the input and of each weight, as needed, from the gradient of the output."""
        ...


class Link(NamedTuple):
    """Layer of a chain: its step, its module, and the number of its weights."""

    step: Step
    module: nn.Module
    weights: int


def run(links: Sequence[Link], weights: Sequence[Tensor], x: Tensor, groups: Groups) -> Tensor:
    """Run layers one after the other.

    Args:
        links: the layers.
        weights: weights of all layers in order, each `(G, ...)`.
        x: `(T, ...)`, sorted by group.
        groups: the groups of the rows.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        result: Tensor = _Chain.apply(links, groups, x, *weights)  # type: ignore[no-untyped-call, unused-ignore]
        return result
    for link, own in zip(links, _shares(links, weights), strict=True):
        x, _ = link.step.forward(link.module, own, x, groups)
    return x


def _shares(links: Sequence[Link], weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Return each layer's own weights."""
    shares, first = [], 0
    for link in links:
        shares.append(weights[first : first + link.weights])
        first += link.weights
    return shares


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, links: Sequence[Link], groups: Groups, x: Tensor, *weights: Tensor) -> Tensor:  # noqa: ANN401
        ctx.links, ctx.groups, ctx.inputs, ctx.kept, saved = links, groups, [], [], list(weights)
        for link, own in zip(links, _shares(links, weights), strict=True):
            ctx.inputs.append((x.shape, x.dtype))
            x, kept = link.step.forward(link.module, own, x, groups)
            ctx.kept.append(slice(len(saved), len(saved) + len(kept)))
            saved += kept
        ctx.save_for_backward(*saved)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        of_x, of_weights = ctx.needs_input_grad[2], any(ctx.needs_input_grad[3:])
        saved = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        first = len(gradients)
        for i, own in reversed(list(enumerate(_shares(ctx.links, saved)))):
            link, (shape, dtype) = ctx.links[i], ctx.inputs[i]
            first -= link.weights
            need = Need(of_x or (of_weights and first > 0), of_weights)
            done = Done(link.module, own, saved[ctx.kept[i]], shape, ctx.groups, need)
            grad, found = link.step.backward(done, grad)
            gradients[first : first + len(found)] = [
                _like(g, w.shape, w.dtype) for g, w in zip(found, own, strict=of_weights)
            ]
            if not need.input:
                return None, None, None, *gradients
            grad = _like(grad, shape, dtype)
        return None, None, grad, *gradients


def _like(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # A comparison takes less time than a call without effect.
    x = x if x.shape == shape else x.reshape(shape)
    return x if x.dtype == dtype else x.to(dtype)

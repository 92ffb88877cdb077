"""Conditioners that read the latents of the tree: that of the leaf, or those of the whole path.

Letters: `B` batch, `N` nodes, `S` depth of the tree, `D` latent, `E` embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.conditioning import Conditioner, Signal
from treediff.layers.blocks import check_numbers, check_positive
from treediff.topology import TreeTopology

__all__ = ["LatentEmbedding", "PathEncoder", "PathTokens"]


class _LatentReader(Conditioner):
    """What both have: `f`, which is Linear, SiLU, Linear, and a null for latents that are not known."""

    def __init__(
        self,
        topology: TreeTopology,
        latent: Sequence[int],
        embedding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(embedding=embedding)
        self.index = NodeIndex(topology, device)
        self.latent = check_numbers("latent", latent)
        self.embed = _perceptron(math.prod(self.latent), embedding, device=device, dtype=dtype)
        self.null = nn.Parameter(torch.zeros(embedding, device=device, dtype=dtype))


class LatentEmbedding(_LatentReader):
    """The latent at the node through Linear, SiLU, Linear; a learned null where it is not known.

    Args:
        topology: the tree.
        latent: shape of one latent.
        embedding: width `E`.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: on a condition whose latents do not fit the tree.
    """

    def forward(self, condition: TreeCondition) -> Signal:
        """A vector."""
        rank = self.index.rank_of(condition.node)
        if condition.z is None:
            return Signal(vector=self.null.expand(len(condition), -1))
        _check_latents(condition.z, self.index, self.latent)
        at_node = condition.z.flatten(2)[torch.arange(len(rank), device=rank.device), self.index.depth[rank]]
        known = condition.is_known()[:, None]
        return Signal(vector=torch.where(known, self.embed(_only(known, at_node).to(self.null.dtype)), self.null))


class PathEncoder(_LatentReader):
    """The path from the root to the node as one vector: `sum over i of f(z_i) + e_i` (TreeDiffusion, arXiv 2410.16910).

    `e_i` is a vector of node `i`, `f` is Linear, SiLU, Linear, and a learned null where a latent is not known.

    Args:
        topology: the tree.
        latent: shape of one latent.
        embedding: width `E`.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: on a condition whose latents do not fit the tree.

    Examples:
        >>> encode = PathEncoder(TreeTopology.balanced(2), (4,), 8)
        >>> encode(TreeCondition(torch.tensor([3, 6]), z=torch.zeros(2, 3, 4))).vector.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        topology: TreeTopology,
        latent: Sequence[int],
        embedding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(topology, latent, embedding, device=device, dtype=dtype)
        self.table = nn.Embedding(len(topology), embedding, device=device, dtype=dtype)

    def steps(self, condition: TreeCondition) -> tuple[Tensor, Tensor]:
        """A vector for each step of the paths `(B, S + 1, E)`, and which steps there are, `(B, S + 1)`."""
        path = self.index.paths[self.index.rank_of(condition.node)]
        there = path >= 0
        steps: Tensor = self.table(self.index.ranks[torch.where(there, path, path[:, :1])])
        if condition.z is None:
            return steps + self.null, there
        _check_latents(condition.z, self.index, self.latent)
        known = condition.is_known()[:, None, None] & there[..., None]
        z = _only(known, condition.z.flatten(2))
        return steps + torch.where(known, self.embed(z.to(steps.dtype)), self.null), there

    def forward(self, condition: TreeCondition) -> Signal:
        """A vector."""
        steps, there = self.steps(condition)
        return Signal(vector=_only(there[..., None], steps).sum(1))


class PathTokens(PathEncoder):
    """The path as a sequence of tokens that know their depth, for cross-attention.

    Unlike a sum it keeps apart what belongs to which step. Args and errors are those of `PathEncoder`, with `embedding`
    the width of the tokens.
    """

    def __init__(
        self,
        topology: TreeTopology,
        latent: Sequence[int],
        embedding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(topology, latent, embedding, device=device, dtype=dtype)
        self.context = embedding
        self.depths = nn.Parameter(0.02 * torch.randn(topology.max_depth + 1, embedding, device=device, dtype=dtype))

    def forward(self, condition: TreeCondition) -> Signal:
        """Tokens and a mask."""
        steps, there = self.steps(condition)
        return Signal(tokens=steps + self.depths, mask=there)


def _perceptron(inputs: int, outputs: int, **factory: Any) -> nn.Sequential:  # noqa: ANN401
    return nn.Sequential(nn.Linear(inputs, outputs, **factory), nn.SiLU(), nn.Linear(outputs, outputs, **factory))


def _only(known: Tensor, z: Tensor) -> Tensor:
    """Latents that are known; others may be NaN, and 0 times NaN would be the gradient."""
    return torch.where(known, z, 0)


def _check_latents(z: Tensor, index: NodeIndex, latent: tuple[int, ...]) -> None:
    wanted = (index.topology.max_depth + 1, *latent)
    if tuple(z.shape[1:]) != wanted:
        raise ValueError(
            f"expected latents of shape (B, {', '.join(map(str, wanted))}), one for each step down the tree, found "
            f"{tuple(z.shape)}"
        )

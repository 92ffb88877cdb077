"""From a place in the tree to what the U-Net is told: vectors, tokens, an image.

A conditioner reads a `TreeCondition` and returns a `Signal`. Each owns what stands for "not known", and all of them
together (`Conditioners`) are a conditioner again. Where only a node is known, each says what it can: an embedding of
the node, or its null. Those that read latents are in `treediff.diffusion.paths`.

Letters: `B` batch, `N` nodes, `K` leaves, `S` depth of the tree, `D` latent, `E` embedding width, `C H W` image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from treediff.core.checks import check_numbers, check_positive, check_size, check_times
from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.unet_blocks import TimestepEmbedding
from treediff.tree.topology import TreeTopology

__all__ = [
    "Conditioner",
    "Conditioners",
    "LatentEmbedding",
    "LeafWeightsEmbedding",
    "NodeEmbedding",
    "PathEncoder",
    "PathTokens",
    "ReconstructionConcat",
    "Signal",
]


class Signal(NamedTuple):
    """What a U-Net is told besides the noisy image and the time.

    Attributes:
        vector: `(B, E)`, added to the embedding of the time.
        tokens: `(B, T, context)`, for cross-attention.
        mask: `(B, T)`, True where a token may be read.
        image: `(B, C, H, W)`, more channels of the input.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None


class Conditioner(nn.Module, ABC):
    """The face of all conditioners."""

    #: Channels that the signal's image adds to the input of the U-Net.
    channels: int = 0
    #: Width of the signal's tokens, None where it has none.
    context: int | None = None

    @abstractmethod
    def forward(self, condition: TreeCondition) -> Signal:
        """What the condition means for the network."""


class NodeEmbedding(Conditioner):
    """One learned vector per node. The root's says nothing of the image, and so is the null of guidance.

    A real embedding, where the paper feeds the leaf's index as one number (Diffuse-TreeVAE, arXiv 2407.06124).

    Args:
        topology: the tree.
        embedding: width `E`.
        device: where the parameters live.
        dtype: of the parameters.

    Examples:
        >>> embed = NodeEmbedding(TreeTopology.balanced(1), 8)
        >>> embed(TreeCondition.at([0, 2])).vector.shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        topology: TreeTopology,
        embedding: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(embedding=embedding)
        self.index = NodeIndex(topology, device)
        self.table = nn.Embedding(len(topology), embedding, device=device, dtype=dtype)

    def forward(self, condition: TreeCondition) -> Signal:
        """A vector."""
        return Signal(vector=self.table(self.index.rank_of(condition.node)))


class LeafWeightsEmbedding(NodeEmbedding):
    """The mean of the leaves' vectors under `P(leaf | x)`; the node's own vector where the weights are not known.

    Args and shapes are those of `NodeEmbedding`.

    Raises:
        ValueError: on a condition whose weights do not fit the tree.
    """

    def forward(self, condition: TreeCondition) -> Signal:
        """A vector."""
        own: Tensor = self.table(self.index.rank_of(condition.node))
        if condition.weights is None:
            return Signal(vector=own)
        leaves, known = self.index.leaves, condition.is_known()[:, None]
        if condition.weights.shape[1:] != leaves.shape:
            raise ValueError(
                f"weights must have one column for each of the {len(leaves)} leaves, found the shape "
                f"{tuple(condition.weights.shape)}"
            )
        # Weights that are not known may be NaN, and 0 times NaN would be the gradient.
        mean = torch.where(known, condition.weights, 0).to(own.dtype) @ self.table.weight[leaves]
        return Signal(vector=torch.where(known, mean, own))


class ReconstructionConcat(Conditioner):
    """The leaf decoder's image as more channels of the input, from -1 to 1; a learned colour where it is not known.

    With `embedding` it also says how noisy that image is, for training with noise on the condition.

    Args:
        channels: of the image.
        size: height and width of the image, or one number for both.
        embedding: width `E` of the vector that tells the noise level; None for images without noise.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        ValueError: on a condition with an image of another shape.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        embedding: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.size = check_size("size", size)
        self.null = nn.Parameter(torch.zeros(channels, 1, 1, device=device, dtype=dtype))
        self.level = None if embedding is None else TimestepEmbedding(embedding, device=device, dtype=dtype)

    def forward(self, condition: TreeCondition) -> Signal:
        """An image, and a vector if noise levels are told."""
        image, level = condition.image, condition.noise_level
        null = self.null.expand(len(condition), -1, *self.size)
        if image is None:
            image, known = null, torch.zeros_like(condition.node, dtype=torch.bool)
        else:
            if image.shape[1:] != null.shape[1:]:
                raise ValueError(f"expected an image of shape {tuple(null.shape)}, found {tuple(image.shape)}")
            known = condition.is_known()
            image = torch.where(known[:, None, None, None], (2 * image - 1).to(null.dtype), null)
        if self.level is None:
            return Signal(image=image)
        # An image that is not known is as good as nothing but noise.
        level = torch.zeros(len(known), device=known.device) if level is None else level
        level = torch.where(known, level, 1.0)
        check_times(level, "noise_level")
        return Signal(vector=self.level(level), image=image)


class Conditioners(Conditioner):
    """Several conditioners as one: vectors are added up, tokens and images stand side by side.

    Args:
        parts: any conditioners; tokens must be of one width.

    Raises:
        ValueError: if two have tokens of different widths.
    """

    def __init__(self, *parts: Conditioner) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.channels = sum(part.channels for part in parts)
        widths = sorted({part.context for part in parts if part.context is not None})
        if len(widths) > 1:
            raise ValueError(f"tokens of all conditioners must have one width, found {widths}")
        self.context = widths[0] if widths else None

    def forward(self, condition: TreeCondition) -> Signal:
        """All signals together."""
        signals: list[Signal] = [part(condition) for part in self.parts]
        vectors = [signal.vector for signal in signals if signal.vector is not None]
        told = [(signal.tokens, signal.mask) for signal in signals if signal.tokens is not None]
        images = [signal.image for signal in signals if signal.image is not None]
        return Signal(
            vector=torch.stack(vectors).sum(0) if vectors else None,
            tokens=torch.cat([tokens for tokens, _ in told], 1) if told else None,
            mask=torch.cat([_mask(*pair) for pair in told], 1) if told else None,
            image=torch.cat(images, 1) if images else None,
        )


def _mask(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask


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

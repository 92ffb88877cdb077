"""Conditioners: from a condition on a tree to inputs of the U-Net, which are vectors, tokens, or an image.

A conditioner reads a `TreeCondition` and returns a `Signal`. Each conditioner has its own null for details that are not
known. Several conditioners together (`Conditioners`) are a conditioner again. For a row with only a node, a conditioner
returns an embedding of the node, or its null.

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
    """Inputs of a U-Net besides the noisy image and the time.

    Attributes:
        vector: `(B, E)`, added to the embedding of the time.
        tokens: `(B, T, context)`, for cross-attention.
        mask: `(B, T)`, True where a token may be read.
        image: `(B, C, H, W)`, additional channels of the input.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None


class Conditioner(nn.Module, ABC):
    """Base class of all conditioners."""

    #: Channels that the signal's image adds to the input of the U-Net.
    channels: int = 0
    #: Width of the signal's tokens, None for a signal without tokens.
    context: int | None = None

    @abstractmethod
    def forward(self, condition: TreeCondition) -> Signal:
        """Return the signal of a condition."""


class NodeEmbedding(Conditioner):
    """Embedding of the node, one learned vector per node.

    The root's vector carries no information about the image, and so is the null of guidance. The paper feeds the leaf's
    index as one number in place of an embedding (Diffuse-TreeVAE, arXiv 2407.06124).

    Args:
        topology: the tree.
        embedding: width `E`.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        """Return the vector of each row's node."""
        return Signal(vector=self.table(self.index.rank_of(condition.node)))


class LeafWeightsEmbedding(NodeEmbedding):
    """Embedding of the leaf weights: the mean of the leaves' vectors under `P(leaf | x)`.

    Where the weights are not known, the embedding is the node's vector. Args and shapes are as for `NodeEmbedding`.

    Raises:
        ValueError: on a condition whose weights do not fit the tree.
    """

    def forward(self, condition: TreeCondition) -> Signal:
        """Return the mean vector of the leaves, or the node's vector where the weights are not known."""
        own: Tensor = self.table(self.index.rank_of(condition.node))
        if condition.weights is None:
            return Signal(vector=own)
        leaves, known = self.index.leaves, condition.is_known()[:, None]
        if condition.weights.shape[1:] != leaves.shape:
            raise ValueError(
                f"weights must have one column for each of the {len(leaves)} leaves, found the shape "
                f"{tuple(condition.weights.shape)}"
            )
        # Unknown weights may be NaN, and 0 times NaN is NaN in the gradient.
        mean = torch.where(known, condition.weights, 0).to(own.dtype) @ self.table.weight[leaves]
        return Signal(vector=torch.where(known, mean, own))


class ReconstructionConcat(Conditioner):
    """Concatenation of the leaf decoder's image, from -1 to 1, to the input; a learned colour for unknown images.

    With `embedding` the signal also has a vector of the image's noise level, for training with noise on the condition.

    Args:
        channels: of the image.
        size: height and width of the image, or one number for both.
        embedding: width `E` of the vector of the noise level; None for images without noise.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        """Return an image, and a vector of the noise level if the conditioner has an embedding."""
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
        # An unknown image carries as much information as pure noise.
        level = torch.zeros(len(known), device=known.device) if level is None else level
        level = torch.where(known, level, 1.0)
        check_times(level, "noise_level")
        return Signal(vector=self.level(level), image=image)


class Conditioners(Conditioner):
    """Combination of several conditioners: vectors are added, tokens and images are concatenated.

    Args:
        parts: any conditioners; all tokens must have one width.

    Raises:
        ValueError: if two parts have tokens of different widths.
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
        """Return the combined signal of all parts."""
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
    """Base class of the readers of latents: `f`, which is Linear, SiLU, Linear, and a null for unknown latents."""

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
    """Embedding of the latent at the node by Linear, SiLU, Linear; a learned null for unknown latents.

    Args:
        topology: the tree.
        latent: shape of one latent.
        embedding: width `E`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: on a condition whose latents do not fit the tree.
    """

    def forward(self, condition: TreeCondition) -> Signal:
        """Return the vector of the latent at each row's node."""
        rank = self.index.rank_of(condition.node)
        if condition.z is None:
            return Signal(vector=self.null.expand(len(condition), -1))
        _check_latents(condition.z, self.index, self.latent)
        at_node = condition.z.flatten(2)[torch.arange(len(rank), device=rank.device), self.index.depth[rank]]
        known = condition.is_known()[:, None]
        return Signal(vector=torch.where(known, self.embed(_only(known, at_node).to(self.null.dtype)), self.null))


class PathEncoder(_LatentReader):
    """Encoder of the path from the root to the node: `sum over i of f(z_i) + e_i` (TreeDiffusion, arXiv 2410.16910).

    The result is one vector. `e_i` is a learned vector of node `i`. `f` is Linear, SiLU, Linear, or a learned
    null where a latent is not known.

    Args:
        topology: the tree.
        latent: shape of one latent.
        embedding: width `E`.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        """Return a vector for each step of the paths `(B, S + 1, E)`, and which steps exist, `(B, S + 1)`."""
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
        """Return the sum over the steps, one vector per row."""
        steps, there = self.steps(condition)
        return Signal(vector=_only(there[..., None], steps).sum(1))


class PathTokens(PathEncoder):
    """Tokens of the steps of the path, each with an embedding of its depth, for cross-attention.

    Unlike a sum, tokens keep the steps apart. Args and errors are as for `PathEncoder`, with `embedding` the width of
    the tokens.
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
        """Return tokens and a mask."""
        steps, there = self.steps(condition)
        return Signal(tokens=steps + self.depths, mask=there)


def _perceptron(inputs: int, outputs: int, **factory: Any) -> nn.Sequential:  # noqa: ANN401
    return nn.Sequential(nn.Linear(inputs, outputs, **factory), nn.SiLU(), nn.Linear(outputs, outputs, **factory))


def _only(known: Tensor, z: Tensor) -> Tensor:
    """Replace unknown latents by 0: they may be NaN, and 0 times NaN is NaN in the gradient."""
    return torch.where(known, z, 0)


def _check_latents(z: Tensor, index: NodeIndex, latent: tuple[int, ...]) -> None:
    wanted = (index.topology.max_depth + 1, *latent)
    if tuple(z.shape[1:]) != wanted:
        raise ValueError(
            f"expected latents of shape (B, {', '.join(map(str, wanted))}), one for each step down the tree, found "
            f"{tuple(z.shape)}"
        )

"""Conditions as data, the input of conditioners: the node of a tree that each image belongs to, with details.

Letters: `B` batch, `N` nodes, `K` leaves, `S` depth of the tree, `D` latent, `C H W` image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor, nn

from treediff.core.checks import check_noise, check_times
from treediff.core.modes import lasting
from treediff.tree.topology import TreeTopology

__all__ = ["NodeIndex", "TreeCondition"]


@dataclass(frozen=True, eq=False)
class TreeCondition:
    """Condition of each image: a node and, where they are known, details such as the latents on the path to it.

    A row with only a node means "an image of this cluster": at a leaf an image of that leaf, at the root any image. At
    an inner node it means an image of any leaf under the node. A row with details means one image of the cluster.

    Args:
        node: `(B,)` node ids.
        z: `(B, S + 1, D, ...)` latents along the path from the root to the node; entries past the node are ignored.
        image: `(B, C, H, W)` in [0, 1], the image that the leaf's decoder makes of the latents.
        weights: `(B, K)` probabilities of the leaves, in the order of the topology.
        known: `(B,)` booleans, whether a row has its details; by default every row, if any details are given.
        noise_level: `(B,)` from 0 to 1, level of the noise on `image`; no noise by default.

    Raises:
        TypeError: if `node` is not a tensor of integers.
        ValueError: if a part has another number of rows.

    Examples:
        >>> TreeCondition.at(3, 2).node
        tensor([3, 3])
    """

    node: Tensor
    z: Tensor | None = None
    image: Tensor | None = None
    weights: Tensor | None = None
    known: Tensor | None = None
    noise_level: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.node, Tensor) or self.node.dtype != torch.int64 or self.node.ndim != 1:
            found = getattr(self.node, "dtype", type(self.node).__name__), tuple(getattr(self.node, "shape", ()))
            raise TypeError(
                f"node must be (B,) int64 node ids, found {found[0]} of shape {found[1]}; "
                "TreeCondition.at(node, n) builds a condition for n images"
            )
        for name, part in self._parts():
            if len(part) != len(self):
                raise ValueError(f"{name} must have a row for each of the {len(self)} nodes, found {len(part)}")

    @classmethod
    def at(
        cls,
        node: int | Sequence[int] | Tensor,
        n: int | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> TreeCondition:
        """Build a condition from nodes only: one node for `n` images (1 by default), or a list with a node for each.

        Raises:
            TypeError: if nodes are not whole numbers.
            ValueError: if a list does not have `n` nodes.
        """
        nodes = torch.as_tensor(node, device=device)
        if not (nodes.is_floating_point() and nodes.numel()):  # torch makes a float tensor of an empty list
            nodes = nodes.to(torch.int64)
        if nodes.ndim and n not in (None, len(nodes)):
            raise ValueError(f"a list has a node for each image, found {len(nodes)} nodes and n={n}; leave n out")
        return cls(nodes.expand(1 if n is None else n) if nodes.ndim == 0 else nodes)

    def _parts(self) -> list[tuple[str, Tensor]]:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return [(name, value) for name, value in values if value is not None]

    def __len__(self) -> int:
        return len(self.node)

    def __getitem__(self, rows: Tensor | slice) -> TreeCondition:
        """Return some of the rows."""
        return replace(self, **{name: part[rows] for name, part in self._parts()})

    def is_known(self) -> Tensor:
        """Return whether each row has its details, `(B,)` booleans."""
        if self.known is not None:
            return self.known
        has_details = not (self.z is None and self.image is None and self.weights is None)
        return torch.full_like(self.node, has_details, dtype=torch.bool)

    def require_image(self) -> Tensor:
        """Return the image.

        Raises:
            ValueError: if there is no image.
        """
        if self.image is None:
            raise ValueError("this condition has no image; make one with a TreeVAE, or pass image=")
        return self.image

    def coarser(self, index: NodeIndex, where: Tensor, level: Tensor) -> TreeCondition:
        """Remove the details of some rows, and replace their nodes by nodes on the paths from the root.

        All depths of the tree are equally likely, and a depth below the node gives the node itself. So leaves count
        under an inner node by their probability, at any depth, and a model learns `p(x | node)` for the inner node.

        Args:
            index: the tree.
            where: `(B,)` booleans, the rows to change.
            level: `(B,)` uniform numbers in [0, 1), depth of the new node: 0 is the root, and just below 1 the old
                node, without its details.
        """
        path = index.paths[index.rank_of(self.node)]
        depth = (level * path.shape[1]).to(torch.int64)
        above = path.gather(1, depth[:, None]).squeeze(1)
        above = torch.where(above >= 0, above, self.node)
        return replace(self, node=torch.where(where, above, self.node), known=self.is_known() & ~where)

    def noised(self, level: Tensor, noise: Tensor) -> TreeCondition:
        """Add noise to the image, `sqrt(1 - level^2) image + level noise` on the scale from -1 to 1.

        Reconstructions in training are slightly too good; with noise on them a denoiser learns to rely on them less (Ho
        et al., arXiv 2106.15282, section 4.2). The result can leave [0, 1], by design.

        Args:
            level: `(B,)` from 0 to 1.
            noise: standard normal, of the shape and dtype of the image.

        Raises:
            TypeError: if the level is not floating point, or noise has another dtype than the image.
            ValueError: if there is no image, not one level for each row, noise of another shape than the image, or
                (read on a CPU only) a level outside of [0, 1].
        """
        image = self.require_image()
        check_noise(noise, image, "image")
        if level.shape != self.node.shape:
            raise ValueError(f"level must be one for each of the {len(self)} rows, found {tuple(level.shape)}")
        check_times(level, "level")
        size = level.view(-1, 1, 1, 1)
        image = torch.sqrt(1 - size**2) * (2 * image - 1) + size * noise
        return replace(self, image=(image + 1) / 2, noise_level=level)


class NodeIndex(nn.Module):
    """Tables of the node ids of a tree; no parameters, nothing in the state dict.

    The tables move with the module and keep their values, also on the meta device and under `to_empty`.

    Args:
        topology: the tree.
        device: device of the tables; the CPU in place of the meta device.

    Attributes:
        topology: the tree.
        leaves: `(K,)` positions of the leaves in `topology.ids`.
        paths: `(N, S + 1)` ids from the root to each node, in the order of `topology.ids`; -1 after the node.
        depth: `(N,)` steps from the root.
        sibling: `(N,)` id of the parent's other child; for an only child the parent, for the root the root.
        parent: `(N,)` id of the parent; for the root the root.

    Examples:
        >>> index = NodeIndex(TreeTopology.balanced(1).split(2))
        >>> index.paths.tolist()
        [[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 2, 3], [0, 2, 4]]
        >>> index.rank_of(torch.tensor([4, 0]))
        tensor([4, 0])
    """

    ranks: Tensor
    leaves: Tensor
    paths: Tensor
    depth: Tensor
    sibling: Tensor
    parent: Tensor

    @lasting()
    def __init__(self, topology: TreeTopology, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.topology = topology
        device = "cpu" if device is None or torch.device(device).type == "meta" else device
        ranks = [-1] * (max(topology.ids) + 2)  # the last entry is for ids that are not in the tree
        for rank, node in enumerate(topology.ids):
            ranks[node] = rank
        longest = topology.max_depth + 1
        paths = [[*path, *[-1] * (longest - len(path))] for path in map(topology.path, topology.ids)]
        tables = {
            "ranks": ranks,
            "leaves": [topology.index[leaf] for leaf in topology.leaves],
            "paths": paths,
            "depth": [topology.depth(node) for node in topology.ids],
            "sibling": [_sibling(topology, node) for node in topology.ids],
            "parent": [_parent(topology, node) for node in topology.ids],
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty_like(self.ranks)).device
        if device.type != "meta":
            for name, table in self.named_buffers():
                setattr(self, name, table.to(device))
        return self

    def rank_of(self, node: Tensor) -> Tensor:
        """Return the positions of nodes in `topology.ids`, `(B,)` to `(B,)`.

        Raises:
            KeyError: if a node is not in the tree; read on a CPU only.
        """
        known = (node >= 0) & (node < len(self.ranks) - 1)
        rank = self.ranks[torch.where(known, node, -1)]
        if node.device.type == "cpu" and not torch.compiler.is_compiling() and bool((rank < 0).any()):
            wrong = int(node[rank < 0][0])
            raise KeyError(f"there is no node {wrong} in the tree; its nodes are {list(self.topology.ids)}")
        return rank

    def extra_repr(self) -> str:
        """Return the tree as text."""
        return repr(self.topology)


def _parent(topology: TreeTopology, node: int) -> int:
    above = topology.parent(node)
    return topology.root if above is None else above


def _sibling(topology: TreeTopology, node: int) -> int:
    above = _parent(topology, node)
    others = [child for child in topology.children(above) if child != node]
    return others[0] if others and node != topology.root else above

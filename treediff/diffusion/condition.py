"""Where in the tree an image belongs, as data: what conditioners read.

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
    """A node for each image and, where it is known, what lies on the way to it.

    A row with only a node says "an image of this cluster": at a leaf one of that leaf, at an inner node one of any leaf
    under it, at the root any image. A row with details says which image of the cluster.

    Args:
        node: `(B,)` node ids.
        z: `(B, S + 1, D, ...)` latents along the path from the root to the node; what comes after is ignored.
        image: `(B, C, H, W)` in [0, 1], what the leaf's decoder makes of them.
        weights: `(B, K)` probabilities of the leaves, in the order of the topology.
        known: `(B,)` booleans, whether a row has its details; every row by default, if there are any.
        noise_level: `(B,)` from 0 to 1, how much noise was put on `image`; none by default.

    Raises:
        TypeError: if `node` is no tensor of integers.
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
                "TreeCondition.at(node, n) makes one for n images"
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
        """Only a place: one node for `n` images (1 by default), or a list with a node for each.

        Raises:
            TypeError: if nodes are no whole numbers.
            ValueError: if a list has not `n` nodes.
        """
        nodes = torch.as_tensor(node, device=device)
        if not (nodes.is_floating_point() and nodes.numel()):  # an empty list counts as one of floats
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
        """Some of the rows."""
        return replace(self, **{name: part[rows] for name, part in self._parts()})

    def is_known(self) -> Tensor:
        """`(B,)` booleans, whether a row has its details."""
        if self.known is not None:
            return self.known
        has_details = not (self.z is None and self.image is None and self.weights is None)
        return torch.full_like(self.node, has_details, dtype=torch.bool)

    def require_image(self) -> Tensor:
        """The image.

        Raises:
            ValueError: if there is none.
        """
        if self.image is None:
            raise ValueError("this condition has no image; make one with a TreeVAE, or pass image=")
        return self.image

    def coarser(self, index: NodeIndex, where: Tensor, level: Tensor) -> TreeCondition:
        """Forget details of some rows, and go up from their nodes.

        Every depth of the tree is as likely as any other, and below its own depth a node stands for itself. So leaves
        count under an inner node by their probability, however deep they lie, and what a model learns of it is
        `p(x | node)`.

        Args:
            index: the tree.
            where: `(B,)` booleans, which rows.
            level: `(B,)` uniform numbers in [0, 1): how far down the tree the new place is; 0 is the root, and just
                below 1 the node itself, without its details.
        """
        path = index.paths[index.rank_of(self.node)]
        depth = (level * path.shape[1]).to(torch.int64)
        above = path.gather(1, depth[:, None]).squeeze(1)
        above = torch.where(above >= 0, above, self.node)
        return replace(self, node=torch.where(where, above, self.node), known=self.is_known() & ~where)

    def noised(self, level: Tensor, noise: Tensor) -> TreeCondition:
        """Put noise on the image, `sqrt(1 - level^2) image + level noise` on the scale from -1 to 1.

        A denoiser trained on reconstructions that are a little too good learns to trust them less (Ho et al., arXiv
        2106.15282, section 4.2). The result leaves [0, 1], as it must.

        Args:
            level: `(B,)` from 0 to 1.
            noise: standard normal, of the shape and dtype of the image.

        Raises:
            TypeError: if the level is not floating point, or noise has another dtype than the image.
            ValueError: if there is no image, not one level for each row, noise of another shape than the image, or
                (looked at on a CPU only) a level outside of [0, 1].
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
    """A tree as tables of its node ids; no parameters, nothing in the state.

    The tables go where the module goes and keep what they say: on the meta device, and when `to_empty` forgets weights,
    too.

    Args:
        topology: the tree.
        device: where the tables live; on the CPU in place of the meta device.

    Attributes:
        topology: the tree.
        leaves: `(K,)` where the leaves stand in `topology.ids`.
        paths: `(N, S + 1)` ids from the root to each node, in the order of `topology.ids`; -1 after it.
        depth: `(N,)` steps from the root.
        sibling: `(N,)` id of the parent's other child; the parent of an only child; the root of the root.
        parent: `(N,)` id of the parent; the root of the root.

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
        ranks = [-1] * (max(topology.ids) + 2)  # the last one answers for what is not in the tree
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
        """Where nodes stand in `topology.ids`, `(B,)` to `(B,)`.

        Raises:
            KeyError: if a node is not in the tree; looked at on a CPU only.
        """
        known = (node >= 0) & (node < len(self.ranks) - 1)
        rank = self.ranks[torch.where(known, node, -1)]
        if node.device.type == "cpu" and not torch.compiler.is_compiling() and bool((rank < 0).any()):
            wrong = int(node[rank < 0][0])
            raise KeyError(f"there is no node {wrong} in the tree; its nodes are {list(self.topology.ids)}")
        return rank

    def extra_repr(self) -> str:
        """The tree."""
        return repr(self.topology)


def _parent(topology: TreeTopology, node: int) -> int:
    above = topology.parent(node)
    return topology.root if above is None else above


def _sibling(topology: TreeTopology, node: int) -> int:
    above = _parent(topology, node)
    others = [child for child in topology.children(above) if child != node]
    return others[0] if others and node != topology.root else above

"""Cut of a leaf, at the start of its split: rows are cut in two where they are sparse, and its router fits the cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from treediff.core.modes import evaluating
from treediff.core.rows import Indexable, Rows
from treediff.layers.router import fit_router
from treediff.treevae.model import TreeVAE

__all__ = ["Augmentation", "CutOn", "check_cut_on", "cut_router", "nearest_neighbours", "normalized_cut"]

#: Where rows are cut: 'inputs', 'features', or a function of a batch of inputs.
CutOn = str | Callable[[Tensor], Tensor]

# A tile of distances stays in a core's cache while it is computed, reduced over views and searched.
_COLUMNS, _TILE = 4096, 128 * 9 * 4096
# Principal components to compare, and rows that they are found from.
_COMPONENTS, _SAMPLE, _NUMBERS = 48, 4096, 1 << 25


class Augmentation(Protocol):
    """Augmentation that a cluster should not depend on, such as any of `treediff.augment`."""

    def __call__(self, x: Tensor, /, *, generator: torch.Generator | None = None) -> Tensor:
        """Return a changed copy of every row."""
        ...


@torch.no_grad()
def cut_router(
    model: TreeVAE,
    node: int,
    x: Indexable,
    *,
    on: CutOn = "inputs",
    augment: Augmentation | None = None,
    views: int = 8,
    neighbours: int = 10,
    min_share: float = 0.05,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> None:
    """Fit a node's posterior router to a normalised cut of some rows.

    The router may be of any class, see `fit_router`.

    Args:
        model: the model.
        node: a node with two children.
        x: rows that belong to the node, anything that `Rows` takes; in random order, as the principal components that
            a cut compares are those of the first 4,096. Read a batch at a time, once, and once more for each view.
        on: where the rows are cut: on the 'inputs' themselves, on the 'features' that the router reads, or on what a
            function makes of a batch of inputs, such as `treediff.layers.Deskew()` or a network that was trained
            before.
        augment: changes that a cluster should not depend on; None for none.
        views: number of changed copies of each row that the cut compares, if there is `augment`.
        neighbours: number of edges from each row to its nearest neighbours.
        min_share: the smaller side holds at least this share of the rows.
        batch_size: rows in a batch.
        generator: source of the changes and of the fit's batches.

    Raises:
        KeyError: if the node has no router.
        TypeError: if `on` is neither a word nor a function.
        ValueError: if `on` is another word, or there are fewer than two rows; see `normalized_cut`.
    """
    check_cut_on("on", on)
    router = model.banks.posterior_routers.module(node)
    depth, rows = model.topology.depth(node), Rows.of(x, dtype=model.dtype)

    def features(x: Tensor) -> Tensor:
        with evaluating(model):
            return model.features(x)[depth]

    def look(change: Augmentation | None = None) -> Iterator[Tensor]:
        """Yield what is cut, of all rows, a batch at a time."""
        for part in rows.split(batch_size):
            x = part.to(model.device)
            x = x if change is None else change(x, generator=generator)
            yield on(x) if callable(on) else features(x) if on == "features" else x

    project = _projection(look(), len(rows))
    if on == "features":
        seen = torch.cat(list(look()))
        known = project(_flat(seen))
    else:
        known = torch.cat([project(_flat(points)) for points in look()])
        seen = torch.cat([features(part.to(model.device)) for part in rows.split(batch_size)])
    changes = [augment] * views if augment is not None else []
    looks = (torch.cat([project(_flat(points)) for points in look(change)]) for change in changes)
    left = normalized_cut(known, views=looks, neighbours=neighbours, min_share=min_share)
    fit_router(router, seen, left, generator=generator)
    model.banks.posterior_routers.assign(node, router)


def check_cut_on(name: str, on: CutOn) -> None:
    """Raise unless `on` says where to cut."""
    if isinstance(on, str) and on not in ("inputs", "features"):
        raise ValueError(f"{name} must be 'inputs', 'features' or a function, found {on!r}")
    if not isinstance(on, str) and not callable(on):
        raise TypeError(f"{name} must be 'inputs', 'features' or a function, found {on!r}")


def _projection(parts: Iterator[Tensor], rows: int) -> _Projection:
    """Return the components of the first of `rows` points: as many as are enough, and fit into memory."""
    first = _flat(next(parts))
    count = min(rows, _SAMPLE, max(len(first), _NUMBERS // first.shape[1]))
    sample, have = first.new_empty(count, first.shape[1]), 0
    for part in chain([first], map(_flat, parts)):
        some = part[: count - have]
        sample[have : have + len(some)] = some
        have += len(some)
        if have == count:
            break
    return _Projection.of(sample, _COMPONENTS)


class _Projection(NamedTuple):
    """Principal components of points: mean `(D,)`, and basis `(D, components)` or None if there are no more."""

    mean: Tensor
    basis: Tensor | None

    @classmethod
    def of(cls, flat: Tensor, components: int) -> _Projection:
        """Find the components with the greatest variance of points `(n, D)`."""
        mean = flat.mean(0)
        return cls(mean, _principal(flat - mean, components))

    def __call__(self, flat: Tensor) -> Tensor:
        # Squared distances of points far from the origin would lose their digits.
        centred = flat - self.mean
        return centred if self.basis is None else centred @ self.basis


class _Graph(NamedTuple):
    """Edges `(i, j)` of a symmetric graph, each listed in both directions."""

    i: Tensor
    j: Tensor
    weight: Tensor
    nodes: int

    def times(self, x: Tensor) -> Tensor:
        """Multiply the matrix of weights by a vector."""
        return torch.zeros_like(x).index_add_(0, self.i, self.weight * x[self.j])


def normalized_cut(
    points: Tensor,
    *,
    views: Iterable[Tensor] = (),
    neighbours: int = 10,
    min_share: float = 0.05,
    components: int = _COMPONENTS,
) -> Tensor:
    """Split points into two clusters by a normalised cut of the graph that joins each to its nearest neighbours.

    The cut seeks the two sides `A`, `B` with the least `cut(A, B) / vol(A) + cut(A, B) / vol(B)`: few and weak edges
    between them, many inside. The relaxed solution is the second eigenvector of the normalised graph, thresholded where
    the quotient is least. The weight of an edge is the overlap of its ends' neighbourhoods,
    `|N_i & N_j| / |N_i | N_j|`. Unlike k-means, which halves the widest direction and may cut through a class, the cut
    goes through gaps whatever the shape of the two sides.

    Args:
        points: `(n, ...)`, flattened behind the first axis and projected on their principal components.
        views: the same points under changes that a cluster should not depend on, such as small shifts of an image. A
            point's neighbours are the points near any of its views. Views are read one at a time, so that a generator
            of views saves memory.
        neighbours: number of edges from each point to its nearest neighbours.
        min_share: the smaller side holds at least this share of the points.
        components: number of principal components to keep, if there are more dimensions.

    Returns:
        `(n,)` booleans, one side True. Which side is True is arbitrary, but the same points give the same result.

    Raises:
        ValueError: if there are fewer than two points, a point is not finite, a view has another shape, or a setting is
            out of range.

    Cost: `n^2 (1 + views)` distances in at most `components` dimensions.

    Source: Shi and Malik, "Normalized cuts and image segmentation" (2000), eq. 2 and 11; weights by shared neighbours:
    Jarvis and Patrick, "Clustering using a similarity measure based on shared near neighbors" (1973).

    Examples:
        >>> normalized_cut(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), neighbours=2).tolist() in (
        ...     [True, True, True, False, False], [False, False, False, True, True]
        ... )
        True
    """
    if neighbours < 1 or components < 1 or not 0 <= min_share <= 0.5:
        raise ValueError(
            "neighbours and components must be at least 1, and min_share between 0 and 0.5; found "
            f"{neighbours}, {components} and {min_share}"
        )
    if len(points) < 2:
        raise ValueError(f"two clusters need at least 2 points, found {len(points)}")
    flat = _flat(points)
    project = _Projection.of(flat, components)
    known, looks = project(flat), []
    for view in views:
        if view.shape != points.shape:
            raise ValueError(f"views have the shape of the points, {tuple(points.shape)}; found {tuple(view.shape)}")
        looks.append(project(_flat(view)))
    index = nearest_neighbours(known, min(neighbours, len(known) - 1), views=looks)
    return _bisect(_graph(index.cpu(), known.cpu().double()), min_share).to(points.device)


def _flat(points: Tensor) -> Tensor:
    if not bool(points.isfinite().all()):
        raise ValueError("points must be finite, found NaN or infinity")
    return points.detach().flatten(1).float()


def _principal(points: Tensor, components: int) -> Tensor | None:
    """Return `(D, components)`, an orthonormal basis of the greatest variance of points, by subspace iteration."""
    if points.shape[1] <= components:
        return None
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(points.shape[1], components, generator=generator).to(points)
    for _ in range(8):
        basis = torch.linalg.qr(points.T @ (points @ basis)).Q
    return basis


def _graph(index: Tensor, points: Tensor) -> _Graph:
    """Build a graph of edges to neighbours, weighted by shared neighbours, and of faint edges between random points."""
    n, k = index.shape
    i = torch.arange(n).repeat_interleave(k)
    hoods = torch.cat([torch.arange(n)[:, None], index], 1)
    shared = torch.cat(
        [
            (hoods[rows][:, None, :, None] == hoods[index[rows]][:, :, None, :]).sum((2, 3))
            for rows in torch.arange(n).split(4096)
        ]
    )
    overlap = (shared / (2 * (k + 1) - shared)).double().flatten()
    # Clusters far apart share no edge, so any grouping of such clusters would cost 0. Edges between random points, far
    # too faint to matter elsewhere, make the cut through the widest gap the cheapest.
    pulls = 8
    one = torch.arange(n).repeat_interleave(pulls)
    other = (one + torch.randint(1, n, one.shape, generator=torch.Generator().manual_seed(0))) % n
    away = (points[one] - points[other]).square().sum(1)
    pull = 1e-3 / pulls * torch.exp(-away / away.mean().clamp_min(torch.finfo(away.dtype).tiny))
    ends = torch.cat([torch.stack([i, index.flatten()]), torch.stack([one, other])], 1)
    weight = 0.5 * torch.cat([overlap, pull])
    return _Graph(ends.flatten(), ends.flip(0).flatten(), weight.repeat(2), n)


def _second_eigenvector(graph: _Graph, root: Tensor, steps: int = 120) -> Tensor:
    """Compute the second eigenvector of `D^-1/2 W D^-1/2` by reorthogonalised Lanczos.

    The first eigenvector is `root`, the square root of the degrees.
    """
    # The first eigenvector is known and carries no information. Projected out, it cannot mix with the indicators of
    # components that share no edge.
    steps = min(steps, graph.nodes - 1)
    basis = root.new_empty(steps + 1, graph.nodes)
    basis[0] = root / root.norm()
    normalised = graph._replace(weight=graph.weight / (root[graph.i] * root[graph.j]))
    x = torch.randn(graph.nodes, generator=torch.Generator().manual_seed(0), dtype=root.dtype)
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    for step in range(1, steps + 1):
        known = basis[:step]
        for _ in range(2):
            x = x - known.T @ (known @ x)
        length = x.norm()
        if diagonal and length < 1e-10:
            break
        off.append(length)
        basis[step] = x / length
        x = normalised.times(basis[step])
        diagonal.append(basis[step] @ x)
    small = torch.diag(torch.stack(diagonal))
    if len(off) > 1:
        beside = torch.stack(off[1:])
        small += torch.diag(beside, 1) + torch.diag(beside, -1)
    largest: Tensor = torch.linalg.eigh(small).eigenvectors[:, -1]
    return largest @ basis[1 : len(diagonal) + 1]


def _bisect(graph: _Graph, min_share: float) -> Tensor:
    """Cut a graph into two sides; True is one side."""
    n = graph.nodes
    degree = graph.times(torch.ones(n, dtype=graph.weight.dtype))
    root = degree.sqrt()
    order = (_second_eigenvector(graph, root) / root).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n)
    # Edge (i, j) is cut by the thresholds from the lower of its ranks up to the higher; each edge is listed twice.
    low, high = torch.minimum(rank[graph.i], rank[graph.j]), torch.maximum(rank[graph.i], rank[graph.j])
    change = torch.zeros(n, dtype=degree.dtype).index_add_(0, low, graph.weight).index_add_(0, high, -graph.weight)
    cut, volume = 0.5 * change.cumsum(0), degree[order].cumsum(0)
    quotient = (cut / volume + cut / (degree.sum() - volume))[:-1]
    least = min(n // 2, max(1, math.ceil(min_share * n)))
    first = least - 1 + int(quotient[least - 1 : n - least].argmin())
    side = torch.zeros(n, dtype=torch.bool)
    side[order[first + 1 :]] = True
    return side


def nearest_neighbours(points: Tensor, count: int, *, views: Sequence[Tensor] = ()) -> Tensor:
    """Find the nearest other points of every point, by exact search.

    With views, `d(i, j) = min over v of ||view_v(i) - points_j||`, where the points themselves are one of the
    views. The distance of an image is then the distance of its nearest copy, shifted, rotated or otherwise changed.

    Args:
        points: `(n, D)` floats.
        count: `k`, number of neighbours of each point.
        views: changed copies of the same points, each `(n, D)`.

    Returns:
        `(n, k)` indices, nearest first; no point is its own neighbour.

    Raises:
        ValueError: if `count` is not between 1 and n - 1, or shapes do not fit.

    Cost: `n^2 (1 + views)` distances, in tiles; memory `O(n (1 + views) D)`.

    Examples:
        >>> nearest_neighbours(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), 1).squeeze(1).tolist()
        [1, 0, 1, 2]
    """
    n = len(points)
    if points.ndim != 2 or not 1 <= count < n:
        raise ValueError(
            f"{count} nearest neighbours need points of shape (n, D) with n > {count} >= 1, found {tuple(points.shape)}"
        )
    if any(view.shape != points.shape for view in views):
        shapes = [tuple(view.shape) for view in views]
        raise ValueError(f"views have the shape of the points, {tuple(points.shape)}; found {shapes}")
    # -|q - p|^2 / 2 as one matrix product, (q, -|q|^2 / 2, 1) with (p, 1, -|p|^2 / 2): larger is nearer.
    queries = torch.stack([_with_norm(view, norm_first=True) for view in (points, *views)])
    keys = _with_norm(points, norm_first=False).T.contiguous()
    step = max(1, _TILE // (_COLUMNS * len(queries)))
    return torch.cat([_search(queries[:, a : a + step], keys, count, a) for a in range(0, n, step)])


def _with_norm(points: Tensor, *, norm_first: bool) -> Tensor:
    norm = -0.5 * points.square().sum(1, keepdim=True)
    return torch.cat([points, norm, torch.ones_like(norm)] if norm_first else [points, torch.ones_like(norm), norm], 1)


def _search(queries: Tensor, keys: Tensor, count: int, first: int) -> Tensor:
    """Search the neighbours of `(V, B, D + 2)` queries, the first of which is point number `first`."""
    views, rows, _ = queries.shape
    stacked = queries.flatten(0, 1)
    near, index = [], []
    for start in range(0, keys.shape[1], _COLUMNS):
        block = keys[:, start : start + _COLUMNS]
        nearness = (stacked @ block).view(views, rows, -1).amax(0)
        best = nearness.topk(min(count + 1, nearness.shape[1]))
        near.append(best.values)
        index.append(best.indices + start)
    found = torch.cat(index, 1).gather(1, torch.cat(near, 1).topk(count + 1).indices)
    own = found == torch.arange(first, first + rows, device=found.device)[:, None]
    return found.gather(1, own.int().argsort(dim=1, stable=True)[:, :count])

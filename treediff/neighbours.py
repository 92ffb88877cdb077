"""Which points lie next to which: exact nearest neighbours, and nearest under changes that should not matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nearest_neighbours"]

# A tile of distances that stays in a core's cache while it is made, reduced over views and searched.
_COLUMNS, _TILE = 4096, 128 * 9 * 4096


def nearest_neighbours(points: Tensor, count: int, *, views: Sequence[Tensor] = ()) -> Tensor:
    """The nearest other points of every point, by exact search.

    With views, `d(i, j) = min over v of ||view_v(i) - points_j||`, the points themselves being one of the views: an
    image is then as near to another as its nearest shifted, turned or otherwise changed copy.

    Args:
        points: `(n, D)` floats.
        count: `k`, how many neighbours of each.
        views: further looks at the same points, each `(n, D)`.

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
    # -|q - p|^2 / 2 as one product, (q, -|q|^2 / 2, 1) with (p, 1, -|p|^2 / 2): larger is nearer.
    queries = torch.stack([_with_norm(view, norm_first=True) for view in (points, *views)])
    keys = _with_norm(points, norm_first=False).T.contiguous()
    step = max(1, _TILE // (_COLUMNS * len(queries)))
    return torch.cat([_search(queries[:, a : a + step], keys, count, a) for a in range(0, n, step)])


def _with_norm(points: Tensor, *, norm_first: bool) -> Tensor:
    norm = -0.5 * points.square().sum(1, keepdim=True)
    return torch.cat([points, norm, torch.ones_like(norm)] if norm_first else [points, torch.ones_like(norm), norm], 1)


def _search(queries: Tensor, keys: Tensor, count: int, first: int) -> Tensor:
    """Neighbours of `(V, B, D + 2)` queries, the first of which is point number `first`."""
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

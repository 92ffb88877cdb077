"""Two clusters of points, cut where the cloud of points is thin: where the split of a leaf begins."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalized_cut"]


def normalized_cut(points: Tensor, *, neighbours: int = 10, min_share: float = 0.1, max_points: int = 2048) -> Tensor:
    """Split points into two clusters by a normalised cut of the graph that joins each to its nearest neighbours.

    The cut seeks the two sides `A`, `B` with the least `cut(A, B) / vol(A) + cut(A, B) / vol(B)`: few and weak edges
    between them, many inside. The relaxed solution is the second eigenvector of the normalised graph, thresholded where
    the quotient is least. Edges weigh `exp(-d_ij^2 / (s_i s_j))` with `s_i` the distance to the furthest neighbour.
    Unlike k-means, which halves the widest direction and may cut through a class, it goes through gaps whatever the
    shape of the two sides.

    Args:
        points: `(n, ...)`, flattened behind the first axis.
        neighbours: edges that each point sends.
        min_share: the smaller side holds at least this share of the points in the graph.
        max_points: points in the graph, evenly spaced among all; the others follow the majority of their five nearest.

    Returns:
        `(n,)` booleans, one side True. Which one is arbitrary, but the same points give the same answer.

    Raises:
        ValueError: if there are fewer than two points, a point is not finite, or a setting is out of range.

    Source: Shi and Malik, "Normalized cuts and image segmentation" (2000), eq. 2 and 11; local scales: Zelnik-Manor and
    Perona, "Self-tuning spectral clustering" (2004).

    Examples:
        >>> normalized_cut(torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), neighbours=2).tolist() in (
        ...     [True, True, True, False, False], [False, False, False, True, True]
        ... )
        True
    """
    _check(points, neighbours, min_share, max_points)
    flat = points.detach().flatten(1).float()
    # The distances of points far from the origin would lose their digits.
    flat = flat - flat.mean(0)
    n, m = len(flat), min(len(flat), max_points)
    chosen = torch.arange(m, device=flat.device) * n // m
    corners = flat[chosen]
    side = _bisect(_affinity(corners, min(neighbours, m - 1)), min_share)
    if n == m:
        return side
    nearest = torch.cdist(flat, corners).topk(min(5, m), largest=False).indices
    nearest[chosen] = torch.arange(m, device=flat.device)[:, None]
    return side[nearest].float().mean(1) > 0.5


def _affinity(points: Tensor, neighbours: int) -> Tensor:
    """`(m, m)` symmetric weights of the neighbour graph."""
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    near, index = distances.topk(neighbours, largest=False)
    scale = near[:, -1:]
    squared = near.square() / (scale * scale[index].squeeze(-1))
    # Points that lie on one another have no scale, and are as close as can be.
    weight = torch.exp(-squared.nan_to_num(nan=0.0, posinf=0.0))
    directed = torch.zeros_like(distances).scatter_(1, index, weight)
    # Clusters far apart hang together by no edge, and then any grouping of them would cost nothing. A pull between all
    # points, far too faint to matter elsewhere, makes the widest gap the cheapest.
    away = distances.fill_diagonal_(0.0).square()
    pull = torch.exp(-away / away.mean().clamp_min(torch.finfo(away.dtype).tiny))
    return 0.5 * (directed + directed.T) + 1e-3 / len(points) * pull


def _bisect(weight: Tensor, min_share: float) -> Tensor:
    """The two sides of a graph."""
    degree = weight.sum(1)
    root = degree.sqrt()
    normalised = weight / (root[:, None] * root)
    # The first eigenvector is known and says nothing. Taken away, it cannot hide among the indicators of
    # components that hang together by nothing.
    normalised -= root[:, None] * root / degree.sum()
    vector = torch.linalg.eigh(normalised).eigenvectors[:, -1] / root
    order = vector.argsort(stable=True)
    inside = weight[order][:, order].cumsum(0).cumsum(1).diagonal()
    volume = degree[order].cumsum(0)
    cut, rest = volume - inside, degree.sum() - volume
    quotient = (cut / volume + cut / rest)[:-1]
    least = max(1, round(min_share * len(order)))
    first = least - 1 + int(quotient[least - 1 : len(order) - least].argmin())
    side = torch.zeros(len(order), dtype=torch.bool, device=weight.device)
    side[order[first + 1 :]] = True
    return side


def _check(points: Tensor, neighbours: int, min_share: float, max_points: int) -> None:
    if len(points) < 2:
        raise ValueError(f"two clusters need at least 2 points, found {len(points)}")
    if not bool(points.isfinite().all()):
        raise ValueError("points must be finite, found NaN or infinity")
    if neighbours < 1 or max_points < 2 or not 0 <= min_share <= 0.5:
        raise ValueError(
            "neighbours must be at least 1, max_points at least 2, and min_share between 0 and 0.5; found "
            f"{neighbours}, {max_points} and {min_share}"
        )

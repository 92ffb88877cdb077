"""Two clusters of points, found without randomness: where the cut of a leaf begins."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["two_means"]


def two_means(points: Tensor, *, steps: int = 50) -> Tensor:
    """Split points into two clusters by Lloyd's algorithm (k-means with k = 2).

    It begins with the two halves along the first principal component, so the same points always give the same clusters,
    and stops when no point changes sides.

    Args:
        points: `(n, ...)`, flattened behind the first axis.
        steps: most rounds of assigning points and moving centres.

    Returns:
        `(n,)` booleans; True is the cluster on the positive side of the component, whose sign is arbitrary. Points that
        are all alike fall into one cluster.

    Raises:
        ValueError: if there are fewer than two points.

    Examples:
        >>> two_means(torch.tensor([[0.0], [0.1], [5.0]])).float().std() > 0
        tensor(True)
    """
    if len(points) < 2:
        raise ValueError(f"two clusters need at least 2 points, found {len(points)}")
    flat = points.detach().flatten(1).double()
    flat = flat - flat.mean(0)
    direction = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -1]
    along = flat @ direction
    side: Tensor = along > along.median()
    for _ in range(steps):
        if bool(side.all()) or not bool(side.any()):
            break
        high, low = flat[side].mean(0), flat[~side].mean(0)
        moved = flat @ (high - low) > 0.5 * (high.square().sum() - low.square().sum())
        if bool((moved == side).all()):
            break
        side = moved
    return side

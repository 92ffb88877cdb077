"""Shrinkage of covariances, for whitening and for linear heads."""

from __future__ import annotations

from torch import Tensor

__all__ = ["check_shrinkage", "shrink"]


def check_shrinkage(shrinkage: float) -> float:
    """Return the shrinkage as a float.

    Raises:
        ValueError: if it is not above 0, and 1 at most.
    """
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage must be above 0, and 1 at most, found {shrinkage}")
    return float(shrinkage)


def shrink(covariance: Tensor, shrinkage: float, size: float = 1.0) -> Tensor:
    """Return `(1 - a) C + a m I` in place, with the mean `m` of the variances, or 1 if there is no variance.

    Args:
        covariance: `C`, `(F, F)`.
        shrinkage: `a`.
        size: mean square of the features; a mean variance below `1e-12` of this is rounding, and counts as none.

    Source: Friedman, "Regularized discriminant analysis" (1989), eq. 18.

    Examples:
        >>> import torch
        >>> shrink(torch.tensor([[1.0, 0.5], [0.5, 3.0]]), 0.5)
        tensor([[1.5000, 0.2500],
                [0.2500, 2.5000]])
    """
    mean = float(covariance.diagonal().mean())
    covariance.mul_(1 - shrinkage)
    covariance.diagonal().add_(shrinkage * mean if mean > 1e-12 * size else 1.0)
    return covariance

"""Checks of the arrays that an audit is given, in one place, so that all measures raise the same errors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_labels", "check_logits", "check_scores"]


def check_scores(**sets: Tensor) -> tuple[Tensor, ...]:
    """Return scores `(n,)` of some sets as float64.

    Raises:
        ValueError: if a set is empty, of another shape, or not finite.
    """
    for name, scores in sets.items():
        if scores.ndim != 1 or not len(scores) or not scores.isfinite().all():
            raise ValueError(f"expected finite scores (n,) of some {name}, found {_found(scores)}")
    return tuple(scores.detach().double() for scores in sets.values())


def check_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return logits `(..., n, classes)` as float64 if labels `(n,)` fit.

    Raises:
        ValueError: if shapes do not fit, there is one class only, labels are out of range, or logits are not finite.
    """
    if logits.ndim < 2 or labels.shape != logits.shape[-2:-1] or logits.shape[-1] < 2:
        raise ValueError(
            "expected logits (..., n, classes) of at least two classes and labels (n,), found "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, found NaN or infinity")
    check_labels(labels, logits.shape[-1])
    return logits.detach().double()


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise TypeError unless labels are int64, ValueError unless they are from 0 to below the number of classes."""
    if labels.dtype != torch.int64:
        raise TypeError(f"expected labels of torch.int64, found {labels.dtype}")
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(f"labels must be from 0 to {classes - 1}, found {int(labels.min())} to {int(labels.max())}")


def _found(scores: Tensor) -> str:
    finite = "" if scores.isfinite().all() else ", not all finite"
    return f"{tuple(scores.shape)}{finite}"

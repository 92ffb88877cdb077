"""Forget sets for an audit: random instances, which are the easiest to forget, and harder sets.

Each function returns row numbers `(count,)` in an order that depends on its arguments alone.

Letters: `n` instances, `D` width of a key, `M` models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.posthoc.relabelling import wrong_labels
from munkey.search.exact import nearest

__all__ = ["at_random", "cluster", "low_density", "memorised", "mislabelled", "of_class"]


def at_random(total: int, count: int, *, generator: torch.Generator) -> Tensor:
    """Draw instances at random, all equally likely.

    Args:
        total: `n`.
        count: number of instances to forget.
        generator: draws the instances.

    Raises:
        ValueError: if there are fewer instances than `count`.
    """
    _check_count(count, total)
    return torch.randperm(total, generator=generator)[:count]


def of_class(labels: Tensor, label: int) -> Tensor:
    """Return all instances of one class, in order.

    Args:
        labels: `(n,)`.
        label: the class.

    Raises:
        ValueError: if no instance has this class.
    """
    rows = (labels == label).nonzero().squeeze(1)
    if not len(rows):
        raise ValueError(f"there is no instance of class {label}")
    return rows


def cluster(keys: Tensor, row: int, count: int) -> Tensor:
    """Return an instance and the instances most similar to it, by the cosine of their keys; the nearest first.

    Args:
        keys: `(n, D)`.
        row: the instance in the middle.
        count: number of instances to forget, including the instance in the middle.

    Raises:
        ValueError: if there are fewer instances than `count`.
    """
    _check_count(count, len(keys))
    unit = F.normalize(keys.double(), dim=1)
    return (unit @ unit[row]).argsort(descending=True, stable=True)[:count]


def low_density(keys: Tensor, count: int, *, neighbours: int = 10) -> Tensor:
    """Return the most isolated instances: least mean cosine to their nearest keys, the least first.

    Args:
        keys: `(n, D)`.
        count: number of instances to forget.
        neighbours: number of nearest keys in the mean.

    Raises:
        ValueError: if there are fewer instances than `count`, or fewer other instances than `neighbours`.
    """
    _check_count(count, len(keys))
    _check_count(neighbours, len(keys) - 1, "neighbours")
    unit, ids = F.normalize(keys, dim=1), torch.arange(len(keys), device=keys.device)
    found = [
        nearest(unit[part], unit, ids, neighbours, exclude_ids=part).scores.double().mean(1) for part in ids.split(1024)
    ]
    return torch.cat(found).argsort(stable=True)[:count]


def memorised(right: Tensor, seen: Tensor, count: int) -> Tensor:
    """Return the instances that models classify correctly only if trained on them, the most memorised first.

        score(i) = P(i is classified correctly | trained on i) - P(i is classified correctly | not trained on i)

    Source: Feldman and Zhang, "What neural networks memorize and why" (arXiv 2008.03703), eq. 1, with subsets in place
    of leaving one out.

    Args:
        right: `(M, n)` bool, whether each of several models classifies each instance correctly.
        seen: `(M, n)` bool, whether each model was trained on each instance.
        count: number of instances to forget.

    Raises:
        ValueError: if shapes differ, or all models or no model were trained on an instance.
    """
    if right.shape != seen.shape or right.ndim != 2:
        raise ValueError(f"expected (models, n) twice, found {tuple(right.shape)} and {tuple(seen.shape)}")
    _check_count(count, right.shape[1])
    inside, outside = seen.sum(0), (~seen).sum(0)
    if not (inside.all() and outside.all()):
        raise ValueError("each instance must be seen by some models and not by others; train more models")
    score = (right & seen).sum(0).double() / inside - (right & ~seen).sum(0).double() / outside
    return score.argsort(descending=True, stable=True)[:count]


def mislabelled(labels: Tensor, count: int, classes: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random rows to forget, and labels `(n,)` that are wrong in these rows: train with these labels first.

    Args:
        labels: `(n,)` int64.
        count: number of wrong labels, all wrong classes equally likely.
        classes: number of classes, at least 2.
        generator: draws rows and labels.

    Raises:
        ValueError: if there are fewer instances than `count`, or one class only.
    """
    rows = at_random(len(labels), count, generator=generator).to(labels.device)
    wrong = labels.clone()
    wrong[rows] = wrong_labels(labels[rows], classes, generator=generator)
    return rows, wrong


def _check_count(count: int, total: int, what: str = "count") -> None:
    if not 1 <= count <= total:
        raise ValueError(f"{what} must be from 1 to {total}, found {count}")

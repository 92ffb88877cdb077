"""What to forget in an audit: at random, which is the easiest, and what is harder.

Each function gives row numbers `(count,)` in an order that depends on its arguments alone.

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
    """Any instances, each as likely.

    Args:
        total: `n`.
        count: how many to forget.
        generator: chooses.

    Raises:
        ValueError: if there are not as many.
    """
    _check_count(count, total)
    return torch.randperm(total, generator=generator)[:count]


def of_class(labels: Tensor, label: int) -> Tensor:
    """All of one class, in order.

    Args:
        labels: `(n,)`.
        label: the class.

    Raises:
        ValueError: if there is none of it.
    """
    rows = (labels == label).nonzero().squeeze(1)
    if not len(rows):
        raise ValueError(f"there is no instance of class {label}")
    return rows


def cluster(keys: Tensor, row: int, count: int) -> Tensor:
    """An instance and those most like it, by the cosine of their keys; the nearest first.

    Args:
        keys: `(n, D)`.
        row: the instance in the middle.
        count: how many to forget, the one in the middle included.

    Raises:
        ValueError: if there are not as many.
    """
    _check_count(count, len(keys))
    unit = F.normalize(keys.double(), dim=1)
    return (unit @ unit[row]).argsort(descending=True, stable=True)[:count]


def low_density(keys: Tensor, count: int, *, neighbours: int = 10) -> Tensor:
    """Instances that have the least in common with others: least mean cosine to their nearest keys; the least first.

    Args:
        keys: `(n, D)`.
        count: how many to forget.
        neighbours: over how many nearest ones the mean is taken.

    Raises:
        ValueError: if there are not as many instances, or neighbours.
    """
    _check_count(count, len(keys))
    _check_count(neighbours, len(keys) - 1, "neighbours")
    unit, ids = F.normalize(keys, dim=1), torch.arange(len(keys), device=keys.device)
    found = [
        nearest(unit[part], unit, ids, neighbours, exclude_ids=part).scores.double().mean(1) for part in ids.split(1024)
    ]
    return torch.cat(found).argsort(stable=True)[:count]


def memorised(right: Tensor, seen: Tensor, count: int) -> Tensor:
    """Instances that models know only if they have seen them, the most so first.

        score(i) = P(i is classified rightly | trained on i) - P(i is classified rightly | not trained on i)

    Source: Feldman and Zhang, "What neural networks memorize and why" (arXiv 2008.03703), eq. 1, with subsets in place
    of leaving one out.

    Args:
        right: `(M, n)` bool, whether each of several models classifies each instance rightly.
        seen: `(M, n)` bool, whether it was trained on it.
        count: how many to forget.

    Raises:
        ValueError: if shapes differ, or an instance was seen by all models or by none.
    """
    if right.shape != seen.shape or right.ndim != 2:
        raise ValueError(f"expected (models, n) twice, found {tuple(right.shape)} and {tuple(seen.shape)}")
    _check_count(count, right.shape[1])
    inside, outside = seen.sum(0), (~seen).sum(0)
    if not (inside.all() and outside.all()):
        raise ValueError("each instance must be seen by some models and not by others; train more of them")
    score = (right & seen).sum(0).double() / inside - (right & ~seen).sum(0).double() / outside
    return score.argsort(descending=True, stable=True)[:count]


def mislabelled(labels: Tensor, count: int, classes: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to forget, and labels `(n,)` where these have a wrong one: train with them, then forget.

    Args:
        labels: `(n,)` int64.
        count: how many to give a wrong label, each wrong one as likely.
        classes: how many there are, at least 2.
        generator: chooses.

    Raises:
        ValueError: if there are not as many instances, or one class only.
    """
    rows = at_random(len(labels), count, generator=generator).to(labels.device)
    wrong = labels.clone()
    wrong[rows] = wrong_labels(labels[rows], classes, generator=generator)
    return rows, wrong


def _check_count(count: int, total: int, what: str = "count") -> None:
    if not 1 <= count <= total:
        raise ValueError(f"{what} must be from 1 to {total}, found {count}")

"""Distances of a model after forgetting to retrained models (oracles), trained without the forgotten instances.

Only nearness counts: a model that is worse on forgotten instances than the oracle has not forgotten better.

Letters: `n` instances, `k` and `l` models of different seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Distance", "average_gap", "kl_of_margins", "kolmogorov_smirnov", "tug_of_war"]


@dataclass(frozen=True, eq=False)
class Distance:
    """A distance for each instance, and their mean.

    Attributes:
        mean: over instances.
        each: `(n,)`.
    """

    mean: float
    each: Tensor


def average_gap(found: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """Return `mean |found - oracle|` over metrics: from 0, lower is better, 0 for the oracle itself.

    MUNKEY (arXiv 2603.15033) is evaluated by this gap. Its metrics are accuracies on test, retained and forgotten
    instances and the area under an attack's curve, all in percent. The gap between two oracles of different seeds is
    the scale to compare with.

    Args:
        found: metrics of a model after forgetting.
        oracle: the same metrics of a retrained model.

    Raises:
        ValueError: if the names of the metrics differ, or there are no metrics.

    Examples:
        >>> average_gap({"test": 90.0, "forget": 91.0}, {"test": 90.5, "forget": 89.5})
        1.0
    """
    _check_names(found, oracle)
    return sum(abs(found[name] - oracle[name]) for name in found) / len(found)


def tug_of_war(found: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """Return `prod (1 - |found - oracle|)` over accuracies: from 0 to 1, higher is better, 1 for the oracle itself.

    Unlike a mean, the product falls with the worst agreement. Source: Zhao et al., "What makes unlearning hard and what
    to do about it" (arXiv 2406.01257), with accuracies on forgotten, retained and test instances.

    Args:
        found: accuracies from 0 to 1 of a model after forgetting.
        oracle: the same accuracies of a retrained model.

    Raises:
        ValueError: if the names differ, there are no accuracies, or an accuracy is not from 0 to 1.

    Examples:
        >>> round(tug_of_war({"test": 0.9, "forget": 1.0}, {"test": 0.9, "forget": 0.8}), 6)
        0.8
    """
    _check_names(found, oracle)
    for name in found:
        if not (0 <= found[name] <= 1 and 0 <= oracle[name] <= 1):
            raise ValueError(f"accuracies must be from 0 to 1, found {name} {found[name]} and {oracle[name]}")
    return math.prod(1 - abs(found[name] - oracle[name]) for name in found)


def kl_of_margins(found: Tensor, oracle: Tensor, *, bins: int = 20, floor: float = 1e-3) -> Distance:
    """Return `KL(found || oracle)` of each instance's margins in nats: from 0, lower is better, 0 for equal margins.

    Margins of both sides are counted in bins of equal width between the least and the greatest margin of an instance.
    `floor` is added to each share, and the shares are normalised again, so that an empty bin has a high but finite
    cost. With few models the result is above 0 even for two halves of the oracles: report this value, too. Source:
    Georgiev et al., "Attribute-to-delete" (arXiv 2410.23232).

    Args:
        found: `(k, n)` `margins` of models after forgetting.
        oracle: `(l, n)` margins of retrained models.
        bins: number of bins.
        floor: added to each share, above 0.

    Raises:
        ValueError: if shapes do not fit, margins are not finite, or a number is out of range.

    Examples:
        >>> kl_of_margins(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [0.0]])).mean
        0.0
    """
    _check_models(found, oracle)
    if bins < 2:
        raise ValueError(f"bins must be at least 2, found {bins}")
    if not floor > 0:
        raise ValueError(f"floor must be above 0, found {floor}")
    both = torch.cat([found, oracle]).detach().double()
    low, high = both.aminmax(dim=0)
    width = torch.where(high > low, high - low, 1.0) / bins
    place = ((both - low) / width).long().clamp_(max=bins - 1)
    shares = []
    for part in place.split([len(found), len(oracle)]):
        counts = torch.zeros(bins, part.shape[1], dtype=torch.float64, device=part.device)
        counts.scatter_add_(0, part, torch.ones_like(part, dtype=torch.float64))
        shares.append((counts / len(part) + floor) / (1 + bins * floor))
    each = (shares[0] * (shares[0] / shares[1]).log()).sum(0)
    return Distance(float(each.mean()), each)


def kolmogorov_smirnov(found: Tensor, oracle: Tensor) -> Distance:
    """Return `max_t |F_found(t) - F_oracle(t)|` of each instance: from 0 to 1, lower is better, 0 for equal samples.

    `F` is the share of models with a value of at most `t`. With few models the result is well above 0 even for two
    halves of the oracles: report this value, too.

    Args:
        found: `(k, n)` margins or losses of models after forgetting.
        oracle: `(l, n)` margins or losses of retrained models.

    Raises:
        ValueError: if shapes do not fit, or a value is not finite.

    Examples:
        >>> kolmogorov_smirnov(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])).mean
        0.5
    """
    _check_models(found, oracle)
    ours, theirs = (side.detach().double().mT.contiguous().sort().values for side in (found, oracle))
    both = torch.cat([ours, theirs], 1)
    shares = [torch.searchsorted(side, both, right=True).double() / side.shape[1] for side in (ours, theirs)]
    each = (shares[0] - shares[1]).abs().amax(1)
    return Distance(float(each.mean()), each)


def _check_names(found: Mapping[str, float], oracle: Mapping[str, float]) -> None:
    if found.keys() != oracle.keys() or not found:
        raise ValueError(f"expected the same metrics of both, found {sorted(found)} and {sorted(oracle)}")


def _check_models(found: Tensor, oracle: Tensor) -> None:
    if found.ndim != 2 or oracle.ndim != 2 or found.shape[1] != oracle.shape[1] or not found.numel() * oracle.numel():
        raise ValueError(
            f"expected values (models, n) of the same instances, found {tuple(found.shape)} and {tuple(oracle.shape)}"
        )
    if not (found.isfinite().all() and oracle.isfinite().all()):
        raise ValueError("values of models must be finite, found NaN or infinity")

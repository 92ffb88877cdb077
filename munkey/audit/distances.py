"""How far a model that forgot is from models that were trained without.

Being near is all that is asked: a model that does worse on what it forgot than one that never saw it has not forgotten
better.

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
    """`mean |found - oracle|` over metrics: from 0, lower is better, 0 for the oracle itself.

    With accuracies on test, retained and forgotten instances and the area under an attack's curve, all in percent, it
    is the measure by which MUNKEY is judged (arXiv 2603.15033); its value between two oracles of different seeds says
    what a gap means.

    Args:
        found: metrics of a model that forgot.
        oracle: the same of a model that was trained without.

    Raises:
        ValueError: if they have not the same names, or none.

    Examples:
        >>> average_gap({"test": 90.0, "forget": 91.0}, {"test": 90.5, "forget": 89.5})
        1.0
    """
    _check_names(found, oracle)
    return sum(abs(found[name] - oracle[name]) for name in found) / len(found)


def tug_of_war(found: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """`prod (1 - |found - oracle|)` over accuracies: from 0 to 1, higher is better, 1 for the oracle itself.

    Unlike a mean it falls with whichever agreement is worst. Source: Zhao et al., "What makes unlearning hard and what
    to do about it" (arXiv 2406.01257), with accuracies on forgotten, retained and test instances.

    Args:
        found: accuracies from 0 to 1 of a model that forgot.
        oracle: the same of a model that was trained without.

    Raises:
        ValueError: if they have not the same names, or none, or one is not from 0 to 1.

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
    """`KL(found || oracle)` of each instance's margins, in nats: from 0, lower is better, 0 for the same margins.

    Margins of both sides are counted in bins of equal width between the least and the greatest of that instance, and
    `floor` is added to each share before they are made to add up to 1 again, so that an empty bin costs much and not
    everything. With few models it is above 0 for two halves of the oracles as well: report that beside it. Source:
    Georgiev et al., "Attribute-to-delete" (arXiv 2410.23232).

    Args:
        found: `(k, n)` `margins` of models that forgot.
        oracle: `(l, n)` those of models that were trained without.
        bins: how many.
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
    """`max_t |F_found(t) - F_oracle(t)|` for each instance: from 0 to 1, lower is better, 0 for the same samples.

    `F` is the share of models whose value is at most `t`. With few models it is well above 0 for two halves of the
    oracles as well: report that beside it.

    Args:
        found: `(k, n)` of models that forgot: margins, or losses.
        oracle: `(l, n)` the same of models that were trained without.

    Raises:
        ValueError: if shapes do not fit, or something is not finite.

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

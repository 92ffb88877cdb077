"""Membership inference with reference models, and with a trained attacker.

The output of a model for an instance means little alone. It is compared with the outputs of models that were trained on
the instance, and of models that were not.

Letters: `n` instances, `z` instances of the population, `F` features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.audit.checks import check_logits
from munkey.audit.membership import log_probabilities

__all__ = ["classifier_scores", "confidence_features", "lira_scores", "margins", "rmia_scores"]


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `log p_y - log(1 - p_y)`, `(..., n)`: above 0 where the label is likelier than all the rest together.

    Over models trained with different seeds, the margins of an instance are close to normal. `lira_scores` and
    `kl_of_margins` build on this (Carlini et al., arXiv 2112.03570, eq. 3).

    Args:
        logits: `(..., n, classes)`.
        labels: `(n,)` int64.

    Raises:
        TypeError: if labels are not int64.
        ValueError: if shapes do not fit, labels are out of range, or logits are not finite.

    Examples:
        >>> margins(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        tensor([3.], dtype=torch.float64)
    """
    logp, rest = log_probabilities(check_logits(logits, labels))
    index = labels.expand(logp.shape[:-1])[..., None]
    return (logp - rest).gather(-1, index).squeeze(-1)


def lira_scores(found: Tensor, members: Tensor, others: Tensor, *, shared_variance: bool = False) -> Tensor:
    """Return `log N(found; members) - log N(found; others)`, `(n,)`: greater for likelier members.

    This is the likelihood-ratio attack, with one pair of normal distributions for each instance. For unlearning
    (U-LiRA, Hayes et al., arXiv 2403.01218), `members` are models that were trained on the instance and then forgot the
    instance. `others` are models that were never trained on the instance. The area under the curve, of forgotten
    instances against instances that were never trained on, is 0.5 for an oracle.

    Args:
        found: `(n,)` `margins` of the model under attack.
        members: `(k, n)` margins of shadow models trained on each instance; NaN where a model does not count for one.
        others: `(l, n)` margins of shadow models not trained on each instance; NaN as for `members`.
        shared_variance: whether all instances share one variance for members and one for others; better with fewer than
            about 64 shadow models.

    Raises:
        ValueError: if shapes do not fit, `found` is not finite, an instance has fewer than two models on a side, or
            the margins of a side do not vary.

    Examples:
        >>> known, unknown = torch.tensor([[2.0], [4.0]]), torch.tensor([[-1.0], [1.0]])
        >>> lira_scores(torch.tensor([3.0]), known, unknown)
        tensor([2.2500], dtype=torch.float64)
    """
    if found.ndim != 1 or not found.isfinite().all():
        raise ValueError(f"expected finite margins (n,) of the model under attack, found {tuple(found.shape)}")
    sides = []
    for name, side in (("members", members), ("others", others)):
        if side.ndim != 2 or side.shape[1:] != found.shape or side.isinf().any():
            raise ValueError(f"expected margins (models, {len(found)}) of {name}, found {tuple(side.shape)}")
        counts = (~side.isnan()).sum(0)
        if len(counts) and counts.min() < 2:
            raise ValueError(f"expected two models or more for each instance among {name}, found {int(counts.min())}")
        wide = side.double()
        mean = wide.nanmean(0)
        squares = (wide - mean).square().nansum(0)
        variance = squares.sum() / (counts - 1).sum() if shared_variance else squares / (counts - 1)
        if not (variance > 0).all():
            raise ValueError(f"margins of {name} do not vary over models; train these with different seeds")
        sides.append(-0.5 * ((found.double() - mean).square() / variance + variance.log()))
    return sides[0] - sides[1]


def rmia_scores(
    found: Tensor,
    references: Tensor,
    population: Tensor,
    population_references: Tensor,
    *,
    gamma: float = 1.0,
    offline: float = 1.0,
) -> Tensor:
    """Return the share of the population that an instance dominates, `(n,)` from 0 to 1, greater for likelier members.

        score(x) = P_z( [p(x) / q(x)] / [p(z) / q(z)] >= gamma )

    with `p`, the probability of the label under the model, and `q`, the mean of this probability over reference models.
    If all reference models were trained without `x`, `q = ((1 + a) q_out + 1 - a) / 2` corrects for this. The area
    under the curve of these scores is 0.5 for an oracle. Source: Zarifzadeh et al. (arXiv 2312.03262), with the
    population as given.

    Args:
        found: `(n,)` log-probability of the label under the model, at most 0 (the 'loss' of `membership_scores`).
        references: `(k, n)` log-probabilities of the same instances under reference models.
        population: `(z,)` log-probabilities under the model, of instances that are no members.
        population_references: `(k, z)` log-probabilities of the population under the reference models.
        gamma: least ratio by which an instance dominates another, above 0.
        offline: `a`, from 0 to 1; 1 if half of the reference models were trained on `x`, or to leave `q` as it is.

    Raises:
        ValueError: if shapes do not fit, a number is out of range, or a log-probability is above 0 or NaN.

    Examples:
        >>> log = lambda *p: torch.tensor(p).log()
        >>> rmia_scores(log(0.9), log(0.5)[None], log(0.6, 0.95), log(0.5, 0.5)[None])
        tensor([0.5000], dtype=torch.float64)
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, found {gamma}")
    if not 0 <= offline <= 1:
        raise ValueError(f"offline must be between 0 and 1, found {offline}")
    sides = []
    for name, own, others in (("found", found, references), ("population", population, population_references)):
        if own.ndim != 1 or others.ndim != 2 or others.shape[1:] != own.shape or not len(own) or not len(others):
            raise ValueError(f"expected {name} (n,) and references (models, n), found {own.shape} and {others.shape}")
        if not (own <= 0).all() or not (others <= 0).all():
            raise ValueError(f"log-probabilities of {name} must be at most 0, found greater ones or NaN")
        q = others.double().logsumexp(0).exp() / len(others)
        sides.append(own.double() - (((1 + offline) * q + 1 - offline) / 2).log())
    ratios, theirs = sides[0], sides[1].sort().values
    if len(references) != len(population_references):
        raise ValueError(
            f"expected the same reference models twice, found {len(references)} and {len(population_references)}"
        )
    at_most = torch.searchsorted(theirs, ratios - torch.tensor(gamma, dtype=torch.float64).log(), right=True)
    return at_most.double() / len(theirs)


def confidence_features(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities in descending order, then the label's, `(n, classes + 1)`, for `classifier_scores`.

    Args:
        logits: `(n, classes)`.
        labels: `(n,)` int64.

    Raises:
        TypeError: if labels are not int64.
        ValueError: if shapes do not fit, labels are out of range, or logits are not finite.
    """
    logp, _ = log_probabilities(check_logits(logits, labels))
    return torch.cat([logp.sort(-1, descending=True).values, logp.gather(-1, labels[:, None])], 1)


def classifier_scores(members: Tensor, others: Tensor, *asked: Tensor, penalty: float = 1e-3) -> tuple[Tensor, ...]:
    """Return log-odds of membership, `(n,)` for each queried set, by a logistic regression on features.

    The attacker has features of some members and of some others, and learns the difference: a boundary of any
    direction, not a threshold. Features are scaled to mean 0 and variance 1, and both classes have the same weight. The
    area under the curve on forgotten instances and on new others is about 0.5 for an oracle.

    Args:
        members: `(n, F)` features of known members, such as `confidence_features` of retained instances.
        others: `(m, F)` features of known others; none of the queried instances.
        *asked: `(..., F)` features of queried instances.
        penalty: on the squared weights.

    Raises:
        ValueError: if features are not finite or of different widths, or a set to train on is empty.

    Examples:
        >>> known, unknown = torch.tensor([[2.0], [3.0]]), torch.tensor([[-2.0]])
        >>> (scores,) = classifier_scores(known, unknown, torch.tensor([[3.0], [-1.0]]))
        >>> scores > 0
        tensor([ True, False])
    """
    width = members.shape[-1]
    for name, x in (("members", members), ("others", others), *(("queried instances", x) for x in asked)):
        if x.ndim != 2 or x.shape[1] != width or not x.isfinite().all():
            raise ValueError(f"expected finite features (n, {width}) of {name}, found {tuple(x.shape)}")
    if not len(members) or not len(others):
        raise ValueError(f"expected known members and known others, found {len(members)} and {len(others)}")
    known = torch.cat([members, others]).detach().double()
    mean, scale = known.mean(0), known.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x = (known - mean) / scale
    sign = torch.cat([x.new_ones(len(members)), -x.new_ones(len(others))])
    weight = torch.cat([x.new_full((len(m),), 0.5 / len(m)) for m in (members, others)])
    line = x.new_zeros(width + 1).requires_grad_()
    solver = torch.optim.LBFGS(
        [line], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        total = (weight * F.softplus(-sign * (x @ line[:-1] + line[-1]))).sum() + penalty * line[:-1].square().sum() / 2
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    line = line.detach()
    return tuple((x.detach().double() - mean) / scale @ line[:-1] + line[-1] for x in asked)

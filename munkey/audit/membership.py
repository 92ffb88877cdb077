"""Membership inference: attacks that decide from the outputs of a model whether it was trained on an instance.

An attack is a *score* for each instance, greater for likelier members, and a comparison of two sets of scores: members,
or forgotten instances, and others that never were members. Draw the others from the same distribution as the members.
If a class was forgotten, draw the others from this class, or the attack measures how hard the class is.

Letters: `n` members, `m` others, `R` resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.audit.checks import check_logits, check_scores

__all__ = ["Attack", "area_under_curve", "attack", "membership_scores"]


@dataclass(frozen=True, eq=False)
class Attack:
    """Separation of members from others by their scores.

    Attributes:
        auc: `P(member > other) + P(equal) / 2`, the area under the curve, from 0 to 1; 0.5 if scores do not separate,
            and about 0.5 for a retrained model (oracle). A value below is no better: then others have greater scores,
            which reveals members as well.
        auc_interval: 95 % bootstrap interval of `auc`.
        tpr: true-positive rate, the share of the members that are detected, while at most `fpr` of the others are; from
            0 to 1, about `fpr` for an oracle.
        tpr_interval: 95 % bootstrap interval of `tpr`.
        fpr: greatest false-positive rate.
        members: `(n,)` scores.
        others: `(m,)` scores.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    fpr: float
    members: Tensor
    others: Tensor


def membership_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return scores of single instances from the outputs of a model, each `(..., n)`, greater for likelier members.

    With probabilities `p` and label `y`:

    - *confidence*: `max_i log p_i`, which needs no label (Salem et al., arXiv 1806.01246, adversary 3)
    - *loss*: `log p_y`, the negative cross-entropy (Yeom et al., arXiv 1709.01604)
    - *entropy*: `sum_i p_i log p_i`, which needs no label
    - *modified entropy*: `(1 - p_y) log p_y + sum_{i != y} p_i log(1 - p_i)` (Song and Mittal, arXiv 2003.10595)

    All scores are in nats and at most 0. They are computed in float64 from log-probabilities, so that confident
    predictions do not lead to ties.

    Args:
        logits: `(..., n, classes)`.
        labels: `(n,)` int64.

    Raises:
        TypeError: if labels are not int64.
        ValueError: if shapes do not fit, labels are out of range, or logits are not finite.

    Examples:
        >>> scores = membership_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> {name: round(score.item(), 3) for name, score in scores.items()}
        {'confidence': -0.127, 'loss': -0.127, 'entropy': -0.365, 'modified entropy': -0.03}
    """
    wide = check_logits(logits, labels)
    logp, rest = log_probabilities(wide)
    p = logp.exp()
    of_label = F.one_hot(labels, wide.shape[-1]).bool().expand_as(wide)
    loss = logp.masked_select(of_label).view(wide.shape[:-1])
    rest_of_label = rest.masked_select(of_label).view_as(loss)
    wrong = (p * rest).masked_fill(of_label, 0).sum(-1)
    return {
        "confidence": logp.amax(-1),
        "loss": loss,
        "entropy": (p * logp).sum(-1),
        "modified entropy": rest_of_label.exp() * loss + wrong,
    }


def log_probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log p_i` and `log(1 - p_i)`, both `(..., classes)`, without cancellation where a class is near 1."""
    first = logits.argmax(-1, keepdim=True)
    shifted = logits - logits.gather(-1, first)
    others = shifted.scatter(-1, first, -torch.inf).logsumexp(-1, keepdim=True)
    total = F.softplus(others)
    logp = shifted - total
    return logp, torch.log1p(-logp.exp()).scatter(-1, first, others - total)


def area_under_curve(members: Tensor, others: Tensor) -> float:
    """Return `P(member > other) + P(equal) / 2`, from 0 to 1, 0.5 for an oracle; see `Attack`.

    Args:
        members: `(n,)` scores.
        others: `(m,)` scores.

    Raises:
        ValueError: if a set is empty or not finite.

    Examples:
        >>> area_under_curve(torch.tensor([-0.1, -0.2]), torch.tensor([-0.2, -3.0]))
        0.875
    """
    ours, theirs = check_scores(members=members, others=others)
    below, through = _places(ours, theirs)
    return float((below + through).double().mean() / (2 * len(theirs)))


def attack(
    members: Tensor,
    others: Tensor,
    *,
    fpr: float = 0.01,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> Attack:
    """Compare the scores of members with the scores of others; see `Attack` for ranges and directions.

    Intervals are from the percentile bootstrap: members and others are each drawn again with replacement.

    Args:
        members: `(n,)` scores, greater for likelier members, of instances that were trained on or forgotten.
        others: `(m,)` scores of instances that never were members, drawn in the same way.
        fpr: greatest false-positive rate, at which the true-positive rate is taken.
        resamples: `R`; the cost is `R (n + m)`.
        generator: draws the resamples; seed 0 if not given, so that the same scores give the same interval.

    Raises:
        ValueError: if scores are empty or not finite, or a number is out of range.

    Examples:
        >>> found = attack(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, -1.0]))
        >>> found.auc, found.tpr
        (0.8333333333333334, 0.6666666666666666)
    """
    ours, theirs = check_scores(members=members, others=others)
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be between 0 and 1, found {fpr}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    generator = generator or torch.Generator(ours.device).manual_seed(0)
    below, through = _places(ours, theirs)
    areas, shares = [], []
    rows = 1 + 2_000_000 // (len(ours) + len(theirs))
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        inside, outside = (_drawn(len(scores), count, ours.device, generator) for scores in (ours, theirs))
        area, share = _rates(inside, outside, below, through, fpr)
        areas.append(area)
        shares.append(share)
    area, share = _rates(torch.ones_like(ours)[None], torch.ones_like(theirs)[None], below, through, fpr)
    return Attack(
        float(area), _interval(areas), float(share), _interval(shares), fpr, members.detach(), others.detach()
    )


def _places(members: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each member, the number `(n,)` of others below its score, and of others not above it."""
    ordered = others.sort().values
    return torch.searchsorted(ordered, members), torch.searchsorted(ordered, members, right=True)


def _drawn(count: int, times: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return how often each item is drawn, `(times, count)`, in draws of `count` items with replacement."""
    picks = torch.randint(count, (times, count), generator=generator, device=device)
    return torch.zeros(times, count, dtype=torch.float64, device=device).scatter_add_(
        1, picks, torch.ones_like(picks, dtype=torch.float64)
    )


def _rates(ours: Tensor, theirs: Tensor, below: Tensor, through: Tensor, fpr: float) -> tuple[Tensor, Tensor]:
    """Return area and true-positive rate, both `(R,)`, from counts of members `(R, n)` and sorted others `(R, m)`."""
    total, before = theirs.sum(1), F.pad(theirs.cumsum(1), (1, 0))
    under, not_over = before[:, below], before[:, through]
    area = (ours * (under + not_over)).sum(1) / (2 * ours.sum(1) * total)
    # A member is detected if a threshold at its own score admits few enough others.
    taken = total[:, None] - under <= fpr * total[:, None]
    return area, (ours * taken).sum(1) / ours.sum(1)


def _interval(parts: list[Tensor]) -> tuple[float, float]:
    low, high = torch.cat(parts).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high

"""Did it forget? What an attacker can tell, and how far a model is from one that never saw what was forgotten.

Every number has a direction and a value that it takes for a model trained without the forgotten instances (the
retrained *oracle*); being beyond that value is no better than being before it.

Letters: `n` instances.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.model import KeyMemoryTransformer
from treediff.modes import evaluating

__all__ = ["average_gap", "instance_losses", "loss_attack"]


@torch.no_grad()
def instance_losses(
    model: KeyMemoryTransformer,
    x: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    batch_size: int = 256,
) -> Tensor:
    """`(n,)` cross-entropy of each instance, in nats, in eval mode; what `loss_attack` compares.

    Args:
        model: the classifier.
        x: `(n, ...)` inputs.
        labels: `(n,)` int64.
        keys: `(n, D)` what the model's key encoder makes of the inputs, if it is at hand.
        batch_size: how many are classified at a time.
    """
    parts = []
    with evaluating(model):
        for rows in torch.arange(len(x)).split(batch_size):
            logits = model(x[rows], keys=None if keys is None else keys[rows])
            parts.append(F.cross_entropy(logits, labels[rows], reduction="none"))
    return torch.cat(parts)


def loss_attack(members: Tensor, others: Tensor) -> float:
    """How well the loss tells members from others: `P(loss of a member < loss of another) + P(equal) / 2`.

    The area under the curve of the attack that takes instances of small loss for members. From 0 to 1; 0.5 where it can
    tell nothing, and about that for an oracle. Below 0.5 members have greater losses, which gives them away as well.

    Args:
        members: `(n,)` losses of what was trained on, or forgotten.
        others: `(m,)` losses of what never was, drawn in the same way: if a class was forgotten, of that class, or the
            attack tells how hard the class is.

    Raises:
        ValueError: if one is empty or not finite.

    Source: Yeom et al. (arXiv 1709.01604), with the threshold left open.

    Examples:
        >>> loss_attack(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 3.0]))
        0.875
    """
    for name, losses in (("members", members), ("others", others)):
        if losses.ndim != 1 or not len(losses) or not losses.isfinite().all():
            raise ValueError(f"expected finite losses (n,) of some {name}, found {tuple(losses.shape)}")
    ordered, wide = others.double().sort().values, members.double()
    below, through = (torch.searchsorted(ordered, wide, right=right) for right in (False, True))
    less, equal = len(ordered) - through, through - below
    return float((less + equal / 2).double().mean() / len(ordered))


def average_gap(found: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """`mean |found - oracle|` over metrics: 0 for the oracle itself, and smaller is better.

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
    if found.keys() != oracle.keys() or not found:
        raise ValueError(f"expected the same metrics of both, found {sorted(found)} and {sorted(oracle)}")
    return sum(abs(found[name] - oracle[name]) for name in found) / len(found)

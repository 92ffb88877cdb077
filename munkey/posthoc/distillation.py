"""Distillation: nearness to the original model on the retain set, and distance from it on the forget set.

Letters: `p` probabilities, `L` mean cross-entropy in nats, `KL(p || q) = sum p log(p / q)`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.posthoc.descent import Examples, descend, draws
from treediff.core.modes import evaluating

__all__ = ["bad_teacher", "scrub"]


def bad_teacher(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    incompetent: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Descend on `KL(p_before || p)` of the retain set and `KL(p_incompetent || p)` of the forget set.

    Both terms are weighted by the sizes of their batches. Source: Chundawat et al. (arXiv 2205.08096), eq. 5.

    Args:
        model: from inputs to logits `(B, classes)`; its state at the call is the competent teacher.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances of each set in a step.
        incompetent: the other teacher, a network that was never trained; if not given, a teacher that predicts all
            classes as equally likely.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`.
    """
    kept, gone = draws(retain, forget, batch_size, generator)
    good = copy.deepcopy(model)

    def loss(step: int) -> Tensor:
        (ours, _), (theirs, _) = next(kept), next(gone)
        found = model(torch.cat([ours, theirs]))
        wrong = torch.zeros_like(found[len(ours) :]) if incompetent is None else answer(incompetent, theirs)
        return divergence(torch.cat([answer(good, ours), wrong]), found)

    descend(model, optimizer, steps, loss)


def scrub(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    alpha: float = 0.5,
    gamma: float = 1.0,
    temperature: float = 4.0,
    rounds: int = 2,
    generator: torch.Generator | None = None,
) -> None:
    """Alternate passes that ascend on `KL(forget)` and that descend on `alpha KL(retain) + gamma L(retain)`.

    `KL` is `T^2 KL(p_before || p)` at temperature `T`. After `rounds` of both, all passes descend on the retain set.
    While the model is equal to the teacher, the gradient of `KL` is zero: without dropout the first pass has no ascent.
    Source: SCRUB, Kurmanji et al. (arXiv 2302.09880), eq. 3 and algorithm 1, without rewinding.

    Args:
        model: from inputs to logits `(B, classes)`; its state at the call is the teacher.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change.
        steps: number of steps in both directions together.
        batch_size: number of instances in a step.
        alpha: weight of nearness to the teacher, at least 0.
        gamma: weight of the labels, at least 0.
        temperature: `T`, above 0.
        rounds: number of ascending passes over `forget`.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if a number is out of range.
    """
    for name, number in (("alpha", alpha), ("gamma", gamma), ("rounds", rounds)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be at least 0, found {number}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    kept, gone = draws(retain, forget, batch_size, generator)
    teacher = copy.deepcopy(model)
    ascends = _alternation(-(-len(forget[0]) // batch_size), -(-len(retain[0]) // batch_size), rounds)

    def loss(step: int) -> Tensor:
        if next(ascends):
            x, _ = next(gone)
            return -divergence(answer(teacher, x), model(x), temperature)
        x, labels = next(kept)
        found = model(x)
        return alpha * divergence(answer(teacher, x), found, temperature) + gamma * F.cross_entropy(found, labels)

    descend(model, optimizer, steps, loss)


def divergence(wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `T^2 KL(softmax(wanted / T) || softmax(found / T))`, mean over the batch, in nats."""
    logp, logq = (logits.log_softmax(-1) for logits in (wanted / temperature, found / temperature))
    return F.kl_div(logq, logp, reduction="batchmean", log_target=True) * temperature**2


@torch.no_grad()
def answer(teacher: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of a teacher, in eval mode."""
    with evaluating(teacher):
        logits: Tensor = teacher(x)
    return logits


def _alternation(up: int, down: int, rounds: int) -> Iterator[bool]:
    """Yield True for ascent: passes over forget set (True) and retain set alternate; after some rounds all descend."""
    for _ in range(rounds):
        yield from [True] * up
        yield from [False] * down
    while True:
        yield False

"""Unlearning by adversarial examples: training on the model's own mistakes near the forget set."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.posthoc.descent import Examples, check_examples, cross_entropy, descend, draws
from treediff.core.checks import check_positive
from treediff.core.modes import evaluating

__all__ = ["adversarial_examples", "amun"]


def amun(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    radius: float = 0.1,
    rounds: int = 6,
    attack_steps: int = 50,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> None:
    """Descend on both sets and on adversarial copies of the forget set, labelled with the model's predictions.

    Training on the model's own mistakes near an instance lowers the surplus of confidence there and changes little
    elsewhere. Source: AMUN, Ebrahimpour-Boroojeny et al. (arXiv 2503.00917), algorithm 1, with access to the retain
    set.

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances of the union in a step.
        radius: see `adversarial_examples`.
        rounds: see `adversarial_examples`.
        attack_steps: `steps` of `adversarial_examples`.
        bounds: see `adversarial_examples`.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if a number is out of range.
    """
    check_examples(retain=retain, forget=forget)
    near, taken_for, found = adversarial_examples(
        model, forget, radius=radius, rounds=rounds, steps=attack_steps, batch_size=batch_size, bounds=bounds
    )
    parts = [retain, forget, (near[found], taken_for[found])]
    union = torch.cat([x for x, _ in parts]), torch.cat([labels for _, labels in parts])
    mixed = draws(union, forget, batch_size, generator)[0]
    descend(model, optimizer, steps, lambda step: cross_entropy(model, next(mixed)))


def adversarial_examples(
    model: nn.Module,
    examples: Examples,
    *,
    radius: float = 0.1,
    rounds: int = 6,
    steps: int = 50,
    batch_size: int = 128,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return near inputs `(n, ...)` that the model misclassifies, their classes `(n,)`, and a mask of successes `(n,)`.

    The method is projected gradient ascent on the loss inside of a Euclidean ball (Madry et al., arXiv 1706.06083).
    Ascent starts from the input itself, with steps of a tenth of the radius. The radius doubles in each round for
    inputs without an example so far. An input that the model misclassifies from the start is its own example.

    Args:
        model: from inputs to logits; in eval mode here.
        examples: inputs and labels.
        radius: of the first round, in units of the input, above 0.
        rounds: number of rounds.
        steps: number of steps in each round.
        batch_size: number of inputs attacked together.
        bounds: least and greatest number of an input, or None.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is out of range, or as for `fine_tune`.
    """
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be above 0, found {radius}")
    check_positive(rounds=rounds, steps=steps, batch_size=batch_size)
    check_examples(forget=examples)
    with evaluating(model):
        parts = [
            _attacked(model, x, labels, radius, rounds, steps, bounds)
            for x, labels in zip(examples[0].split(batch_size), examples[1].split(batch_size), strict=True)
        ]
    near, taken_for, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return near, taken_for, found


def _attacked(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    radius: float,
    rounds: int,
    steps: int,
    bounds: tuple[float, float] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    near, taken_for = x.clone(), _class_of(model, x)
    for number in range(rounds):
        left = (taken_for == labels).nonzero().squeeze(1)
        if not len(left):
            break
        moved = _ascended(model, x[left], labels[left], radius * 2**number, steps, bounds)
        found = _class_of(model, moved)
        wrong = found != labels[left]
        near[left[wrong]], taken_for[left[wrong]] = moved[wrong], found[wrong]
    return near, taken_for, taken_for != labels


def _ascended(
    model: nn.Module, x: Tensor, labels: Tensor, radius: float, steps: int, bounds: tuple[float, float] | None
) -> Tensor:
    """Return inputs after ascent on their loss; an input that has left its class stops, without further cost."""
    shape = (-1, *[1] * (x.ndim - 1))
    moved, left = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(steps):
        point = moved[left].requires_grad_()
        with torch.enable_grad():
            logits = model(point)
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels[left], reduction="sum"), point)
        inside = logits.argmax(-1) == labels[left]
        left, slope = left[inside], slope[inside]
        if not len(left):
            break
        length = slope.flatten(1).norm(dim=1).view(shape)
        away = moved[left] - x[left] + torch.where(length > 0, slope / length, 0.0) * (radius / 10)
        size = away.flatten(1).norm(dim=1).view(shape)
        ahead = x[left] + away * torch.where(size > radius, radius / size, 1.0)
        moved[left] = ahead if bounds is None else ahead.clamp(*bounds)
    return moved


@torch.no_grad()
def _class_of(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(x).argmax(-1)
    return found

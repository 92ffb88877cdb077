"""Dampening of the weights that matter more to the forget set than to both sets together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from munkey.posthoc.descent import Examples, check_examples, cross_entropy, weights_of
from treediff.core.checks import check_positive
from treediff.core.modes import evaluating

__all__ = ["importance", "ssd"]


def ssd(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    batch_size: int = 128,
    alpha: float = 10.0,
    lam: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Dampen weights selectively (SSD, Foster et al., arXiv 2308.07707, eq. 5 and 6), without any step of descent.

        theta_i <- min(lam I_i / F_i, 1) theta_i   where F_i > alpha I_i

    with the `importance` `F` of weights to the forget set and `I` to both sets together.

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change; the optimiser takes no step.
        steps: greatest number of batches of a set for its importance; all, if not given.
        batch_size: of these batches. With 1, importance is the diagonal of the empirical Fisher information; the
            authors' code has larger batches, whose mean gradients are squared.
        alpha: how many times more a weight must matter to the forget set, above 0.
        lam: greater values dampen less, above 0.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if a number is out of range.
    """
    for name, number in (("alpha", alpha), ("lam", lam)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0, found {number}")
    check_examples(retain=retain, forget=forget)
    check_positive(batch_size=batch_size, **({} if steps is None else {"steps": steps}))
    generator = generator or torch.Generator().manual_seed(0)
    weights = weights_of(optimizer)
    everything = torch.cat([retain[0], forget[0]]), torch.cat([retain[1], forget[1]])
    whole, gone = (
        importance(model, examples, weights, batch_size=batch_size, steps=steps, generator=generator)
        for examples in (everything, forget)
    )
    with torch.no_grad():
        for weight, ours, theirs in zip(weights, whole, gone, strict=True):
            factor = (lam * ours / theirs).clamp(max=1)  # where theirs is 0, no weight is selected
            weight.copy_(torch.where(theirs > alpha * ours, factor * weight, weight))


def importance(
    model: nn.Module,
    examples: Examples,
    weights: list[Tensor],
    *,
    batch_size: int,
    steps: int | None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return `mean over batches of (d L / d theta)^2`, of the shape of each weight, in eval mode.

    Args:
        model: from inputs to logits.
        examples: inputs and labels.
        weights: `theta`.
        batch_size: number of instances in a batch.
        steps: greatest number of batches; all, if not given.
        generator: draws batches.
    """
    squares, count = [torch.zeros_like(weight) for weight in weights], 0
    with evaluating(model):
        for rows in torch.randperm(len(examples[0]), generator=generator).split(batch_size):
            if count == steps:
                break
            own = rows.to(examples[0].device)
            loss = cross_entropy(model, (examples[0][own], examples[1][own]))
            for total, slope in zip(squares, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if slope is not None:
                    total += slope.square()
            count += 1
    return [total / count for total in squares]

"""Relabelling: training on wrong labels for the forget set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from munkey.posthoc.descent import Examples, check_examples, cross_entropy, descend, draws, weights_of
from treediff.core.modes import evaluating

__all__ = ["random_labels", "sal_un", "saliency", "wrong_labels"]


def random_labels(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> None:
    """Descend on the union of both sets, the forget set with random wrong labels (Graves et al., arXiv 2010.10981).

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set; each instance is given one wrong label, all wrong labels equally likely.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances of the union in a step.
        generator: draws labels and batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if there is one class only.
    """
    generator = generator or torch.Generator().manual_seed(0)
    mixed = draws(relabelled(model, retain, forget, generator), forget, batch_size, generator)[0]
    descend(model, optimizer, steps, lambda step: cross_entropy(model, next(mixed)))


def sal_un(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    share: float = 0.5,
    generator: torch.Generator | None = None,
) -> None:
    """Train the weights that matter to the forget set, with random labels (SalUn, Fan et al., arXiv 2310.12508).

    These weights have the greatest `|d L(forget) / d theta|`. All other weights stay equal, bit for bit, regardless of
    the optimiser.

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances in a step.
        share: of all elements of the optimiser's weights that may change, above 0, up to 1.
        generator: draws labels and batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `random_labels`, or if the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, found {share}")
    generator = generator or torch.Generator().manual_seed(0)
    mixed = draws(relabelled(model, retain, forget, generator), forget, batch_size, generator)[0]
    weights = weights_of(optimizer)
    masks = saliency(model, forget, weights, share, batch_size)
    before = [weight.detach().clone() for weight in weights]

    def hold(*_: object) -> None:
        with torch.no_grad():
            for weight, mask, old in zip(weights, masks, before, strict=True):
                weight.copy_(torch.where(mask, weight, old))

    hook = optimizer.register_step_post_hook(hold)
    try:
        descend(model, optimizer, steps, lambda step: cross_entropy(model, next(mixed)))
    finally:
        hook.remove()


def wrong_labels(labels: Tensor, classes: int, *, generator: torch.Generator) -> Tensor:
    """Return another label for each instance, `(n,)`, all wrong labels equally likely.

    Args:
        labels: `(n,)` int64.
        classes: number of classes, at least 2.
        generator: draws the labels.

    Raises:
        ValueError: if there is one class only.
    """
    if classes < 2:
        raise ValueError(f"a wrong label needs two classes or more, found {classes}")
    shift = torch.randint(1, classes, (len(labels),), generator=generator).to(labels.device)
    return (labels + shift) % classes


def relabelled(model: nn.Module, retain: Examples, forget: Examples, generator: torch.Generator) -> Examples:
    """Return both sets as one, the forget set with wrong labels."""
    check_examples(retain=retain, forget=forget)
    with torch.no_grad(), evaluating(model):
        classes = model(forget[0][:1]).shape[-1]
    wrong = wrong_labels(forget[1], classes, generator=generator)
    return torch.cat([retain[0], forget[0]]), torch.cat([retain[1], wrong])


def saliency(model: nn.Module, forget: Examples, weights: list[Tensor], share: float, batch_size: int) -> list[Tensor]:
    """Return a mask for each weight: where the gradient of the forget set's mean loss is among the greatest of all."""
    total = [torch.zeros_like(weight) for weight in weights]
    with evaluating(model):
        for x, labels in zip(forget[0].split(batch_size), forget[1].split(batch_size), strict=True):
            part = cross_entropy(model, (x, labels)) * len(x) / len(forget[0])
            for own, slope in zip(total, torch.autograd.grad(part, weights, allow_unused=True), strict=True):
                if slope is not None:
                    own += slope
    steepness = torch.cat([slope.abs().flatten() for slope in total])
    chosen = torch.zeros(len(steepness), dtype=torch.bool, device=steepness.device)
    chosen[steepness.topk(max(1, round(share * len(steepness)))).indices] = True
    parts = chosen.split([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]

"""Fine-tuning on the retain set, and ascent on the forget set.

Letters: `n` instances, `theta` weights, `L` mean cross-entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.store.checks import check_no_label_is_missing
from treediff.core.checks import check_positive

__all__ = [
    "Examples",
    "check_examples",
    "cross_entropy",
    "descend",
    "draws",
    "fine_tune",
    "l1_sparse",
    "neg_grad",
    "neg_grad_plus",
    "weights_of",
]

Examples: TypeAlias = tuple[Tensor, Tensor]
"""Inputs `(n, ...)` and labels `(n,)` int64."""


def fine_tune(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> None:
    """Descend on `L(retain)`: forgetting by neglect (the baseline of Golatkar et al., arXiv 1911.04933).

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set; not used here.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances of each set in a step.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: if labels are not int64, or a number is not whole.
        ValueError: if a set is empty or does not have one label for each input, or a number is out of range.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> x, y = torch.eye(2), torch.arange(2)
        >>> optimizer = torch.optim.SGD(model.parameters(), 1.0)
        >>> fine_tune(model, (x[:1], y[:1]), (x[1:], y[1:]), optimizer=optimizer, steps=10)
        >>> model(x[:1]).argmax().item()
        0
    """
    kept, _ = draws(retain, forget, batch_size, generator)
    descend(model, optimizer, steps, lambda step: cross_entropy(model, next(kept)))


def neg_grad(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> None:
    """Ascend on `L(forget)` (NegGrad, Golatkar et al., arXiv 1911.04933); `retain` is not used.

    Ascent has no natural end: too many steps destroy the model. Arguments and errors as for `fine_tune`.
    """
    _, gone = draws(retain, forget, batch_size, generator)
    descend(model, optimizer, steps, lambda step: -cross_entropy(model, next(gone)))


def neg_grad_plus(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    retain_weight: float = 0.95,
    generator: torch.Generator | None = None,
) -> None:
    """Descend on `a L(retain) - (1 - a) L(forget)` (NegGrad+, Kurmanji et al., arXiv 2302.09880).

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change.
        steps: number of steps.
        batch_size: number of instances of each set in a step.
        retain_weight: `a`, from 0 to 1.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if the weight is out of range.
    """
    if not 0 <= retain_weight <= 1:
        raise ValueError(f"retain_weight must be between 0 and 1, found {retain_weight}")
    kept, gone = draws(retain, forget, batch_size, generator)

    def loss(step: int) -> Tensor:
        ours, theirs = cross_entropy(model, next(kept)), cross_entropy(model, next(gone))
        return retain_weight * ours - (1 - retain_weight) * theirs

    descend(model, optimizer, steps, loss)


def l1_sparse(
    model: nn.Module,
    retain: Examples,
    forget: Examples,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    gamma: float = 5e-4,
    generator: torch.Generator | None = None,
) -> None:
    """Descend on `L(retain) + gamma (1 - t / steps) sum |theta|` at step `t` (Jia et al., arXiv 2304.04934).

    Fewer nonzero weights hold less of an instance. `forget` is not used.

    Args:
        model: from inputs to logits `(B, classes)`.
        retain: the retain set.
        forget: the forget set.
        optimizer: of the weights that may change, and that are made sparse.
        steps: number of steps.
        batch_size: number of instances in a step.
        gamma: of the penalty in the first step, at least 0.
        generator: draws batches; seed 0 if not given.

    Raises:
        TypeError: as for `fine_tune`.
        ValueError: as for `fine_tune`, or if `gamma` is out of range.
    """
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0, found {gamma}")
    kept, _ = draws(retain, forget, batch_size, generator)
    weights = weights_of(optimizer)

    def loss(step: int) -> Tensor:
        size = torch.stack([weight.abs().sum() for weight in weights]).sum()
        return cross_entropy(model, next(kept)) + gamma * (1 - step / steps) * size

    descend(model, optimizer, steps, loss)


# --- shared by all methods ------------------------------------------------------------------------------------


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[int], Tensor]) -> None:
    """Take steps down a loss, a function of the number of the step, in training mode."""
    check_positive(steps=steps)
    was_training = model.training
    model.train()
    try:
        for step in range(steps):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
    finally:
        optimizer.zero_grad()
        model.train(was_training)


def draws(
    retain: Examples, forget: Examples, batch_size: int, generator: torch.Generator | None
) -> tuple[Iterator[Examples], Iterator[Examples]]:
    """Return batches of both sets without end: each pass has every instance once, in random order."""
    check_examples(retain=retain, forget=forget)
    check_positive(batch_size=batch_size)
    generator = generator or torch.Generator().manual_seed(0)
    return _passes(retain, batch_size, generator), _passes(forget, batch_size, generator)


def check_examples(**sets: Examples) -> None:
    """Raise TypeError or ValueError as for `fine_tune`."""
    for name, (x, labels) in sets.items():
        if not len(x) or labels.shape != x.shape[:1]:
            raise ValueError(
                f"expected inputs (n, ...) to {name} and labels (n,), found {tuple(x.shape)} and {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"expected labels of torch.int64, found {labels.dtype}")
        check_no_label_is_missing(labels)


def cross_entropy(model: nn.Module, batch: Examples) -> Tensor:
    """Return the mean over a batch, in nats."""
    x, labels = batch
    return F.cross_entropy(model(x), labels)


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the weights that an optimiser may change, without frozen ones."""
    return [weight for group in optimizer.param_groups for weight in group["params"] if weight.requires_grad]


def _passes(examples: Examples, batch_size: int, generator: torch.Generator) -> Iterator[Examples]:
    x, labels = examples
    while True:
        parts = list(torch.randperm(len(x), generator=generator).split(batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:  # of a batch of one, a batch norm has no variance
            parts[-2:] = [torch.cat(parts[-2:])]
        for rows in parts:
            own = rows.to(x.device)
            yield x[own], labels[own]

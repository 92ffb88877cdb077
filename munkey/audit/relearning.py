"""Speed of relearning: forgotten instances that a model relearns faster than new instances were partly kept.

Letters: `n` instances, `T` steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from munkey.task import Classification, Task

__all__ = ["relearning_curve", "steps_to_reach"]


def relearning_curve(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    batch_size: int = 128,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Train a model, and return the mean cross-entropy `(T + 1,)` in nats before training and after each step.

    The mean is over all instances. For a retrained model (oracle), the curves of forgotten instances and of new
    instances of the same kind are alike. The curve of forgotten instances is lower where something was kept. **The
    model is trained**: pass a copy, and a new optimiser of this copy.

    Args:
        model: from inputs to logits; the optimiser decides which weights are trained.
        x: `(n, ...)` inputs to learn.
        labels: `(n,)` int64.
        optimizer: of the weights to train.
        steps: `T`.
        batch_size: number of instances in a step.
        generator: draws the batches; seed 0 if not given.

    Raises:
        ValueError: if there is no instance, or not one label of at least 0 for each instance.

    Examples:
        >>> model, x = torch.nn.Linear(2, 2), torch.eye(2)
        >>> optimizer = torch.optim.SGD(model.parameters(), 1.0)
        >>> curve = relearning_curve(model, x, torch.arange(2), optimizer=optimizer, steps=20)
        >>> steps_to_reach(curve, 0.5) < 20
        True
    """
    if not len(x) or labels.shape[:1] != x.shape[:1]:
        raise ValueError(f"expected instances with one label each, found {len(x)} and {tuple(labels.shape)}")
    found = getattr(model, "task", None)
    task = found if isinstance(found, Task) else Classification(int(labels.max()) + 1 if len(labels) else 1)
    labels = task.check(labels, len(x)).to(x.device)
    generator = generator or torch.Generator().manual_seed(0)
    curve = [_mean_loss(task, model, x, labels)]
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:batch_size].to(x.device)
        optimizer.zero_grad()
        task.losses(model(x[rows]), labels[rows]).mean().backward()
        optimizer.step()
        curve.append(_mean_loss(task, model, x, labels))
    return torch.stack(curve)


def steps_to_reach(curve: Tensor, loss: float) -> int | None:
    """Return the first step after which a curve `(T + 1,)` is at most `loss`; None if it never is.

    Args:
        curve: of `relearning_curve`.
        loss: in nats.
    """
    below = (curve <= loss).nonzero()
    return int(below[0]) if len(below) else None


@torch.no_grad()
def _mean_loss(task: Task, model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    parts = zip(x.split(512), labels.split(512), strict=True)
    return torch.cat([task.losses(model(a), b) for a, b in parts]).mean()

"""How fast a model learns back what it forgot: what it relearns sooner than what it never saw, it had kept.

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
    """`(T + 1,)` mean cross-entropy in nats of all instances before training and after each step.

    Curves of forgotten and of never-seen instances of the same kind are alike for a retrained oracle; that of forgotten
    ones is lower where something was kept. **The model is trained**: give a copy, and a fresh optimiser of that copy.

    Args:
        model: from inputs to logits; what it trains is up to the optimiser.
        x: `(n, ...)` inputs to learn.
        labels: `(n,)` int64.
        optimizer: of the weights that learn.
        steps: `T`.
        batch_size: how many are learned at each step.
        generator: draws the batches; seed 0 if not given.

    Raises:
        ValueError: if there is no instance, or not one label of at least 0 for each.

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
    """The first step after which a curve `(T + 1,)` is at most so high; None if it never is.

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

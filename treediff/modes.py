"""Training and evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every part is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):  # to say it again would throw away what banks have packed
        yield
        return
    model.eval()
    try:
        yield
    finally:
        # By `train`, for a module may tell it to parts that `modules` does not list; those above come first.
        for module, training in modes:
            module.train(training)

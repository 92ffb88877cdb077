"""Modes that code runs in: training and evaluation, with and without inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluating", "lasting"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode in this context; at the end every part is in its earlier mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # By `train`, for a module may pass the mode on to parts that `modules` does not list; parents come first.
        for module, training in modes:
            module.train(training)


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors usable after the call, in any mode of the caller; also a decorator.

    A tensor made in `torch.inference_mode()` can never be trained with, nor changed in place once that mode is left.
    Gradients are recorded here only where the caller records them.

    Examples:
        >>> with torch.inference_mode(), lasting():
        ...     kept = torch.zeros(2)
        >>> kept.is_inference()
        False
    """
    records = torch.is_grad_enabled()
    # Leaving inference mode, by itself, would also turn `no_grad` off.
    with torch.inference_mode(False), torch.set_grad_enabled(records):
        yield

"""Exponential moving averages of a model's weights, which often generate better than the last weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from treediff.core.modes import lasting

__all__ = ["EMA"]


class EMA:
    """Average `average <- decay average + (1 - decay) weight` after every step, with a warm-up.

    At step `n` the decay is `min(decay, (1 + n) / (10 + n))`, the rule of TensorFlow's moving averages. The first,
    useless weights soon count for nothing. Buffers are not averaged: the model keeps its own. Weights in half
    precision have averages in float32, because a step of a thousandth would be lost. An average that is made or used in
    `torch.inference_mode()` behaves like any other average afterwards.

    Args:
        model: the model to follow; parameters that are added to it later are not followed.
        decay: the decay in the long run, at least 0 and below 1.
        warm_up: whether the decay grows as above, or is the same from the first step.

    Raises:
        ValueError: if the decay is out of range.

    Attributes:
        own: the model's own weights while it has the averaged ones, otherwise None.
        before_load: functions without arguments that `load_state_dict` calls once a state fits, before any change. Code
            that edits averages by hand, such as a store that erases rows, adds a function that raises if an older state
            would bring back deleted rows. A copy of the average begins with no functions.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, decay=0.999)
        >>> ema.update()  # after each step of the optimiser
        >>> with ema.average():
        ...     y = model(torch.zeros(1, 2))
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, found {decay}")
        self.model, self.decay, self.warm_up = model, decay, warm_up
        self.steps = 0
        self.own: dict[str, Tensor] | None = None
        self.before_load: list[Callable[[], None]] = []
        with lasting():
            self.weights = {name: _precise(weight.detach()) for name, weight in model.named_parameters()}

    def __getstate__(self) -> dict[str, Any]:
        # The functions hold the original, not the copy.
        return {**self.__dict__, "before_load": []}

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the model's present weights.

        Raises:
            KeyError: if the model has lost a parameter, as a pruned tree has.
        """
        self._follow()
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warm_up else self.decay
        averages = list(self.weights.values())
        now = [weight.to(average.dtype) for weight, average in zip(self._now().values(), averages, strict=True)]
        torch._foreach_lerp_(averages, now, 1 - decay)

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring the averages to the device and precision that the model has now."""
        for name, weight in self._now().items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if (self.weights[name].device, self.weights[name].dtype) != (weight.device, dtype):
                self.weights[name] = self.weights[name].to(weight.device, dtype)

    @contextmanager
    def average(self) -> Iterator[None]:
        """Give the model the averaged weights in this context, and its own weights again at the end, also on errors."""
        outer = self.own
        with lasting():
            self.own = {name: weight.clone() for name, weight in self._now().items()}
        try:
            self._put(self.weights)
            yield
        finally:
            self._put(self.own)
            for weight in self.own.values():
                weight.zero_()  # freed memory keeps its content
            self.own = outer

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        now = self._now()
        for name, weight in weights.items():
            now[name].copy_(weight)

    def _now(self) -> dict[str, Tensor]:
        """Return the model's present weight for each average."""
        now = dict(self.model.named_parameters())
        gone = sorted(self.weights.keys() - now.keys())
        if gone:
            raise KeyError(f"the model has no parameter {gone[0]!r} any more; make a new EMA of a model that changed")
        return {name: now[name].detach() for name in self.weights}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name, and the number of steps, as tensors, which `safetensors` can save.

        Raises:
            ValueError: inside `average()`, where a checkpoint of the model would hold averages in place of its weights.
        """
        if self.own is not None:
            raise ValueError("the model has averaged weights now; save the state of a run outside of ema.average()")
        return {
            **{f"weights.{name}": weight for name, weight in self.weights.items()},
            "steps": torch.tensor(self.steps),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state; nothing is changed unless all of it fits and no function of `before_load` raises.

        Raises:
            ValueError: naming the weights that are missing, unknown, or of another shape. Errors of `before_load` are
                passed on unchanged.
        """
        expected = {f"weights.{name}": tuple(weight.shape) for name, weight in self.weights.items()} | {"steps": ()}
        found = {name: tuple(weight.shape) for name, weight in state.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            want, got = (shapes.get(wrong[0], "no such tensor") for shapes in (expected, found))
            raise ValueError(f"the state does not fit the model at {wrong[0]!r}: expected {want}, found {got}")
        for check in self.before_load:
            check()
        self.steps = int(state["steps"])
        for name, weight in self.weights.items():
            weight.copy_(state[f"weights.{name}"])


def _precise(weight: Tensor) -> Tensor:
    """Return a copy with at least the digits of float32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

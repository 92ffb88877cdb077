"""Denoisers and the steps of samplers: the levels at both ends of a step, and the images and estimates there.

`s` is the noisier and `t` the cleaner time of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["Denoiser", "Level", "Noise", "Progress", "Step", "levels_at"]


class Denoiser(Protocol):
    """Protocol of denoisers, callables that estimate the clean image under a schedule."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule of the times."""

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Return the estimate of `x_0`, shaped like `x_t`."""


Noise = Callable[[int], Tensor]


class Level(NamedTuple):
    """Level of noise: a time and the values of the schedule at this time, as plain numbers."""

    t: float
    log_alpha: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """`log(alpha^2 / sigma^2)`; infinite at the ends, where `alpha` or `sigma` is 0."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else 2 * (self.log_alpha - math.log(self.sigma))


_CLEAN = Level(t=0.0, log_alpha=0.0, alpha=1.0, sigma=0.0)


@dataclass(frozen=True, eq=False)
class Step:
    """Step of a sampler: all that a method needs to go from one time to the next.

    Args:
        s: level at the beginning of the step.
        t: level at the end of the step.
        x: the images at `s`.
        x0: the denoiser's estimate at `s`.
        history: level and estimate at the beginning of each earlier step, the newest first; at most `Sampler.kept`.
        denoiser: the denoiser, for methods that evaluate it again.
        noise: standard normal noise of this step, shaped like `x`; called at most once.
    """

    s: Level
    t: Level
    x: Tensor
    x0: Tensor
    history: tuple[tuple[Level, Tensor], ...]
    denoiser: Denoiser
    noise: Callable[[], Tensor]

    def towards(self, x0: Tensor, std: float = 0.0) -> Tensor:
        """Return `alpha_t x0 + sqrt(sigma_t^2 - std^2) eps` with `eps = (x - alpha_s x0) / sigma_s`.

        With `std = 0` this is the end of the probability flow under a constant estimate.
        """
        kept = math.sqrt(max(0.0, self.t.sigma**2 - std**2)) / self.s.sigma
        return kept * self.x + (self.t.alpha - kept * self.s.alpha) * x0

    def forward_variance(self) -> float:
        """Return `1 - alpha_s^2 / alpha_t^2`, the variance that the forward process adds from `t` to `s`."""
        return -math.expm1(2 * (self.s.log_alpha - self.t.log_alpha))

    def posterior_std(self) -> float:
        """Return the standard deviation of `q(x_t | x_s, x_0)`."""
        return self.t.sigma / self.s.sigma * math.sqrt(self.forward_variance())


@dataclass(frozen=True, eq=False)
class Progress:
    """Progress of a sampler after a step, for callbacks.

    Args:
        step: number of steps that are done.
        steps: number of all steps.
        t: the time that was reached.
        x: the images at that time.
        x0: the estimate of the clean images that the step used.
    """

    step: int
    steps: int
    t: float
    x: Tensor
    x0: Tensor


def levels_at(schedule: NoiseSchedule, times: Tensor) -> list[Level]:
    """Return the levels of a schedule at the times of a grid.

    Raises:
        ValueError: if times are not two or more numbers that decrease from at most 1 to at least 0.
    """
    times = times.detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()) or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            "times must be two or more numbers that decrease from at most 1 to at least 0; "
            f"found {times.tolist() if times.numel() < 8 else f'the shape {tuple(times.shape)}'}"
        )
    columns = (times, schedule.log_alpha(times), schedule.alpha(times), schedule.sigma(times))
    levels = [Level(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    if levels[-1].t == 0:
        levels[-1] = _CLEAN  # a custom schedule may leave some noise there
    return levels

"""One step of a sampler: where it begins and ends, what is known there, and what it may ask.

`s` is the noisier time of a step and `t` the cleaner one.
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
    """Anything that estimates the clean image under a schedule."""

    @property
    def schedule(self) -> NoiseSchedule:
        """How noise and time belong together."""

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """The estimate of `x_0`, shaped like `x_t`."""


Noise = Callable[[int], Tensor]


class Level(NamedTuple):
    """A time and what the schedule says of it, as plain numbers."""

    t: float
    log_alpha: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """`log(alpha^2 / sigma^2)`; infinite at the ends where one of the two is 0."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else 2 * (self.log_alpha - math.log(self.sigma))


_CLEAN = Level(t=0.0, log_alpha=0.0, alpha=1.0, sigma=0.0)


@dataclass(frozen=True, eq=False)
class Step:
    """All that a method needs to go from one time to the next.

    Args:
        s: where the step begins.
        t: where it ends.
        x: the images at `s`.
        x0: the denoiser's estimate there.
        before: where the last step began, and the estimate there; None in the first step.
        denoiser: for methods that ask again.
        noise: standard normal noise of this step, shaped like `x`; called at most once.
    """

    s: Level
    t: Level
    x: Tensor
    x0: Tensor
    before: tuple[Level, Tensor] | None
    denoiser: Denoiser
    noise: Callable[[], Tensor]

    def towards(self, x0: Tensor, std: float = 0.0) -> Tensor:
        """`alpha_t x0 + sqrt(sigma_t^2 - std^2) eps` with `eps = (x - alpha_s x0) / sigma_s`.

        With `std = 0` it is where the probability flow leads if the estimate stays as it is.
        """
        kept = math.sqrt(max(0.0, self.t.sigma**2 - std**2)) / self.s.sigma
        return kept * self.x + (self.t.alpha - kept * self.s.alpha) * x0

    def forward_variance(self) -> float:
        """`1 - alpha_s^2 / alpha_t^2`: what the forward process adds from `t` to `s`."""
        return -math.expm1(2 * (self.s.log_alpha - self.t.log_alpha))

    def posterior_std(self) -> float:
        """Standard deviation of `q(x_t | x_s, x_0)`."""
        return self.t.sigma / self.s.sigma * math.sqrt(self.forward_variance())


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is told after each step.

    Args:
        step: how many are done.
        steps: how many there are.
        t: the time that was reached.
        x: the images at that time.
        x0: the estimate of the clean images on which the step was built.
    """

    step: int
    steps: int
    t: float
    x: Tensor
    x0: Tensor


def levels_at(schedule: NoiseSchedule, times: Tensor) -> list[Level]:
    """What a schedule says of the times of a grid.

    Raises:
        ValueError: if they are not two or more numbers that decrease from at most 1 to at least 0.
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
        levels[-1] = _CLEAN  # whatever a schedule of the user's own has left there
    return levels

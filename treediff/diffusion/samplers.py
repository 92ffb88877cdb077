"""From noise to images: one loop, and for each method the step from one time to the next.

A sampler is called with a denoiser, noise and a grid of times (see `grids`), and returns images. It keeps no state:
called twice with the same arguments it gives the same images. A denoiser is anything with a `schedule` that, called as
`denoiser(x_t, t)`, returns its estimate of `x_0`, the mean `E[x_0 | x_t]` if it is perfect; a guided denoiser is a
denoiser too, so no sampler knows of guidance or of conditions.

`s` is the noisier time of a step and `t` the cleaner one. The last step, to `t = 0`, gives the denoiser's estimate
itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from treediff.diffusion.schedule import NoiseSchedule

__all__ = [
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "Denoiser",
    "HeunSampler",
    "Level",
    "Progress",
    "Sampler",
    "Step",
]


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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


class Sampler(ABC):
    """The loop that all samplers share."""

    #: Whether steps draw noise.
    stochastic: bool = False

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        times: Tensor,
        *,
        noise: Noise | None = None,
        callback: Callable[[Progress], object] | None = None,
    ) -> Tensor:
        """Take `x` from the first of some times to the last.

        Args:
            denoiser: estimates the clean image.
            x: `(B, *shape)`, what to start from: standard normal noise at `t = 1`, or images with the noise of
                `times[0]` on them.
            times: `(steps + 1,)`, decreasing; see `treediff.diffusion.grids`.
            noise: from the index of a step to standard normal noise shaped like `x`, such as a
                `treediff.noise.NoiseStream`; needed by stochastic samplers only.
            callback: told of each step, for progress and pictures; what it returns is ignored.

        Returns:
            `(B, *shape)` at the last time.

        Raises:
            TypeError: if a stochastic sampler is given no noise.
            ValueError: if times do not decrease from at most 1 to at least 0.
        """
        levels = _levels(denoiser.schedule, times)
        if self.stochastic and noise is None:
            raise TypeError(
                f"{self!r} draws noise at every step, but none was given; pass noise=NoiseStream(seed, index, shape), "
                "or choose a deterministic sampler"
            )
        before: tuple[Level, Tensor] | None = None
        for i, (s, t) in enumerate(pairwise(levels)):
            x0 = denoiser(x, s.t)
            x = self.step(Step(s, t, x, x0, before, denoiser, partial(noise or _no_noise, i)))
            before = s, x0
            if callback is not None:
                callback(Progress(i + 1, len(levels) - 1, t.t, x, x0))
        return x

    @abstractmethod
    def step(self, at: Step) -> Tensor:
        """The images at the end of a step."""

    def calls(self, steps: int) -> int:
        """Network calls in so many steps that end at the clean image."""
        return steps


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Denoising diffusion implicit models (Song et al., arXiv 2010.02502, eq. 12), of first order.

    `x_t = alpha_t x0 + sqrt(sigma_t^2 - std^2) eps + std z` with `eps = (x_s - alpha_s x0) / sigma_s` and
    `std = eta sigma_t / sigma_s sqrt(1 - alpha_s^2 / alpha_t^2)`.

    Args:
        eta: 0 for no new noise, 1 for as much as DDPM with the small variance.

    Raises:
        ValueError: if `eta` is not between 0 and 1.

    Examples:
        >>> DDIMSampler(eta=0.5).stochastic
        True
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, found {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether `eta` is above 0."""
        return self.eta > 0

    def step(self, at: Step) -> Tensor:
        """See the class."""
        std = self.eta * at.posterior_std()
        x = at.towards(at.x0, std)
        return x + std * at.noise() if std else x


@dataclass(frozen=True)
class DDPMSampler(Sampler):
    """Ancestral sampling (Ho et al., arXiv 2006.11239, algorithm 2), on any grid.

    The mean is that of `q(x_t | x_s, x0)` and the noise has the variance of that posterior (`small`), or that of the
    forward step, `1 - alpha_s^2 / alpha_t^2` (`large`). With the small one it is `DDIMSampler(eta=1)`.

    Args:
        variance: 'small' or 'large'.

    Raises:
        ValueError: if there is no such variance.
    """

    variance: Literal["small", "large"] = "small"
    stochastic = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance must be 'small' or 'large', found {self.variance!r}")

    def step(self, at: Step) -> Tensor:
        """See the class."""
        small = at.posterior_std()
        x = at.towards(at.x0, small)
        if at.t.sigma == 0:
            return x  # nothing is added to the clean image, with the large variance neither
        return x + at.noise() * (small if self.variance == "small" else math.sqrt(at.forward_variance()))


@dataclass(frozen=True)
class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M), of second order with one network call per step (Lu et al., arXiv 2211.01095, algorithm 2).

    `x_t = sigma_t / sigma_s x_s - alpha_t (exp(-h) - 1) D` with `h` the step in `log(alpha / sigma)` and
    `D = (1 + 1 / 2r) x0_s - 1 / 2r x0_before`, where `r` is the step before over this one. The first step and the one
    to the clean image, which is infinitely long, are of first order.
    """

    def step(self, at: Step) -> Tensor:
        """See the class."""
        x0, length = at.x0, at.t.log_snr - at.s.log_snr
        if at.before is not None and math.isfinite(length):
            level, earlier = at.before
            half_r = 0.5 * length / (at.s.log_snr - level.log_snr)  # 1 / 2r; 0 after a start where alpha is 0
            x0 = torch.lerp(earlier, x0, 1 + half_r)
        return at.towards(x0)


@dataclass(frozen=True)
class HeunSampler(Sampler):
    """Heun's method on the probability-flow equation, of second order with two calls per step.

    `d(x / alpha) / d(sigma / alpha) = (x / alpha - x0) / (sigma / alpha)`, trapezoidal rule (Karras et al., arXiv
    2206.00364, algorithm 1 without churn). The step to the clean image, and one from where nothing of it is left, are
    Euler's, which is DDIM's.
    """

    def step(self, at: Step) -> Tensor:
        """See the class."""
        s, t, euler = at.s, at.t, at.towards(at.x0)
        if t.sigma == 0 or s.alpha == 0:
            return euler
        noisy, clean = s.sigma / s.alpha, t.sigma / t.alpha
        slopes = (at.x / s.alpha - at.x0) / noisy + (euler / t.alpha - at.denoiser(euler, t.t)) / clean
        return t.alpha * (at.x / s.alpha + 0.5 * (clean - noisy) * slopes)

    def calls(self, steps: int) -> int:
        """Two per step, one for the last."""
        return 2 * steps - 1


def _levels(schedule: NoiseSchedule, times: Tensor) -> list[Level]:
    times = times.detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()) or times[0] > 1 or times[-1] < 0:
        raise ValueError(
            "times must be two or more numbers that decrease from at most 1 to at least 0; "
            f"found {times.tolist() if times.numel() < 8 else f'the shape {tuple(times.shape)}'}"
        )
    columns = (times, schedule.log_alpha(times), schedule.alpha(times), schedule.sigma(times))
    return [Level(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _no_noise(index: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")

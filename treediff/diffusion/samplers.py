"""Samplers, from noise to images: one loop, and for each method the step from one time to the next.

A sampler is called with a denoiser, noise and a grid of times (see `grids`), and returns images. A sampler has no
state: the same arguments give the same images. A denoiser is anything with a `schedule` that, called as
`denoiser(x_t, t)`, returns its estimate of `x_0`. The estimate of a perfect denoiser is the mean `E[x_0 | x_t]`. A
guided denoiser is a denoiser too, so samplers do not depend on guidance or on conditions.

`s` is the noisier and `t` the cleaner time of a step. The last step, to `t = 0`, gives the denoiser's estimate itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from treediff.core.checks import check_noise
from treediff.diffusion.denoiser import Denoiser, Level, Noise, Progress, Step, levels_at

__all__ = ["DDIMSampler", "DDPMSampler", "DPMSolver3Sampler", "DPMSolverSampler", "HeunSampler", "Sampler"]


class Sampler(ABC):
    """Base class of samplers: the loop over the times."""

    #: Whether steps draw noise.
    stochastic: bool = False
    #: Number of earlier estimates that a step reads, `Step.history`.
    kept: int = 0

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
        """Take `x` from the first time of a grid to the last.

        Args:
            denoiser: estimates the clean image.
            x: `(B, *shape)`, start of the chain: standard normal noise at `t = 1`, or images with added noise of
                `times[0]`.
            times: `(steps + 1,)`, decreasing; see `treediff.diffusion.grids`.
            noise: function from the index of a step to standard normal noise shaped like `x`, such as a
                `treediff.core.noise.NoiseStream`; needed by stochastic samplers only.
            callback: called after each step, for progress and pictures; the returned value is ignored.

        Returns:
            `(B, *shape)` at the last time.

        Raises:
            TypeError: if a stochastic sampler is given no noise, or noise of another dtype than `x`.
            ValueError: if times do not decrease from at most 1 to at least 0, or noise has another shape than `x`.
        """
        levels = levels_at(denoiser.schedule, times)
        if self.stochastic and noise is None:
            raise TypeError(
                f"{self!r} draws noise at every step, but none was given; pass noise=NoiseStream(seed, index, shape), "
                "or choose a deterministic sampler"
            )
        history: tuple[tuple[Level, Tensor], ...] = ()
        for i, (s, t) in enumerate(pairwise(levels)):
            x0 = denoiser(x, s.t)
            x = self.step(Step(s, t, x, x0, history, denoiser, partial(_drawn, noise or _no_noise, i, x)))
            history = ((s, x0), *history)[: self.kept]
            if callback is not None:
                callback(Progress(i + 1, len(levels) - 1, t.t, x, x0))
        return x

    @abstractmethod
    def step(self, at: Step) -> Tensor:
        """Return the images at the end of a step."""

    def calls(self, steps: int) -> int:
        """Return the number of network calls in `steps` steps that end at the clean image."""
        return steps


@dataclass(frozen=True)
class _WithEta(Sampler):
    """Sampler with a share `eta` of new noise, which may be 0."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, found {self.eta}")

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """True if `eta` is above 0."""
        return self.eta > 0

    def with_noise(self, at: Step, x0: Tensor) -> Tensor:
        """Step towards an estimate, with `eta` times the noise of the posterior."""
        std = self.eta * at.posterior_std()
        x = at.towards(x0, std)
        return x + std * at.noise() if std else x


@dataclass(frozen=True)
class DDIMSampler(_WithEta):
    """Sampler of denoising diffusion implicit models (Song et al., arXiv 2010.02502, eq. 12), of first order.

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

    def step(self, at: Step) -> Tensor:
        """Take one step of DDIM."""
        return self.with_noise(at, at.x0)


@dataclass(frozen=True)
class DDPMSampler(Sampler):
    """Ancestral sampler (Ho et al., arXiv 2006.11239, algorithm 2), on any grid.

    The mean is the mean of the posterior `q(x_t | x_s, x0)`. The noise has the variance of the posterior (`small`), or
    the variance of the forward step, `1 - alpha_s^2 / alpha_t^2` (`large`). With the small variance the sampler is
    `DDIMSampler(eta=1)`.

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
        """Take one step of DDPM."""
        small = at.posterior_std()
        x = at.towards(at.x0, small)
        if at.t.sigma == 0:
            return x  # the clean image gets no noise, not even with the large variance
        return x + at.noise() * (small if self.variance == "small" else math.sqrt(at.forward_variance()))


@dataclass(frozen=True)
class DPMSolverSampler(_WithEta):
    """DPM-Solver++(2M), of second order with one network call per step (Lu et al., arXiv 2211.01095, algorithm 2).

    A step is a DDIM step with `D = (1 + 1 / 2r) x0_s - 1 / 2r x0_before` in place of `x0`. Here `r` is the length of
    the previous step over the length of this step, both in `log(alpha / sigma)`. The first step is of first order, and
    so is the step to the clean image, which is infinitely long. With `eta = 1` the sampler is SDE-DPM-Solver++(2M)
    (appendix E of the same paper). New noise hides errors in the estimates of earlier steps, which matters for a
    network that is small or was trained for a short time.

    A step much longer than the previous step would extrapolate far: on a uniform grid the step to `schedule.first` has
    `1 / 2r` above 2. So `1 / 2r` is limited, by default to its value between equal steps, which it tends to on any
    smooth grid. The order stays the same, and results with few steps are better.

    Args:
        eta: 0 for no new noise, 1 for as much as DDPM with the small variance.
        limit: greatest `1 / 2r`; `math.inf` for the algorithm as it was published, 0 for first order.

    Raises:
        ValueError: if `eta` is not between 0 and 1, or the limit is negative.

    Examples:
        >>> DPMSolverSampler().stochastic
        False
    """

    limit: float = 0.5
    kept = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit >= 0:
            raise ValueError(f"limit must be at least 0, found {self.limit}")

    def step(self, at: Step) -> Tensor:
        """Take one step of DPM-Solver++(2M)."""
        x0, length = at.x0, at.t.log_snr - at.s.log_snr
        if at.history and math.isfinite(length):
            level, earlier = at.history[0]
            half_r = 0.5 * length / (at.s.log_snr - level.log_snr)  # 1 / 2r; 0 after a start where alpha is 0
            x0 = torch.lerp(earlier, x0, 1 + min(half_r, self.limit))
        return self.with_noise(at, x0)


@dataclass(frozen=True)
class DPMSolver3Sampler(Sampler):
    """DPM-Solver++(3M), of third order with one network call per step (Lu et al., arXiv 2211.01095).

    With `l = log(alpha / sigma)` and a step from `l_s` to `l_t` of length `h`, the probability flow is
    `x_t = sigma_t / sigma_s x_s + sigma_t int e^l x0(l) dl`. The estimate `x0(l)` is replaced by the polynomial through
    the last three estimates, and the integral is exact. So a step is a DDIM step towards the polynomial's mean under
    the weight `e^l`: `x0_s + E[u] f' + (E[u^2] - a E[u]) f''`, where `u = l - l_s` and `a = l_before - l_s < 0`. The
    divided differences of the estimates are `f'` and `f''`. With `w = 1 - e^-h` the moments are `E[u] = h / w - 1` and
    `E[u^2] = h^2 / w - 2 E[u]`. The code of diffusers halves the last term, which leaves second order.

    The first step evaluates the denoiser a second time, at its own end, and is of second order, as is the next step.
    A step more than a quarter longer than the previous step is a step of `DPMSolverSampler`. On smooth grids such steps
    are few, and the order stays the same. With fewer than about 20 steps the polynomial extrapolates far, and
    `DPMSolverSampler` can be more exact.

    Examples:
        >>> DPMSolver3Sampler().calls(20)
        21
    """

    kept = 2

    def step(self, at: Step) -> Tensor:
        """Take one step of DPM-Solver++(3M)."""
        start, length = at.s.log_snr / 2, (at.t.log_snr - at.s.log_snr) / 2
        if not math.isfinite(length):
            return at.towards(at.x0)
        known = [(level.log_snr / 2 - start, x0) for level, x0 in at.history if level.alpha > 0]
        if not known:
            known = [(length, at.denoiser(at.towards(at.x0), at.t.t))]
        (a, x0_a), *rest = known
        if length > 1.25 * abs(a):
            return DPMSolverSampler().step(at)
        whole = -math.expm1(-length)
        mean = length / whole - 1
        slope = (x0_a - at.x0) / a
        x0 = at.x0 + mean * slope
        for b, x0_b in rest:
            x0 = x0 + (length**2 / whole - (2 + a) * mean) * ((x0_b - at.x0) / b - slope) / (b - a)
        return at.towards(x0)

    def calls(self, steps: int) -> int:
        """Return the number of network calls: one per step, and a second one in the first step."""
        return steps + (steps > 1)


@dataclass(frozen=True)
class HeunSampler(Sampler):
    """Sampler by Heun's method on the probability-flow equation, of second order with two calls per step.

    `d(x / alpha) / d(sigma / alpha) = (x / alpha - x0) / (sigma / alpha)`, trapezoidal rule (Karras et al., arXiv
    2206.00364, algorithm 1 without churn). The step to the clean image, and a step from `alpha = 0`, are Euler steps,
    which are DDIM steps.
    """

    def step(self, at: Step) -> Tensor:
        """Take one step of Heun's method."""
        s, t, euler = at.s, at.t, at.towards(at.x0)
        if t.sigma == 0 or s.alpha == 0:
            return euler
        noisy, clean = s.sigma / s.alpha, t.sigma / t.alpha
        slopes = (at.x / s.alpha - at.x0) / noisy + (euler / t.alpha - at.denoiser(euler, t.t)) / clean
        return t.alpha * (at.x / s.alpha + 0.5 * (clean - noisy) * slopes)

    def calls(self, steps: int) -> int:
        """Return the number of network calls: two per step, and one for the last step."""
        return 2 * steps - 1


def _drawn(noise: Noise, index: int, x: Tensor) -> Tensor:
    drawn = noise(index)
    check_noise(drawn, x, "x")
    return drawn


def _no_noise(index: int) -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")

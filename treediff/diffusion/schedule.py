"""Schedules of noise: how fast an image turns into noise.

A schedule gives, for every time `t` in [0, 1], the factors of the image `x_0` and of the noise:

    x_t = alpha(t) x_0 + sigma(t) eps,    eps ~ N(0, I),    alpha^2 + sigma^2 = 1.

`t = 0` is the clean image (`alpha = 1`) and `t = 1` the noisiest. All schedules here preserve variance, so each
schedule is one decreasing function, kept as `log alpha`. This function gives `alpha`, `sigma`, the log-SNR
`log(alpha^2 / sigma^2)`, the derivatives, and the inverse from a log-SNR to its time. The inverse puts every schedule
on one axis, the continuous schedules here and the schedules of `T` steps (`treediff.diffusion.discrete`). Step `n` of
the literature, counted from 1, is `t = n / T`; libraries that count from 0 call this step timestep `n - 1`.

A schedule leaves open the prediction of the network (`parameterization`), the visited times (`grids`), and the step
from one time to the next (`samplers`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.checks import check_noise, check_times, float_advice

__all__ = [
    "CosineSchedule",
    "CustomSchedule",
    "LinearSchedule",
    "NoiseSchedule",
    "ScaledLinearSchedule",
    "SigmoidSchedule",
]


class NoiseSchedule(ABC):
    """Base class of schedules: one decreasing function `log alpha(t)` and everything that follows from it.

    Times are floating-point tensors of any shape with values in [0, 1], and results have that shape and dtype. Other
    dtypes are a TypeError. Other values and NaN are a ValueError where reading the values is free; a custom schedule
    calls `treediff.core.checks.check_times` for this in `log_alpha` and `d_log_alpha`. A schedule has no state: no
    method changes its results.
    """

    #: Number of knots of a discrete schedule, None for a continuous one.
    steps: int | None = None
    #: The least time at which a network is evaluated; from there one step leads to the clean image.
    first: float = 1e-3

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """Return `log alpha(t)`; 0 at `t = 0`, and `-inf` where nothing of the image is left."""

    @abstractmethod
    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of `log alpha` by `t`, which is minus half of the rate `beta(t)` of the diffusion."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time at which `log alpha` has a value; the nearest end for a value that is never reached."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the factor of the image."""
        check_times(t)
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Return the factor of the noise, which is its standard deviation."""
        check_times(t)
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """Return `log(alpha^2 / sigma^2)`, decreasing; infinite at `t = 0`."""
        check_times(t)
        log_alpha_squared = 2 * self.log_alpha(t)
        return log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))

    def d_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of `alpha` by `t`."""
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """Return the derivative of `sigma` by `t`; infinite at `t = 0`, where the noise begins."""
        # sigma sigma' = -alpha alpha', because the squares add up to 1.
        return -(2 * self.log_alpha(t)).exp() * self.d_log_alpha(t) / self.sigma(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time of a log-SNR; the nearest end of [0, 1] for a log-SNR that is never reached."""
        return self.time_of_log_alpha(-0.5 * F.softplus(-log_snr))

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """Return `alpha(t) x + sigma(t) noise`, the forward process in one step (Ho et al., arXiv 2006.11239, eq. 4).

        Args:
            x: `(B, *shape)`, clean.
            noise: standard normal, of the shape and dtype of `x`.
            t: `(B,)`, or one time for all; from 0, the data, to 1.

        Raises:
            TypeError: if `x` or `t` is not floating point, or noise has another dtype than `x`.
            ValueError: if noise has another shape than `x`, there is not one time for each row or for all, or a time is
                NaN or outside of [0, 1] (read on a CPU only).
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, found {x.dtype}; convert it with {float_advice(x.dtype)}")
        check_noise(noise, x, "x")
        check_times(t)
        if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
            raise ValueError(
                f"expected one time for all rows, a number, or one for each, shape ({len(x)},); found {tuple(t.shape)}"
            )
        # A time in half precision has too few digits.
        t = torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        t = t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t
        return self.alpha(t).to(x.dtype) * x + self.sigma(t).to(x.dtype) * noise

    @property
    def ends_in_noise(self) -> bool:
        """True if nothing of the image is left at `t = 1` (zero terminal SNR, Lin et al., arXiv 2305.08891)."""
        return float(self.log_alpha(torch.ones((), dtype=torch.float64, device="cpu"))) == -math.inf

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({settings})"


class LinearSchedule(NoiseSchedule):
    """Linear schedule, the continuous limit of DDPM's (Song et al., arXiv 2011.13456).

    `beta(t) = beta_min + t (beta_max - beta_min)` and `log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2`.

    Args:
        beta_min: rate at `t = 0`, per unit of time; 1000 times the first beta of 1000 discrete steps.
        beta_max: rate at `t = 1`.

    Raises:
        ValueError: if not `0 <= beta_min <= beta_max`, with `beta_max` above 0 and finite.

    Examples:
        >>> schedule = LinearSchedule()
        >>> t = torch.tensor([0.0, 0.5, 1.0])
        >>> schedule.alpha(t)
        tensor([1.0000, 0.2812, 0.0066])
        >>> schedule.time_of(schedule.log_snr(t))
        tensor([0.0000, 0.5000, 1.0000])
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        _check_rates(beta_min, beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return minus half of the integral of `beta`."""
        check_times(t)
        return -0.5 * t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return `-beta(t) / 2`."""
        check_times(t)
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the root of a quadratic equation, in the form that loses no digits near 0."""
        root = torch.sqrt(self.beta_min**2 - 4 * (self.beta_max - self.beta_min) * log_alpha)
        return _ratio(-4 * log_alpha, self.beta_min + root).clamp(0, 1)


class ScaledLinearSchedule(NoiseSchedule):
    """Schedule with a linear root of the rate: `sqrt(beta(t)) = sqrt(beta_min) + t (sqrt(beta_max) - sqrt(beta_min))`.

    The schedule is the continuous limit of the schedule of latent diffusion (Rombach et al., arXiv 2112.10752).

    Args:
        beta_min: rate at `t = 0`, per unit of time.
        beta_max: rate at `t = 1`; above `beta_min`.

    Raises:
        ValueError: if not `0 <= beta_min < beta_max`, or one is infinite.

    Examples:
        >>> ScaledLinearSchedule().log_snr(torch.tensor(0.5))
        tensor(-0.9545)
    """

    def __init__(self, beta_min: float = 0.85, beta_max: float = 12.0) -> None:
        _check_rates(beta_min, beta_max)
        if beta_min == beta_max:
            raise ValueError(
                f"beta_max must be above beta_min, found {beta_max} for both; LinearSchedule takes equal ones"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def _roots(self) -> tuple[float, float]:
        return math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return minus half of the integral of `beta`."""
        check_times(t)
        start, slope = self._roots()
        return -0.5 * t * (start**2 + start * slope * t + slope**2 * t**2 / 3)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return `-beta(t) / 2`."""
        check_times(t)
        start, slope = self._roots()
        return -0.5 * (start + slope * t) ** 2

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time from cube roots of `start^3 - 6 slope log_alpha`, in the form that loses no digits near 0."""
        start, slope = self._roots()
        grown = -6 * slope * log_alpha
        root = (start**3 + grown) ** (1 / 3)
        return (_ratio(grown, root**2 + root * start + start**2) / slope).clamp(0, 1)


class CosineSchedule(NoiseSchedule):
    """Cosine schedule (Nichol and Dhariwal, arXiv 2102.09672).

    `alpha(t) = cos(pi/2 (end t + s) / (1 + s)) / cos(pi/2 s / (1 + s))`.

    Args:
        s: offset that keeps the first steps from being too small.
        end: share of the curve that is reached at `t = 1`. At 1 nothing of the image is left, and a network that
            predicts noise cannot start there; just below 1 it can.

    Raises:
        ValueError: if `s` is below 0, or `end` not above 0 and at most 1.

    Examples:
        >>> CosineSchedule().alpha(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7050, 0.0064])
        >>> CosineSchedule().ends_in_noise, CosineSchedule(end=1.0).ends_in_noise
        (False, True)
    """

    def __init__(self, s: float = 0.008, end: float = 0.9959) -> None:
        if not (s >= 0 and math.isfinite(s) and 0 < end <= 1):
            raise ValueError(f"s must be at least 0 and end above 0 and at most 1, found s={s} and end={end}")
        self.s, self.end = s, end

    def _angles(self) -> tuple[float, float]:
        """Return the angle at `t = 0`, and the difference from this angle to a right angle."""
        return 0.5 * math.pi * self.s / (1 + self.s), 0.5 * math.pi / (1 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return `log alpha(t)` by the formula of the class."""
        check_times(t)
        start, way = self._angles()
        gone = way * self.end * t
        # Two forms of the same ratio: the first keeps its digits near the image, the second near the noise.
        near_image = torch.log1p(-2 * torch.sin(gone / 2) ** 2 - math.tan(start) * torch.sin(gone))
        near_noise = torch.log(torch.sin(way * (1 - self.end * t))) - math.log(math.cos(start))
        return torch.where(gone < 0.5, near_image, near_noise)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return `-slope tan(angle)`."""
        check_times(t)
        _, way = self._angles()
        return -way * self.end / torch.tan(way * (1 - self.end * t))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time from the arc cosine."""
        start, way = self._angles()
        cosine = (log_alpha.exp() * math.cos(start)).clamp(-1, 1)
        return ((torch.acos(cosine) - start) / (way * self.end)).clamp(0, 1)


class SigmoidSchedule(NoiseSchedule):
    """Sigmoid schedule, with `alpha^2(t)` on a logistic curve (Jabri et al., arXiv 2212.11972; Chen, arXiv 2301.10972).

    `alpha^2 = (g(1) - g(t)) / (g(1) - g(0))` with `g(t) = sigmoid((low + (high - low) end t) / tau)`; here `g(1)` is
    its value for `end = 1`.

    Args:
        low: position of `t = 0` on the curve.
        high: position of `t = 1` on the curve when `end` is 1.
        tau: temperature; larger is closer to a straight line.
        end: as for `CosineSchedule`.

    Raises:
        ValueError: if `high` is not above `low`, `tau` not above 0, or `end` not above 0 and at most 1.

    Examples:
        >>> SigmoidSchedule().alpha(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.7082, 0.0233])
    """

    def __init__(self, low: float = -3.0, high: float = 3.0, tau: float = 1.0, end: float = 0.9982) -> None:
        if not (math.isfinite(high - low) and high > low and tau > 0 and 0 < end <= 1):
            raise ValueError(
                "high must be above low, tau above 0, and end above 0 and at most 1; "
                f"found low={low}, high={high}, tau={tau} and end={end}"
            )
        self.low, self.high, self.tau, self.end = low, high, tau, end

    def _curve(self) -> tuple[float, float]:
        """Return the logit at `t = 0`, and the difference from this logit to the logit of the end."""
        return self.low / self.tau, (self.high - self.low) / self.tau

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return `log alpha(t)` by the formula of the class."""
        check_times(t)
        # g(b) - g(a) = (1 - exp(a - b)) g(b) g(-a); the choice of the end decides where digits are kept.
        start, way = self._curve()
        logit = start + way * self.end * t
        gone = torch.expm1(-way * self.end * t) * torch.sigmoid(logit) / (math.expm1(-way) * _logistic(start + way))
        left = torch.expm1(way * (self.end * t - 1)) * torch.sigmoid(-logit) / (math.expm1(-way) * _logistic(-start))
        return 0.5 * torch.where(gone < 0.5, torch.log1p(-gone), torch.log(left))

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative, from the derivative of the logistic curve."""
        check_times(t)
        start, way = self._curve()
        logit = start + way * self.end * t
        # g' / (g(1) - g) = slope g(logit) / ((1 - exp(logit - end)) g(end))
        return (
            0.5
            * way
            * self.end
            * torch.sigmoid(logit)
            / (torch.expm1(way * (self.end * t - 1)) * _logistic(start + way))
        )

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time from the logit."""
        start, way = self._curve()
        total = _logistic(start + way) - _logistic(start)
        logit = torch.logit(_logistic(start) - torch.expm1(2 * log_alpha) * total)
        return ((logit - start) / (way * self.end)).clamp(0, 1)


class CustomSchedule(NoiseSchedule):
    """Schedule given by its log-SNR, any decreasing and differentiable function of time.

    Derivatives come from autograd, and the inverse from 60 halvings of an interval.

    Args:
        log_snr: function from times in [0, 1], of any shape, to log-SNRs.

    Raises:
        ValueError: if the function does not decrease, checked at 257 times.

    Examples:
        >>> schedule = CustomSchedule(lambda t: 10 - 20 * t)
        >>> schedule.time_of(torch.tensor(0.0))
        tensor(0.5000)
    """

    def __init__(self, log_snr: Callable[[Tensor], Tensor]) -> None:
        values = log_snr(torch.linspace(0, 1, 257, dtype=torch.float64))
        if values.shape != (257,) or not bool((values.diff() < 0).all()):
            raise ValueError(
                "log_snr must take times of any shape and decrease from t = 0 to t = 1; "
                f"found values of shape {tuple(values.shape)}, {values.max().item():.4g} to {values.min().item():.4g}"
            )
        self.function = log_snr

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the value of the given function."""
        check_times(t)
        return self.function(t)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return `log alpha = -softplus(-log_snr) / 2`."""
        check_times(t)
        return -0.5 * F.softplus(-self.function(t))

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative by autograd, separately for each time."""
        check_times(t)
        with torch.enable_grad():
            times = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_alpha(times).sum(), times)
        return slope

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Find the time by halving [0, 1] until the dtype has no more digits."""
        low, high = torch.zeros_like(log_alpha), torch.ones_like(log_alpha)
        for _ in range(60):
            middle = 0.5 * (low + high)
            later = self.log_alpha(middle) > log_alpha
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return 0.5 * (low + high)


def _check_rates(beta_min: float, beta_max: float) -> None:
    if not 0 <= beta_min <= beta_max < math.inf or beta_max == 0:
        raise ValueError(
            f"rates must be 0 <= beta_min <= beta_max, with beta_max above 0; found {beta_min} and {beta_max}"
        )


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return a ratio that is 0 where both numbers are 0, and 1 or more where both are infinite."""
    ratio = torch.where(numerator == 0, 0.0, numerator / torch.where(numerator == 0, 1.0, denominator))
    return torch.where(numerator == math.inf, math.inf, ratio)

"""Schedules with a value at every time, each from a formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.checks import check_times
from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["CosineSchedule", "CustomSchedule", "LinearSchedule", "ScaledLinearSchedule", "SigmoidSchedule"]


class LinearSchedule(NoiseSchedule):
    """`beta(t) = beta_min + t (beta_max - beta_min)`: the continuous limit of DDPM's (Song et al., arXiv 2011.13456).

    `log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2`.

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
        """See the class."""
        check_times(t)
        return -0.5 * t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """`-beta(t) / 2`."""
        check_times(t)
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The root of a quadratic equation, in the form that loses no digits near 0."""
        root = torch.sqrt(self.beta_min**2 - 4 * (self.beta_max - self.beta_min) * log_alpha)
        return _ratio(-4 * log_alpha, self.beta_min + root).clamp(0, 1)


class ScaledLinearSchedule(NoiseSchedule):
    """The root of the rate is linear: `sqrt(beta(t)) = sqrt(beta_min) + t (sqrt(beta_max) - sqrt(beta_min))`.

    The continuous limit of the schedule of latent diffusion (Rombach et al., arXiv 2112.10752).

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
        """Minus half of the integral of `beta`."""
        check_times(t)
        start, slope = self._roots()
        return -0.5 * t * (start**2 + start * slope * t + slope**2 * t**2 / 3)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """`-beta(t) / 2`."""
        check_times(t)
        start, slope = self._roots()
        return -0.5 * (start + slope * t) ** 2

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Cube roots of `start^3 - 6 slope log_alpha`, as a difference that loses no digits near 0."""
        start, slope = self._roots()
        grown = -6 * slope * log_alpha
        root = (start**3 + grown) ** (1 / 3)
        return (_ratio(grown, root**2 + root * start + start**2) / slope).clamp(0, 1)


class CosineSchedule(NoiseSchedule):
    """`alpha(t) = cos(pi/2 (end t + s) / (1 + s)) / cos(pi/2 s / (1 + s))` (Nichol and Dhariwal, arXiv 2102.09672).

    Args:
        s: offset that keeps the first steps from being too small.
        end: how far along its way the schedule is at `t = 1`. At 1 nothing of the image is left, and a network that
            predicts noise cannot start there; just below, it can.

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
        """The angle at `t = 0`, and the way from there to a right angle."""
        return 0.5 * math.pi * self.s / (1 + self.s), 0.5 * math.pi / (1 + self.s)

    def log_alpha(self, t: Tensor) -> Tensor:
        """See the class."""
        check_times(t)
        start, way = self._angles()
        gone = way * self.end * t
        # Two forms of the same ratio: one keeps its digits near the image, the other near the noise.
        near_image = torch.log1p(-2 * torch.sin(gone / 2) ** 2 - math.tan(start) * torch.sin(gone))
        near_noise = torch.log(torch.sin(way * (1 - self.end * t))) - math.log(math.cos(start))
        return torch.where(gone < 0.5, near_image, near_noise)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """`-slope tan(angle)`."""
        check_times(t)
        _, way = self._angles()
        return -way * self.end / torch.tan(way * (1 - self.end * t))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """By the arc of the cosine."""
        start, way = self._angles()
        cosine = (log_alpha.exp() * math.cos(start)).clamp(-1, 1)
        return ((torch.acos(cosine) - start) / (way * self.end)).clamp(0, 1)


class SigmoidSchedule(NoiseSchedule):
    """`alpha^2(t)` falls along a logistic curve (Jabri et al., arXiv 2212.11972; Chen, arXiv 2301.10972).

    `alpha^2 = (g(1) - g(t)) / (g(1) - g(0))` with `g(t) = sigmoid((low + (high - low) end t) / tau)`; here `g(1)` is
    that of `end = 1`.

    Args:
        low: where on the curve `t = 0` lies.
        high: where `t = 1` lies when `end` is 1.
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
        """The logit at `t = 0`, and the way from there to the logit of the end."""
        return self.low / self.tau, (self.high - self.low) / self.tau

    def log_alpha(self, t: Tensor) -> Tensor:
        """See the class."""
        check_times(t)
        # g(b) - g(a) = (1 - exp(a - b)) g(b) g(-a); which end it is taken from decides where digits are kept.
        start, way = self._curve()
        logit = start + way * self.end * t
        gone = torch.expm1(-way * self.end * t) * torch.sigmoid(logit) / (math.expm1(-way) * _logistic(start + way))
        left = torch.expm1(way * (self.end * t - 1)) * torch.sigmoid(-logit) / (math.expm1(-way) * _logistic(-start))
        return 0.5 * torch.where(gone < 0.5, torch.log1p(-gone), torch.log(left))

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """By the derivative of the logistic curve."""
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
        """By the logit."""
        start, way = self._curve()
        total = _logistic(start + way) - _logistic(start)
        logit = torch.logit(_logistic(start) - torch.expm1(2 * log_alpha) * total)
        return ((logit - start) / (way * self.end)).clamp(0, 1)


class CustomSchedule(NoiseSchedule):
    """A schedule given by its log-SNR, any decreasing and differentiable function of time.

    Derivatives come from autograd, and the way back from 60 halvings of an interval.

    Args:
        log_snr: from times in [0, 1], of any shape, to log-SNRs.

    Raises:
        ValueError: if the function does not decrease, seen at 257 times.

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
        """The function itself."""
        check_times(t)
        return self.function(t)

    def log_alpha(self, t: Tensor) -> Tensor:
        """`log alpha = -softplus(-log_snr) / 2`."""
        check_times(t)
        return -0.5 * F.softplus(-self.function(t))

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """By autograd, one time apart from the other."""
        check_times(t)
        with torch.enable_grad():
            times = t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_alpha(times).sum(), times)
        return slope

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """By halving [0, 1] until the dtype has no more digits."""
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
    """A ratio that is 0 where both are, and 1 or more where both are infinite."""
    ratio = torch.where(numerator == 0, 0.0, numerator / torch.where(numerator == 0, 1.0, denominator))
    return torch.where(numerator == math.inf, math.inf, ratio)

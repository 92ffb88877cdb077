"""Schedules of finitely many steps, as in DDPM: knots at `t = n / T`, interpolated so that any time has a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from treediff.core.checks import check_times
from treediff.core.modes import lasting
from treediff.core.noise import widest
from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["DiscreteSchedule", "rescale_zero_terminal_snr"]


class DiscreteSchedule(NoiseSchedule):
    """Schedule of `T` steps, given by their betas.

    `alpha^2` at knot `n` is the product of `1 - beta` over the first `n` betas (Ho et al., arXiv 2006.11239, eq. 4).
    Between knots `alpha` is linear in time. So times need not be whole steps, while the values at the knots are exactly
    the values from the betas.

    Args:
        betas: `(T,)`, the variance that each step adds: above 0 and below 1, or 1 for the last step to leave nothing of
            the image.

    Raises:
        ValueError: if betas are not a list of such numbers.

    Examples:
        >>> schedule = DiscreteSchedule.linear(1000)
        >>> schedule.alpha(torch.tensor([0.0, 0.5, 1.0]))
        tensor([1.0000, 0.2803, 0.0064])
    """

    steps: int

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a list of numbers, one per step; found the shape {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()) or bool((betas[:-1] == 1).any()):
            raise ValueError(
                "betas must be above 0 and below 1, the last one at most 1; "
                f"found numbers from {betas.min().item():.4g} to {betas.max().item():.4g}"
            )
        with lasting():
            knots = torch.cat([betas.new_zeros(1), 0.5 * torch.log1p(-betas).cumsum(0)])
        self._knots = {torch.device("cpu"): knots}
        self.steps = len(betas)
        self.first = 1 / self.steps

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
        """Build a schedule with betas on a straight line, as in DDPM (Ho et al., arXiv 2006.11239, section 4)."""
        return cls(torch.linspace(beta_start, beta_end, _steps(steps), dtype=torch.float64, device="cpu"))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 0.012) -> DiscreteSchedule:
        """Build a schedule with roots of betas on a line, as in latent diffusion (Rombach et al., arXiv 2112.10752)."""
        line = torch.linspace(
            math.sqrt(beta_start), math.sqrt(beta_end), _steps(steps), dtype=torch.float64, device="cpu"
        )
        return cls(line**2)

    @classmethod
    def sampled(cls, schedule: NoiseSchedule, steps: int = 1000, max_beta: float = 0.999) -> DiscreteSchedule:
        """Sample a continuous schedule at `steps` knots.

        `CosineSchedule(end=1.0)` gives the schedule of improved DDPM.

        Args:
            schedule: the continuous schedule.
            steps: number of knots, `T`.
            max_beta: greatest variance that a step adds, so that something of the image is left at the end.

        Raises:
            TypeError: if `steps` is not a whole number.
            ValueError: if `steps` is below 1.

        Examples:
            >>> from treediff.diffusion.schedule import CosineSchedule
            >>> DiscreteSchedule.sampled(CosineSchedule(end=1.0), 4).alpha(torch.tensor([0.5, 1.0]))
            tensor([0.7027, 0.0120])
        """
        knots = schedule.log_alpha(torch.arange(_steps(steps) + 1, dtype=torch.float64, device="cpu") / steps)
        return cls((-torch.expm1(2 * knots.diff())).clamp(max=max_beta))

    def betas(self) -> Tensor:
        """Return the betas, `(T,)` in float64."""
        return -torch.expm1(2 * self._knots[torch.device("cpu")].diff())

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._knots:
            with torch.inference_mode(False):  # the table outlives this context
                self._knots[device] = self._knots[torch.device("cpu")].to(device, widest(device))
        return self._knots[device]

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the knots before and after a time, and the share of the segment before the time."""
        check_times(t)
        knots, position = self._table(t.device), t.to(widest(t.device)) * self.steps
        below = position.floor().clamp(0, self.steps - 1).to(torch.int64)
        # A whole step may come out as 6.9999999 or 7.0000001: a float32 time has no more digits.
        return knots[below], knots[below + 1], _snapped(position - below, t.dtype, self.steps)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return `log alpha`, with `alpha` linear between knots."""
        before, after, share = self._segment(t)
        between = before + torch.log1p(share * torch.expm1(after - before))
        return torch.where(share == 1, after, between).to(t.dtype)

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative in the segment that follows the time; at `t = 1`, in the last segment."""
        before, after, share = self._segment(t)
        change = torch.expm1(after - before)
        return (self.steps * change / (1 + share * change)).to(t.dtype)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Find the time by a search among the knots, then along the straight line."""
        knots, value = self._table(log_alpha.device), log_alpha.to(widest(log_alpha.device))
        after = torch.searchsorted(-knots, -value).clamp(1, self.steps)
        before = knots[after - 1]
        share = (torch.expm1(value - before) / torch.expm1(knots[after] - before)).clamp(0, 1)
        return ((after - 1 + share) / self.steps).to(log_alpha.dtype)

    def __repr__(self) -> str:
        betas = self.betas()
        return f"DiscreteSchedule(steps={self.steps}, betas from {betas[0].item():.4g} to {betas[-1].item():.4g})"


def rescale_zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """Shift and stretch `alpha` so that nothing of the image is left at the end and the first step is unchanged.

    (Lin et al., arXiv 2305.08891, algorithm 1.) At such an end predicted noise does not determine the image; use the
    prediction 'v' or 'x0'.

    Raises:
        ValueError: if the schedule has one step, which cannot be unchanged and end in noise.

    Examples:
        >>> rescale_zero_terminal_snr(DiscreteSchedule.linear(1000)).ends_in_noise
        True
    """
    if schedule.steps < 2:
        raise ValueError("a schedule of one step cannot keep its first step and end in noise; give it at least 2 steps")
    alpha = schedule.alpha(torch.arange(1, schedule.steps + 1, dtype=torch.float64, device="cpu") / schedule.steps)
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    previous = torch.cat([alpha.new_ones(1), alpha[:-1]])
    return DiscreteSchedule(1 - (alpha / previous) ** 2)


def _steps(steps: int) -> int:
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"steps must be a whole number, found {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    return int(steps)


def _snapped(share: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """Snap shares of a segment to its ends where they differ from an end by rounding only."""
    slack = min(0.5, 2 * steps * torch.finfo(dtype).eps)  # half precision has no digits between two of many steps
    share = torch.where(share < slack, 0.0, share)
    return torch.where(share > 1 - slack, 1.0, share)

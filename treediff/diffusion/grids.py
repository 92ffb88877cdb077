"""Grids: the times that a sampler visits, from the noisiest to the clean image.

A grid is a tensor of `steps + 1` decreasing times in float64, from `start` (1 by default) to 0. A network is evaluated
at all times but the last. So `steps` is the number of steps and, for samplers with one evaluation per step, of network
calls. The last call is at `schedule.first`, or for `trailing` at a noisier time; a grid always has both ends.

The times of a discrete schedule are whole steps `n / T` and all different.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor

from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["GRIDS", "Grid", "karras", "quadratic", "trailing", "uniform"]

Grid = Callable[..., Tensor]


def uniform(schedule: NoiseSchedule, steps: int, *, start: float = 1.0) -> Tensor:
    """Return times at equal distances from `start` to `schedule.first`, then 0.

    Args:
        schedule: the noise schedule.
        steps: number of steps.
        start: noisiest time; below 1 for a chain that begins with a noised image.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: if `steps` is below 1, more than a discrete schedule has, or `start` is not a time after the first.

    Examples:
        >>> from treediff.diffusion.discrete import DiscreteSchedule
        >>> uniform(DiscreteSchedule.linear(10), 4)
        tensor([1.0000, 0.7000, 0.4000, 0.1000, 0.0000], dtype=torch.float64)
    """
    _check(schedule, steps, start)
    return _finished(schedule, torch.linspace(start, schedule.first, steps, dtype=torch.float64), start)


def trailing(schedule: NoiseSchedule, steps: int, *, start: float = 1.0) -> Tensor:
    """Return times at equal distances from `start` to 0 (Lin et al., arXiv 2305.08891).

    The last call is a whole step before the end. Arguments and errors are as for `uniform`.

    Examples:
        >>> from treediff.diffusion.schedule import LinearSchedule
        >>> trailing(LinearSchedule(), 4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    _check(schedule, steps, start)
    return _finished(schedule, start * torch.arange(steps, 0, -1, dtype=torch.float64) / steps, start)


def quadratic(schedule: NoiseSchedule, steps: int, *, start: float = 1.0) -> Tensor:
    """Return times whose roots have equal distances: more steps near the image (Song et al., arXiv 2010.02502, D.2).

    Arguments and errors are as for `uniform`.

    Examples:
        >>> from treediff.diffusion.discrete import DiscreteSchedule
        >>> quadratic(DiscreteSchedule.linear(100), 3)
        tensor([1.0000, 0.3000, 0.0100, 0.0000], dtype=torch.float64)
    """
    _check(schedule, steps, start)
    return _finished(schedule, torch.linspace(start**0.5, schedule.first**0.5, steps, dtype=torch.float64) ** 2, start)


def karras(schedule: NoiseSchedule, steps: int, *, start: float = 1.0, rho: float = 7.0) -> Tensor:
    """Return times at equal distances of `(sigma / alpha)^(1 / rho)` (Karras et al., arXiv 2206.00364, eq. 5).

    Args:
        schedule: the noise schedule.
        steps: number of steps.
        start: noisiest time.
        rho: strength of the concentration of steps near the image.

    Raises:
        TypeError: if `steps` is not a whole number.
        ValueError: as for `uniform`, and if the schedule has nothing of the image left at `start`, where
            `sigma / alpha` is infinite.

    Examples:
        >>> from treediff.diffusion.schedule import LinearSchedule
        >>> karras(LinearSchedule(), 3)
        tensor([1.0000, 0.5921, 0.0010, 0.0000], dtype=torch.float64)
    """
    _check(schedule, steps, start)
    ends = schedule.log_snr(torch.tensor([start, schedule.first], dtype=torch.float64))
    if torch.isinf(ends[0]):
        raise ValueError(
            f"karras needs a finite sigma / alpha, but the schedule has nothing of the image left at t = {start:g}; "
            "choose another grid, an earlier start, or a schedule that stops before"
        )
    noisy, clean = torch.exp(-0.5 * ends / rho)
    ratio = torch.linspace(0, 1, steps, dtype=torch.float64) * (clean - noisy) + noisy
    times = schedule.time_of(-2 * rho * ratio.log())
    times[0], times[-1] = start, (schedule.first if steps > 1 else start)
    return _finished(schedule, times, start)


#: The grids by name.
GRIDS: dict[str, Grid] = {"uniform": uniform, "trailing": trailing, "quadratic": quadratic, "karras": karras}


def _check(schedule: NoiseSchedule, steps: int, start: float) -> None:
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"steps must be a whole number, found {steps!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    # One step from the first time is enough; in a schedule of one step the first time is also the last.
    if not schedule.first <= start <= 1 or (start == schedule.first and steps > 1 and schedule.steps is None):
        raise ValueError(f"start must be a time after {schedule.first:g} and at most 1, found {start}")
    if schedule.steps is not None and steps > (most := round(start * schedule.steps)):
        raise ValueError(f"steps must be at most {most}, the steps of the schedule up to t = {start:g}, found {steps}")


def _finished(schedule: NoiseSchedule, times: Tensor, start: float) -> Tensor:
    """Round to whole steps where the schedule has them, keep all times different, and end at 0."""
    if schedule.steps is not None:
        knots = (times.flip(0) * schedule.steps).round()
        order = torch.arange(len(knots), dtype=torch.float64)
        # From the clean end each time is at least a step after the previous time, and no time leaves the range.
        knots = (knots.clamp(min=1) - order).cummax(0).values + order
        last = round(start * schedule.steps)
        knots = torch.minimum(knots, last - order.flip(0))
        times = knots.flip(0) / schedule.steps
    return torch.cat([times, times.new_zeros(1)])

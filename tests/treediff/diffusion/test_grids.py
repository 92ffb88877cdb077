"""Grids of times: both ends, all different, and the same as in diffusers and in Karras et al."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from treediff.diffusion.discrete import DiscreteSchedule, rescale_zero_terminal_snr
from treediff.diffusion.grids import GRIDS, Grid, karras, quadratic, trailing, uniform
from treediff.diffusion.schedule import CosineSchedule, LinearSchedule, NoiseSchedule

every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
SCHEDULES: list[NoiseSchedule] = [LinearSchedule(), CosineSchedule(), DiscreteSchedule.linear(40, 1e-3, 0.2)]


@every_grid
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@given(steps=st.integers(1, 40), start=st.sampled_from([1.0, 0.5, 0.05]))
def test_both_ends_and_all_different(grid: Grid, schedule: NoiseSchedule, steps: int, start: float) -> None:
    if schedule.steps is not None:
        steps = min(steps, round(start * schedule.steps))
    times = grid(schedule, steps, start=start)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert times[0] == pytest.approx(start)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    if steps > 1 and grid is not trailing:
        assert times[-2] == pytest.approx(schedule.first)
    if schedule.steps is not None:
        knots = times * schedule.steps
        torch.testing.assert_close(knots, knots.round(), rtol=0, atol=1e-9)


@every_grid
def test_all_steps_of_a_discrete_schedule(grid: Grid) -> None:
    schedule = DiscreteSchedule.linear(100)
    everything = torch.arange(100, -1, -1, dtype=torch.float64) / 100
    torch.testing.assert_close(grid(schedule, 100), everything, rtol=0, atol=0)


def equal_distances(values: Tensor) -> None:
    steps = values.diff()
    torch.testing.assert_close(steps, steps[0].expand_as(steps), rtol=1e-6, atol=1e-9)


def test_what_is_equally_spaced() -> None:
    schedule = CosineSchedule()
    equal_distances(uniform(schedule, 9)[:-1])
    equal_distances(trailing(schedule, 9))
    equal_distances(quadratic(schedule, 9)[:-1].sqrt())
    for rho in (1.0, 3.0, 7.0):
        times = karras(schedule, 9, rho=rho)[:-1]
        equal_distances((schedule.sigma(times) / schedule.alpha(times)) ** (1 / rho))


def test_diffusers_chooses_the_same_timesteps() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = DiscreteSchedule.linear(1000)
    for spacing, grid, many in (
        ("linspace", uniform, (4, 28, 38, 112, 1000)),  # 999 divides evenly; halves may be rounded either way
        ("trailing", trailing, (1, 2, 7, 20, 33, 999, 1000)),
    ):
        for steps in many:
            scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            assert torch.equal((grid(schedule, steps)[:-1] * 1000 - 1).round().to(torch.int64), scheduler.timesteps)


@every_grid
@pytest.mark.parametrize(
    ("steps", "start", "error", "message"),
    [
        (0, 1.0, ValueError, "steps must be at least 1, found 0"),
        (2.5, 1.0, TypeError, r"steps must be a whole number, found 2\.5"),
        (True, 1.0, TypeError, "steps must be a whole number, found True"),
        (3, 1.5, ValueError, r"start must be a time after 0\.1 and at most 1, found 1\.5"),
        (1, 0.05, ValueError, r"start must be a time after 0\.1 and at most 1, found 0\.05"),
        (3, 0.1, ValueError, r"steps must be at most 1, the steps of the schedule up to t = 0\.1, found 3"),
        (11, 1.0, ValueError, "steps must be at most 10, the steps of the schedule up to t = 1, found 11"),
        (6, 0.5, ValueError, r"steps must be at most 5, the steps of the schedule up to t = 0\.5, found 6"),
    ],
)
def test_bad_settings(grid: Grid, steps: int, start: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grid(DiscreteSchedule.linear(10, 0.01, 0.3), steps, start=start)


@pytest.mark.parametrize("schedule", [CosineSchedule(end=1.0), rescale_zero_terminal_snr(DiscreteSchedule.linear(10))])
def test_karras_where_nothing_is_left(schedule: NoiseSchedule) -> None:
    with pytest.raises(ValueError, match=r"nothing of the image left at t = 1; choose another grid, an earlier start"):
        karras(schedule, 5)
    assert karras(schedule, 3, start=0.9)[0] == pytest.approx(0.9)

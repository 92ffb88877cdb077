"""Times outside of [0, 1] and noise that would broadcast are refused at every door that takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from models import GROWN, build, observations
from pairs import conditions, images, small
from test_schedule import SCHEDULES
from torch import Tensor
from worlds import seeded

from treediff.core.checks import check_noise, check_times
from treediff.core.noise import NoiseStream
from treediff.diffusion import DDPMSampler, ReconstructionConcat, TreeCondition, UNet, target
from treediff.diffusion.grids import GRIDS
from treediff.diffusion.guidance import ClippedDenoiser, GuidedDenoiser
from treediff.diffusion.schedule import NoiseSchedule
from treediff.diffusion.unet_blocks import TimestepEmbedding
from treediff.testing import ExactDenoiser, GaussianMixture
from treediff.tree.probability import reparameterize

NAN = float("nan")
OUTSIDE = (-0.01, 1.01, 500.0, NAN, float("inf"))
MEANS = r"must lie in \[0, 1\], where 0 is the data and 1 is nothing but noise, found .*; step n of T .* t = n / T"


class Own(NoiseSchedule):
    """A user's schedule, which checks nothing itself."""

    def log_alpha(self, t: Tensor) -> Tensor:
        return -t

    def d_log_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return -log_alpha


def schedule_doors() -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    names = ("log_alpha", "d_log_alpha", "alpha", "sigma", "log_snr", "d_alpha", "d_sigma")
    for label, schedule in {**SCHEDULES, "own": Own()}.items():
        for name in names[2:] if label == "own" else names:
            yield f"{label}, {name}", getattr(schedule, name)
        yield f"{label}, add_noise", lambda t, s=schedule: s.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), t)


def network_doors() -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    model, unet, told = small(), UNet(1, 1, size=8, width=8, multipliers=(1,), blocks=1), conditions(n=2)
    x = images(2)
    yield "TimestepEmbedding", TimestepEmbedding(8)
    yield "UNet", lambda t: unet(x, t)
    yield "forward", lambda t: model(x, t, told)
    yield "loss", lambda t: model.loss(x, told, t=t)
    yield "noised", lambda t: told.noised(t, torch.zeros(2, 1, 8, 8))


DOORS = dict([*schedule_doors(), *network_doors()])


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_times_of_tensors(door: Callable[[Tensor], object]) -> None:
    for time in OUTSIDE:
        with pytest.raises(ValueError, match=MEANS):
            door(torch.tensor([0.5, time]))
    with pytest.raises(TypeError, match=r"must be floating point, from 0 to 1, found torch.int64; step n of T steps"):
        door(torch.tensor([0, 1]))
    door(torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_advice_for_whole_steps_is_good(schedule: NoiseSchedule) -> None:
    steps = schedule.steps or 1000
    with pytest.raises(TypeError, match=r"step n of T steps, counted from 1, is t = n / T"):
        schedule.alpha(torch.arange(1, steps + 1))
    assert schedule.alpha(torch.arange(1, steps + 1) / steps).isfinite().all()


@pytest.mark.parametrize("time", OUTSIDE)
def test_times_that_are_numbers(time: float) -> None:
    schedule = SCHEDULES["cosine"]
    exact = ExactDenoiser(GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None]), schedule)
    x, model, told = torch.zeros(2, 2), small(), conditions(n=2)
    doors: list[Callable[[], object]] = [
        lambda: schedule.add_noise(x, x, time),
        lambda: check_times(time),
        lambda: exact(x, time),
        lambda: exact.score(x, time),
        lambda: ClippedDenoiser(exact)(x, time),
        lambda: GuidedDenoiser(exact, exact, 2.0)(x, time),
        lambda: model.denoiser(told)(images(2), time),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=MEANS):
            door()
    for grid in GRIDS.values():
        with pytest.raises(ValueError, match=f"start must be a time after .* and at most 1, found {time}"):
            grid(schedule, 4, start=time)
    with pytest.raises(ValueError, match="start must be a time after"):
        model.sample(told, start=images(2), start_time=time)
    for times in ([time, 0.5, 0.0], [1.0, time, 0.0], [1.0, 0.5, time]):
        if times == sorted(times, reverse=True) and 0 <= time <= 1:
            continue
        with pytest.raises(ValueError, match="decrease from at most 1 to at least 0"):
            DDPMSampler()(exact, x, torch.tensor(times), noise=NoiseStream(0, torch.arange(2), (2,)))


def test_no_time_at_all_and_both_ends_are_fine() -> None:
    for schedule in SCHEDULES.values():
        assert schedule.alpha(torch.zeros(0)).shape == (0,)
        assert schedule.add_noise(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2)
        x = torch.ones(2, 3)
        if schedule is not SCHEDULES["custom"]:
            assert torch.equal(schedule.add_noise(x, torch.zeros(2, 3), 0), x)
        assert torch.equal(schedule.add_noise(x, x, torch.tensor(0.5)), schedule.add_noise(x, x, 0.5))


def test_levels_of_noise_that_a_network_is_told() -> None:
    told, noisy = conditions(n=2), ReconstructionConcat(1, 8, 8)
    for level in OUTSIDE:
        with pytest.raises(ValueError, match=f"noise_level {MEANS}"):
            noisy(TreeCondition(told.node, image=told.image, noise_level=torch.tensor([0.5, level])))
    known = torch.tensor([True, False])  # what is said of an image that is not known is not read
    noisy(TreeCondition(told.node, image=told.image, known=known, noise_level=torch.tensor([0.5, NAN])))


def test_elsewhere_than_on_a_cpu_values_are_not_looked_at() -> None:
    check_times(torch.full((2,), 5.0, device="meta"))
    with pytest.raises(TypeError, match="must be floating point"):
        check_times(torch.zeros(2, dtype=torch.int64, device="meta"))


def test_a_time_for_all_or_one_for_each() -> None:
    x = torch.ones(3, 2)
    for t in (torch.tensor([0.5]), torch.full((3, 1), 0.5), torch.full((2,), 0.5)):
        with pytest.raises(ValueError, match=r"one time for all rows, a number, or one for each, shape \(3,\)"):
            SCHEDULES["cosine"].add_noise(x, x, t)
    with pytest.raises(TypeError, match=r"x must be floating point, found torch.uint8; .* x.float\(\) / 255"):
        SCHEDULES["cosine"].add_noise(x.to(torch.uint8), x.to(torch.uint8), 0.5)
    for t in (torch.tensor([0.5]), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"expected one time for each image, shape \(4,\)"):
            small().loss(images(4), conditions(), t=t)


# --- noise ----------------------------------------------------------------------------------------------------


def noise_doors() -> Iterator[tuple[str, Callable[[Tensor], object]]]:
    x, model, told = images(4), small(condition_noise=0.5), conditions()
    yield "add_noise", lambda noise: SCHEDULES["cosine"].add_noise(x, noise, 0.5)
    yield "loss", lambda noise: model.loss(x, told, noise=noise)
    yield "noised", lambda noise: told.noised(torch.full((4,), 0.5), noise)
    yield "target", lambda noise: target("v", x, noise, torch.tensor(0.6), torch.tensor(0.8))
    yield "reparameterize", lambda noise: reparameterize(x, x, noise)
    times = torch.tensor([1.0, 0.5, 0.0])
    zero = ClippedDenoiser(Zero(), -1, 1)
    yield "sampler", lambda noise: DDPMSampler()(zero, x, times, noise=lambda _: noise)


class Zero:
    schedule = SCHEDULES["cosine"]

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        return torch.zeros_like(x_t)


NOISY = dict(noise_doors())


@pytest.mark.parametrize("door", NOISY.values(), ids=NOISY)
def test_noise_is_drawn_for_each_number(door: Callable[[Tensor], object]) -> None:
    for shape in ((1, 1, 8, 8), (8, 8), (), (4, 1, 1, 1), (4, 1, 8, 1)):
        found = re.escape(str(shape))
        message = rf"noise must have the shape of \w+, \(4, 1, 8, 8\), found {found}; draw a number for each"
        with pytest.raises(ValueError, match=message):
            door(torch.randn(shape, generator=seeded()))
    for dtype in (torch.int64, torch.float64, torch.bool):
        message = rf"noise must have the dtype of \w+, torch.float32, found {dtype}; draw it as torch.randn_like"
        with pytest.raises(TypeError, match=message):
            door(torch.zeros(4, 1, 8, 8, dtype=dtype))
    door(torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=seeded()).to(torch.float32))  # the advice
    door(torch.randn_like(images(4)))


def test_autocast_allows_other_dtypes_of_floating_point() -> None:
    x = torch.zeros(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="noise must have the dtype of x"):
        check_noise(torch.zeros(2), x, "x")
    with torch.autocast("cpu", torch.bfloat16):
        check_noise(torch.zeros(2), x, "x")
        with pytest.raises(TypeError, match="noise must have the dtype of x"):
            check_noise(torch.zeros(2, dtype=torch.int64), x, "x")


def test_noise_of_integers_is_no_noise() -> None:
    tree = build(GROWN)
    x = observations(tree, 2)
    with pytest.raises(TypeError, match=r"noise must be standard normal, found torch.int64; draw it with torch.randn"):
        tree.posterior(x, noise=torch.zeros(2, len(GROWN), *tree.latent, dtype=torch.int64))

"""Noise schedules against closed forms, numerical derivatives, and diffusers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from treediff.diffusion.discrete import DiscreteSchedule, rescale_zero_terminal_snr
from treediff.diffusion.schedule import (
    CosineSchedule,
    CustomSchedule,
    LinearSchedule,
    NoiseSchedule,
    ScaledLinearSchedule,
    SigmoidSchedule,
)

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": LinearSchedule(),
    "linear from 0": LinearSchedule(0.0, 15.0),
    "constant rate": LinearSchedule(5.0, 5.0),
    "scaled linear": ScaledLinearSchedule(),
    "scaled linear from 0": ScaledLinearSchedule(0.0, 9.0),
    "cosine": CosineSchedule(),
    "cosine to noise": CosineSchedule(end=1.0),
    "cosine without offset": CosineSchedule(s=0.0),
    "sigmoid": SigmoidSchedule(),
    "sigmoid to noise": SigmoidSchedule(low=0.0, high=3.0, tau=0.3, end=1.0),
    "custom": CustomSchedule(lambda t: 10 - 20 * t),
    "discrete linear": DiscreteSchedule.linear(1000),
    "discrete, 7 steps": DiscreteSchedule.linear(7, 0.1, 0.4),
    "discrete scaled linear": DiscreteSchedule.scaled_linear(1000),
    "discrete cosine": DiscreteSchedule.sampled(CosineSchedule(end=1.0), 100),
    "discrete to noise": rescale_zero_terminal_snr(DiscreteSchedule.linear(50)),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
times = torch.linspace(0, 1, 701, dtype=torch.float64)


def squares(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """`alpha^2` from each paper's own formula, evaluated plainly."""
    match schedule:
        case LinearSchedule():
            return torch.exp(-(schedule.beta_min * t + (schedule.beta_max - schedule.beta_min) * t**2 / 2))
        case ScaledLinearSchedule():
            low, high = math.sqrt(schedule.beta_min), math.sqrt(schedule.beta_max)
            return torch.exp(-((low + t * (high - low)) ** 3 - low**3) / (3 * (high - low)))
        case CosineSchedule():
            turn = math.pi / 2 / (1 + schedule.s)
            return (torch.cos(turn * (schedule.end * t + schedule.s)) / math.cos(turn * schedule.s)) ** 2
        case SigmoidSchedule():
            span = (schedule.high - schedule.low) / schedule.tau
            first, last = (
                torch.sigmoid(torch.tensor(v / schedule.tau).double()) for v in (schedule.low, schedule.high)
            )
            return (last - torch.sigmoid(schedule.low / schedule.tau + span * schedule.end * t)) / (last - first)
    raise NotImplementedError


@pytest.mark.parametrize("name", [name for name in SCHEDULES if "discrete" not in name and name != "custom"])
def test_formula_of_the_paper(name: str) -> None:
    torch.testing.assert_close(
        SCHEDULES[name].alpha(times) ** 2, squares(SCHEDULES[name], times), rtol=1e-9, atol=1e-14, msg=name
    )


@every_schedule
def test_ends(schedule: NoiseSchedule) -> None:
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, 1.0], dtype=dtype)
        if not isinstance(schedule, CustomSchedule):  # whose ends are the user's
            assert schedule.alpha(ends)[0] == 1
            assert schedule.sigma(ends)[0] == 0
            assert schedule.log_snr(ends)[0] == math.inf
        assert not schedule.log_alpha(ends).isnan().any()
        assert schedule.ends_in_noise == bool(schedule.alpha(ends)[1] == 0)
        assert schedule.ends_in_noise == bool(schedule.log_snr(ends)[1] == -math.inf)


@every_schedule
def test_squares_add_up_and_the_snr_falls(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(schedule.alpha(times) ** 2 + schedule.sigma(times) ** 2, torch.ones_like(times))
    assert (schedule.log_snr(times).diff()[1:] < 0).all()
    inside = times[1:-1]
    torch.testing.assert_close(
        schedule.log_snr(inside),
        2 * (schedule.alpha(inside).log() - schedule.sigma(inside).log()),
        rtol=1e-7,
        atol=1e-8,
    )


@every_schedule
def test_derivatives_against_differences(schedule: NoiseSchedule) -> None:
    # Between knots, where a discrete schedule has a derivative.
    middle, h = (torch.arange(700, dtype=torch.float64) + 0.37)[5:-5] / 700, 1e-6
    if schedule.steps is not None:
        middle = (torch.arange(schedule.steps, dtype=torch.float64) + 0.37)[1:-1] / schedule.steps
    for function, derivative in (
        (schedule.log_alpha, schedule.d_log_alpha),
        (schedule.alpha, schedule.d_alpha),
        (schedule.sigma, schedule.d_sigma),
    ):
        difference = (function(middle + h) - function(middle - h)) / (2 * h)
        torch.testing.assert_close(derivative(middle), difference, rtol=2e-6, atol=1e-7)


@every_schedule
def test_the_way_back_from_log_snr(schedule: NoiseSchedule) -> None:
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(times)), times, rtol=1e-7, atol=1e-9)
    outside = schedule.time_of(torch.tensor([1e9, -1e9], dtype=torch.float64))
    torch.testing.assert_close(outside, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)


@every_schedule
def test_float32_keeps_its_digits(schedule: NoiseSchedule) -> None:
    single, double = times[1:].float(), times[1:].float().double()
    for quantity in ("alpha", "sigma", "log_snr"):
        function = getattr(schedule, quantity)
        assert function(single).dtype == torch.float32
        torch.testing.assert_close(function(single).double(), function(double), rtol=2e-4, atol=2e-5)


@every_schedule
def test_any_shape(schedule: NoiseSchedule) -> None:
    t = torch.rand(2, 0, 3), torch.rand(()), torch.rand(4, 1)
    for each in t:
        for function in (schedule.log_alpha, schedule.sigma, schedule.d_sigma, schedule.time_of):
            assert function(each).shape == each.shape


@every_schedule
def test_noise_is_added_per_image(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    noised = schedule.add_noise(x, noise, t)
    for i in range(3):
        expected = schedule.alpha(t[i]) * x[i] + schedule.sigma(t[i]) * noise[i]
        torch.testing.assert_close(noised[i], expected)
        torch.testing.assert_close(schedule.add_noise(x, noise, float(t[i]))[i], expected)


# --- discrete -------------------------------------------------------------------------------------------------


def test_knots_are_the_product_of_the_betas() -> None:
    betas = [0.1, 0.2, 0.5]
    schedule = DiscreteSchedule(betas)
    knots = torch.tensor([0, 1, 2, 3], dtype=torch.float64) / 3
    products = torch.tensor([1, 0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(knots) ** 2, products)
    torch.testing.assert_close(schedule.betas(), torch.tensor(betas, dtype=torch.float64))
    # Half-way between two knots lies the mean.
    torch.testing.assert_close(schedule.alpha(torch.tensor(0.5).double()), products[1:3].sqrt().mean())


@given(st.integers(1, 3000), st.data())
def test_a_single_precision_time_hits_its_knot(steps: int, data: st.DataObject) -> None:
    schedule = DiscreteSchedule.linear(steps, 1e-4, 0.02)
    n = data.draw(st.integers(0, steps))
    exact = schedule.log_alpha(torch.tensor(n, dtype=torch.float64) / steps)
    torch.testing.assert_close(schedule.log_alpha(torch.tensor(n / steps)), exact.float(), rtol=0, atol=0)


def test_zero_terminal_snr_follows_the_algorithm() -> None:
    plain = DiscreteSchedule.linear(1000)
    rescaled = rescale_zero_terminal_snr(plain)
    knots = torch.arange(1, 1001, dtype=torch.float64) / 1000
    before, after = plain.alpha(knots), rescaled.alpha(knots)
    torch.testing.assert_close(after[0], before[0])
    assert after[-1] == 0
    # A straight line leads from one to the other.
    slope = (after[400] - after[0]) / (before[400] - before[0])
    torch.testing.assert_close(after, after[0] + slope * (before - before[0]))


def test_a_schedule_of_one_step_cannot_end_in_noise_and_stay() -> None:
    with pytest.raises(ValueError, match=r"a schedule of one step cannot keep its first step .* at least 2 steps"):
        rescale_zero_terminal_snr(DiscreteSchedule([0.5]))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_added_to_half_precision_as_to_more(schedule: NoiseSchedule, dtype: torch.dtype) -> None:
    x, noise = torch.ones(5, 1), torch.full((5, 1), 2.0)
    t = torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0])
    exact = schedule.add_noise(x, noise, t)
    torch.testing.assert_close(schedule.add_noise(x.to(dtype), noise.to(dtype), t).float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (DiscreteSchedule.linear(1000), {"beta_schedule": "linear"}),
        (
            DiscreteSchedule.scaled_linear(500, 1e-3, 0.03),
            {"beta_schedule": "scaled_linear", "num_train_timesteps": 500, "beta_start": 1e-3, "beta_end": 0.03},
        ),
        (DiscreteSchedule.sampled(CosineSchedule(end=1.0), 1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            rescale_zero_terminal_snr(DiscreteSchedule.linear(1000)),
            {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
        ),
    ],
    ids=["linear", "scaled linear", "cosine", "zero terminal SNR"],
)
def test_diffusers_agrees(ours: DiscreteSchedule, theirs: dict[str, object]) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**theirs)
    knots = torch.arange(1, ours.steps + 1, dtype=torch.float64) / ours.steps
    torch.testing.assert_close(ours.alpha(knots) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-5, atol=1e-7)


# --- errors and descriptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LinearSchedule(-0.1, 1.0), ValueError, r"0 <= beta_min <= beta_max.*found -0\.1 and 1"),
        (lambda: LinearSchedule(2.0, 1.0), ValueError, r"found 2\.0 and 1\.0"),
        (lambda: LinearSchedule(0.0, 0.0), ValueError, r"beta_max above 0"),
        (lambda: LinearSchedule(0.0, math.inf), ValueError, r"found 0\.0 and inf"),
        (lambda: ScaledLinearSchedule(2.0, 2.0), ValueError, r"above beta_min, found 2\.0 for both; LinearSchedule"),
        (lambda: CosineSchedule(s=-1.0), ValueError, r"s must be at least 0.*found s=-1\.0"),
        (lambda: CosineSchedule(end=1.5), ValueError, r"end above 0 and at most 1, found .* end=1\.5"),
        (lambda: SigmoidSchedule(low=1.0, high=1.0), ValueError, r"high must be above low.*low=1\.0, high=1\.0"),
        (lambda: SigmoidSchedule(tau=0.0), ValueError, r"tau above 0.*tau=0\.0"),
        (lambda: CustomSchedule(lambda t: t), ValueError, r"decrease from t = 0 to t = 1.*1 to 0"),
        (lambda: CustomSchedule(lambda t: -t[:3]), ValueError, r"found values of shape \(3,\)"),
        (lambda: DiscreteSchedule([]), ValueError, r"one per step; found the shape \(0,\)"),
        (lambda: DiscreteSchedule([[0.1]]), ValueError, r"found the shape \(1, 1\)"),  # type: ignore[list-item]
        (lambda: DiscreteSchedule([0.1, 1.2]), ValueError, r"the last one at most 1; found numbers from 0\.1 to 1\.2"),
        (lambda: DiscreteSchedule([0.0, 0.2]), ValueError, r"above 0 and below 1"),
        (lambda: DiscreteSchedule([1.0, 0.2]), ValueError, r"above 0 and below 1"),
        (lambda: DiscreteSchedule([math.nan]), ValueError, r"found numbers from nan"),
        (lambda: DiscreteSchedule.linear(0), ValueError, r"steps must be at least 1, found 0"),
        (lambda: DiscreteSchedule.linear(2.5), TypeError, r"whole number, found 2\.5"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(build: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()  # type: ignore[operator]


def test_repr_shows_the_settings() -> None:
    assert repr(LinearSchedule()) == "LinearSchedule(beta_min=0.1, beta_max=20.0)"
    assert repr(DiscreteSchedule.linear(10, 0.1, 0.2)) == "DiscreteSchedule(steps=10, betas from 0.1 to 0.2)"

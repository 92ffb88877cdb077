"""Laws that every sampler keeps, and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from chains import SAMPLERS, Network, flow_of_one_gaussian, levels, normal, one_gaussian, stream
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from worlds import world

from treediff.diffusion.denoiser import Progress
from treediff.diffusion.discrete import DiscreteSchedule, rescale_zero_terminal_snr
from treediff.diffusion.grids import GRIDS, karras, trailing, uniform
from treediff.diffusion.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, Sampler
from treediff.diffusion.schedule import CosineSchedule, CustomSchedule, LinearSchedule, NoiseSchedule
from treediff.testing import ExactDenoiser

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


# --- laws -----------------------------------------------------------------------------------------------------


def test_eta_one_is_ddpm_with_the_small_variance() -> None:
    schedule = DiscreteSchedule.linear(50, 1e-3, 0.1)
    x = normal(4, 3)
    for steps in (50, 11):
        grid = uniform(schedule, steps)
        one, other = (s(Network(schedule), x, grid, noise=stream(x)) for s in (DDIMSampler(1.0), DDPMSampler("small")))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@every_sampler
def test_the_last_step_gives_the_estimate_even_where_a_schedule_is_not_clean(sampler: Sampler) -> None:
    """`sigma(0)` of this one is 0.0067, so it ends a little before the clean image."""
    network, seen, x = Network(CustomSchedule(lambda t: 10 - 20 * t)), list[Progress](), normal(4, 3)
    found = sampler(network, x, uniform(network.schedule, 5), noise=stream(x), callback=seen.append)
    assert torch.equal(found, seen[-1].x0)


@every_sampler
def test_a_schedule_of_one_step(sampler: Sampler) -> None:
    network, x = Network(DiscreteSchedule([0.5])), normal(4, 3)
    for grid in GRIDS.values():
        assert torch.equal(sampler(network, x, grid(network.schedule, 1), noise=stream(x)), network(x, 1.0))


def test_one_ancestral_step_is_the_posterior_of_bayes() -> None:
    """`q(x_t | x_s, x_0)` from the joint Gaussian of `x_t` and `x_s`, written out."""
    schedule = LinearSchedule()
    s, t = 0.7, 0.4
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, s, t)
    x, x0 = normal(6, 2), normal(6, 2, seed=1)
    covariance = alpha_s / alpha_t * sigma_t**2
    mean = alpha_t * x0 + covariance / sigma_s**2 * (x - alpha_s * x0)
    variance = sigma_t**2 - covariance**2 / sigma_s**2

    @dataclass
    class Constant:
        schedule: NoiseSchedule

        def __call__(self, x_t: Tensor, t: float) -> Tensor:
            return x0

    step = DDPMSampler()(
        Constant(schedule), x, torch.tensor([s, t], dtype=torch.float64), noise=lambda i: torch.ones_like(x)
    )
    torch.testing.assert_close(step, mean + math.sqrt(variance))


@every_sampler
def test_the_last_step_gives_the_estimate(sampler: Sampler) -> None:
    network, x = Network(LinearSchedule()), normal(2, 3)
    steps: list[Progress] = []
    images = sampler(network, x, uniform(network.schedule, 6), noise=stream(x), callback=steps.append)
    torch.testing.assert_close(images, steps[-1].x0, rtol=1e-12, atol=1e-12)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert {step.steps for step in steps} == {6}
    assert [step.t for step in steps] == uniform(network.schedule, 6)[1:].tolist()
    assert images is steps[-1].x


@every_sampler
def test_network_calls(sampler: Sampler) -> None:
    calls = 0

    class Counting(Network):
        def __call__(self, x: Tensor, t: float) -> Tensor:
            nonlocal calls
            calls += 1
            return super().__call__(x, t)

    x = normal(1, 2)
    sampler(Counting(LinearSchedule()), x, uniform(LinearSchedule(), 7), noise=stream(x))
    assert calls == sampler.calls(7)


@every_sampler
def test_a_perfect_denoiser_gives_the_distribution(sampler: Sampler) -> None:
    known, schedule = world(), LinearSchedule()
    truth, _ = known.sample(20_000, generator=torch.Generator().manual_seed(3))
    # A little of the image is left at t = 1, and a deterministic flow never forgets it.
    x = schedule.add_noise(truth, normal(20_000, known.features), 1.0)
    images = sampler(known.denoiser(schedule), x, karras(schedule, 100), noise=stream(x))
    error = (images.mean(0) - truth.mean(0)) / (truth.std(0) * math.sqrt(2 / len(truth)))
    assert error.abs().max() < 5
    shares, expected = (known.leaf_log_posterior(each).exp().mean(0) for each in (images, truth))
    torch.testing.assert_close(shares, expected, atol=0.02, rtol=0)


@every_sampler
@given(batch=st.integers(0, 4), steps=st.integers(1, 5))
def test_images_do_not_depend_on_the_batch(sampler: Sampler, batch: int, steps: int) -> None:
    schedule = CosineSchedule()
    x = normal(4, 3)
    together = sampler(Network(schedule), x, uniform(schedule, steps), noise=stream(x))
    alone = sampler(Network(schedule), x[:batch], uniform(schedule, steps), noise=stream(x[:batch]))
    assert torch.equal(alone, together[:batch])


@every_sampler
def test_twice_the_same(sampler: Sampler) -> None:
    network, x = Network(LinearSchedule()), normal(2, 3)
    kept = x.clone()
    one, other = (sampler(network, x, uniform(network.schedule, 5), noise=stream(x)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(x, kept)
    assert not one.requires_grad


@every_sampler
def test_a_start_where_nothing_is_left(sampler: Sampler) -> None:
    """Zero terminal SNR is as good as nearly zero."""
    plain, mixture, x = DiscreteSchedule.linear(1000), one_gaussian([0.5, -1.0], [0.3, 0.9]), normal(3, 2)
    images = [
        sampler(ExactDenoiser(mixture, schedule), x, trailing(schedule, 50), noise=stream(x))
        for schedule in (rescale_zero_terminal_snr(plain), plain)
    ]
    torch.testing.assert_close(*images, atol=0.1, rtol=0)


def test_a_truncated_chain_follows_the_flow() -> None:
    mixture, schedule = one_gaussian([0.5, -1.0], [0.3, 0.9]), LinearSchedule()
    x = normal(3, 2)
    images = HeunSampler()(ExactDenoiser(mixture, schedule), x, karras(schedule, 200, start=0.6))
    torch.testing.assert_close(images, flow_of_one_gaussian(x, mixture, schedule, 0.6, 0.0), rtol=1e-3, atol=1e-3)


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS.values() if s.stochastic], ids=repr)
def test_noise_is_asked_for(sampler: Sampler) -> None:
    network = Network(LinearSchedule())
    with pytest.raises(TypeError, match=r"draws noise at every step, but none was given; pass noise=NoiseStream"):
        sampler(network, normal(1, 2), uniform(network.schedule, 3))


@pytest.mark.parametrize(
    ("times", "found"),
    [
        ([1.0], r"\[1\.0\]"),
        ([0.5, 0.5], r"\[0\.5, 0\.5\]"),
        ([0.1, 0.9], r"\[0\.1, 0\.9\]"),
        ([1.1, 0.0], r"\[1\.1, 0\.0\]"),
        ([0.5, -0.1], r"\[0\.5, -0\.1\]"),
        ([float("nan"), 0.0], r"\[nan, 0\.0\]"),
        ([[1.0, 0.0]], r"\[\[1\.0, 0\.0\]\]"),
        ([1.0] * 9, r"the shape \(9,\)"),
    ],
)
def test_bad_times(times: list[float], found: str) -> None:
    network = Network(LinearSchedule())
    with pytest.raises(ValueError, match=rf"decrease from at most 1 to at least 0; found {found}"):
        DDIMSampler()(network, normal(1, 2), torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DDIMSampler(1.5), r"eta must be between 0 and 1, found 1\.5"),
        (lambda: DPMSolverSampler(-0.1), r"eta must be between 0 and 1, found -0\.1"),
        (lambda: DPMSolverSampler(limit=-0.1), r"limit must be at least 0, found -0\.1"),
        (lambda: DPMSolverSampler(limit=math.nan), r"limit must be at least 0, found nan"),
        (lambda: DDPMSampler("huge"), r"'small' or 'large', found 'huge'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

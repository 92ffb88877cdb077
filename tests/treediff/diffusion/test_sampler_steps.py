"""Steps of samplers: their order on exact flows and moments, and those that diffusers takes."""

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from chains import SAMPLERS, Network, flow_of_one_gaussian, levels, line, normal, one_gaussian, stream
from torch import Tensor
from worlds import world

from treediff.diffusion.denoiser import Progress, Step
from treediff.diffusion.discrete import DiscreteSchedule
from treediff.diffusion.grids import karras, trailing, uniform
from treediff.diffusion.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver3Sampler,
    DPMSolverSampler,
    HeunSampler,
    Sampler,
)
from treediff.diffusion.schedule import CosineSchedule, LinearSchedule, NoiseSchedule
from treediff.testing import ExactDenoiser

ORDERS = [
    ("DDIM", 1.0),
    ("DPM-Solver++", 2.0),
    ("DPM-Solver++ without a limit", 2.0),
    ("DPM-Solver++(3M)", 3.0),
    ("Heun", 2.0),
]


def order(errors: list[float]) -> float:
    """Of convergence, from errors at 1, 2, 4, ... times as many steps."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


# --- order of convergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize(("name", "promised"), ORDERS)
def test_order_on_one_gaussian(name: str, promised: float, schedule: NoiseSchedule) -> None:
    mixture = one_gaussian([1.0, -2.0, 0.3], [0.2, 0.7, 1.5])
    x = normal(5, 3)
    exact = flow_of_one_gaussian(x, mixture, schedule, 0.95, 0.1)
    errors = [
        float((SAMPLERS[name](ExactDenoiser(mixture, schedule), x, line(0.95, 0.1, n)) - exact).abs().max())
        for n in (80, 160, 320, 640)
    ]
    assert order(errors) == pytest.approx(promised, abs=0.15)
    assert errors[-1] < 10.0 ** (-1 - promised)


@cache
def end_on_a_tree() -> Tensor:
    """End of the flow from eight points, by many steps of two samplers that share nothing."""
    denoiser, x = world().denoiser(LinearSchedule()), normal(8, 3)
    finest = DPMSolver3Sampler()(denoiser, x, line(0.95, 0.1, 2560))
    torch.testing.assert_close(finest, HeunSampler()(denoiser, x, line(0.95, 0.1, 2560)), rtol=1e-5, atol=1e-5)
    return finest


@pytest.mark.parametrize(("name", "promised"), ORDERS)
def test_order_on_a_tree(name: str, promised: float) -> None:
    denoiser, x, finest = world().denoiser(LinearSchedule()), normal(8, 3), end_on_a_tree()
    errors = [float((SAMPLERS[name](denoiser, x, line(0.95, 0.1, n)) - finest).abs().mean()) for n in (80, 160, 320)]
    assert order(errors) == pytest.approx(promised, abs=0.2)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_few_steps_on_an_uneven_grid_gain_from_the_limit(schedule: NoiseSchedule) -> None:
    """The step to the first time is several times as long as the one before it."""
    mixture, x, grid = one_gaussian([1.0, -2.0, 0.3], [0.2, 0.7, 1.5]), normal(64, 3), uniform(schedule, 20)[:-1]
    exact = flow_of_one_gaussian(x, mixture, schedule, 1.0, schedule.first)
    limited, unlimited, ddim = (
        float((sampler(ExactDenoiser(mixture, schedule), x, grid) - exact).abs().mean())
        for sampler in (DPMSolverSampler(), DPMSolverSampler(limit=math.inf), DDIMSampler())
    )
    assert 3 * limited < min(unlimited, ddim)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
def test_third_order_gains_with_40_steps_on_either_grid(schedule: NoiseSchedule) -> None:
    denoiser, x = world().denoiser(schedule), normal(64, 3)
    exact = HeunSampler()(denoiser, x, karras(schedule, 1000))
    for grid in (karras(schedule, 40), uniform(schedule, 40)):
        third, second = (
            float((sampler(denoiser, x, grid) - exact).abs().mean())
            for sampler in (DPMSolver3Sampler(), DPMSolverSampler())
        )
        assert 2 * third < second


def test_a_step_is_exact_where_the_estimate_is_a_parabola() -> None:
    """`x0 = 1 + l^2` of `l = log(alpha / sigma)`, whatever the images; the integral by a fine trapezoidal rule."""

    @dataclass
    class Parabola:
        schedule: NoiseSchedule

        def __call__(self, x: Tensor, t: float) -> Tensor:
            ((alpha, sigma),) = levels(self.schedule, t)
            return torch.full_like(x, 1 + math.log(alpha / sigma) ** 2)

    schedule, times = LinearSchedule(), [0.8, 0.7, 0.61, 0.53]
    seen: list[Progress] = []
    grid = torch.tensor(times, dtype=torch.float64)
    found = DPMSolver3Sampler()(Parabola(schedule), normal(2, 3), grid, callback=seen.append)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, *times[2:])
    l = torch.linspace(math.log(alpha_s / sigma_s), math.log(alpha_t / sigma_t), 100_001, dtype=torch.float64)  # noqa: E741
    integral = torch.trapezoid(l.exp() * (1 + l**2), l)
    torch.testing.assert_close(found, sigma_t / sigma_s * seen[1].x + sigma_t * integral, rtol=1e-9, atol=1e-9)


def test_a_sampler_reads_as_many_earlier_estimates_as_it_says() -> None:
    @dataclass(frozen=True)
    class Reading(Sampler):
        kept: int = 0

        def step(self, at: Step) -> Tensor:
            seen.append([level.t for level, _ in at.history])
            return at.towards(at.x0)

    for kept in (0, 1, 3):
        seen: list[list[float]] = []
        Reading(kept)(Network(LinearSchedule()), normal(1, 2), line(1.0, 0.5, 5))
        times = line(1.0, 0.5, 5).tolist()
        assert seen == [times[max(0, i - kept) : i][::-1] for i in range(5)]


def test_without_extrapolation_it_is_ddim() -> None:
    denoiser, x, grid = world().denoiser(LinearSchedule()), normal(8, 3), uniform(LinearSchedule(), 7)
    for eta in (0.0, 0.5, 1.0):
        one, other = (s(denoiser, x, grid, noise=stream(x)) for s in (DPMSolverSampler(eta, 0.0), DDIMSampler(eta)))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


WEAK_ORDERS = [
    ("DDIM with noise", 1.0),
    ("DDPM, small variance", 1.0),
    ("DDPM, large variance", 1.0),
    ("DPM-Solver++ with noise", 2.0),
    ("SDE-DPM-Solver++", 2.0),
]


@pytest.mark.parametrize(("name", "promised"), WEAK_ORDERS)
def test_weak_order_of_stochastic_samplers(name: str, promised: float) -> None:
    """On a Gaussian every step is affine in the image and in its noise, so the moments of the chain are exact.

    Row 0 carries the mean; row 1 a deviation of 1 at the start; row `2 + i` a deviation of 1 that enters as the noise
    of step `i`. The squares of what becomes of the deviations add up to the variance.
    """
    schedule, start, end = LinearSchedule(), 0.95, 0.1
    mean, deviation = 0.7, 0.4
    denoiser = ExactDenoiser(one_gaussian([mean], [deviation]), schedule)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, start, end)
    mean_errors, variance_errors = [], []
    for steps in (80, 160, 320):
        x = torch.full((steps + 2, 1), alpha_s * mean, dtype=torch.float64)
        x[1] += 1
        enters = torch.eye(steps + 2, dtype=torch.float64)[:, 2:]
        chain = SAMPLERS[name](denoiser, x, line(start, end, steps), noise=lambda i, e=enters: e[:, i : i + 1])
        gains = chain[1:] - chain[0]
        variance = gains[0] ** 2 * (alpha_s**2 * deviation**2 + sigma_s**2) + gains[1:].square().sum()
        mean_errors.append(abs(float(chain[0]) - alpha_t * mean))
        variance_errors.append(abs(float(variance) - (alpha_t**2 * deviation**2 + sigma_t**2)))
    assert max(mean_errors) < 1e-12
    assert order(variance_errors) == pytest.approx(promised, abs=0.1)
    assert variance_errors[-1] < 10.0 ** (-1 - promised)


# --- another library ------------------------------------------------------------------------------------------


def by_diffusers(scheduler: object, network: Network, x: Tensor, steps: int, **options: object) -> Tensor:
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    train = scheduler.config.num_train_timesteps  # type: ignore[attr-defined]
    for i, timestep in enumerate(scheduler.timesteps):  # type: ignore[attr-defined]
        output = network.output(x, (int(timestep) + 1) / train)
        extra = {name: option(i) if callable(option) else option for name, option in options.items()}
        x = scheduler.step(output, timestep, x, **extra).prev_sample  # type: ignore[attr-defined]
    return x


def test_diffusers_takes_the_same_ddim_steps() -> None:
    diffusers = pytest.importorskip("diffusers")
    x, schedule = normal(3, 4), DiscreteSchedule.linear(1000)
    network, grid = Network(schedule), trailing(schedule, 20)
    for eta in (0.0, 0.6, 1.0):
        theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        expected = by_diffusers(theirs, network, x, 20, eta=eta, variance_noise=stream(x))
        torch.testing.assert_close(DDIMSampler(eta)(network, x, grid, noise=stream(x)), expected, rtol=1e-4, atol=1e-4)


# On fewer steps than all, the other library adds noise of the large variance to its last image.
@pytest.mark.parametrize(("variance", "steps"), [("small", 20), ("small", 100), ("large", 100)])
def test_diffusers_takes_the_same_ddpm_steps(variance: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    x, schedule = normal(3, 4), DiscreteSchedule.linear(100, 1e-3, 0.08)
    theirs = diffusers.DDPMScheduler(
        num_train_timesteps=100,
        beta_start=1e-3,
        beta_end=0.08,
        clip_sample=False,
        variance_type=f"fixed_{variance}",
        timestep_spacing="trailing",
    )
    expected = by_diffusers(theirs, Network(schedule), x, steps, generator=torch.Generator().manual_seed(4))
    again = torch.Generator().manual_seed(4)
    noise = [torch.randn(3, 4, generator=again, dtype=torch.float64) for _ in range(steps - 1)]
    ours = DDPMSampler(variance)(Network(schedule), x, trailing(schedule, steps), noise=noise.__getitem__)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 10, 25])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_takes_the_same_dpm_solver_steps(eta: float, prediction: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    x, schedule = normal(3, 4), DiscreteSchedule.scaled_linear(1000)
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=8.5e-4,
        beta_end=0.012,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
        algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    network, noise = Network(schedule, prediction), stream(x)
    # In float32, which is what the other library makes of given noise.
    expected = by_diffusers(theirs, network, x, steps, variance_noise=lambda i: noise(i).float())
    ours = DPMSolverSampler(eta, limit=math.inf)(network, x, trailing(schedule, steps), noise=noise)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)

"""Samplers against exact flows, exact moments, and the steps of diffusers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from worlds import world

from treediff.diffusion.continuous import CosineSchedule, LinearSchedule
from treediff.diffusion.discrete import DiscreteSchedule, rescale_zero_terminal_snr
from treediff.diffusion.grids import karras, trailing, uniform
from treediff.diffusion.parameterization import as_x0
from treediff.diffusion.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, Progress, Sampler
from treediff.diffusion.schedule import NoiseSchedule
from treediff.noise import NoiseStream
from treediff.testing import ExactDenoiser, GaussianMixture

SAMPLERS: dict[str, Sampler] = {
    "DDIM": DDIMSampler(),
    "DDIM with noise": DDIMSampler(eta=0.5),
    "DDPM, small variance": DDPMSampler("small"),
    "DDPM, large variance": DDPMSampler("large"),
    "DPM-Solver++": DPMSolverSampler(),
    "Heun": HeunSampler(),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
ORDERS = [("DDIM", 1.0), ("DPM-Solver++", 2.0), ("Heun", 2.0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(x: Tensor, seed: int = 5) -> NoiseStream:
    return NoiseStream(seed, torch.arange(len(x)), tuple(x.shape[1:]), x.dtype)


def line(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def one_gaussian(means: list[float], deviations: list[float]) -> GaussianMixture:
    covariance = torch.tensor(deviations, dtype=torch.float64).square().diag()
    return GaussianMixture(torch.zeros(1), torch.tensor([means], dtype=torch.float64), covariance[None])


def levels(schedule: NoiseSchedule, *times: float) -> list[tuple[float, float]]:
    """`alpha` and `sigma` at some times."""
    t = torch.tensor(times, dtype=torch.float64)
    return list(zip(schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), strict=True))


def flow_of_one_gaussian(x: Tensor, mixture: GaussianMixture, schedule: NoiseSchedule, s: float, t: float) -> Tensor:
    """Where the probability flow leads: deviations from the mean keep their size in standard deviations."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, s, t)
    variance = mixture.covariances[0].diagonal()
    spread = torch.sqrt((alpha_t**2 * variance + sigma_t**2) / (alpha_s**2 * variance + sigma_s**2))
    return alpha_t * mixture.means + spread * (x - alpha_s * mixture.means)


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


@pytest.mark.parametrize(("name", "promised"), ORDERS)
def test_order_on_a_tree(name: str, promised: float) -> None:
    denoiser, x = world().denoiser(LinearSchedule()), normal(8, 3)
    finest = HeunSampler()(denoiser, x, line(0.95, 0.1, 2560))
    errors = [float((SAMPLERS[name](denoiser, x, line(0.95, 0.1, n)) - finest).abs().mean()) for n in (80, 160, 320)]
    assert order(errors) == pytest.approx(promised, abs=0.2)


@pytest.mark.parametrize("name", ["DDIM with noise", "DDPM, small variance", "DDPM, large variance"])
def test_weak_order_of_stochastic_samplers(name: str) -> None:
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
    assert order(variance_errors) == pytest.approx(1, abs=0.1)
    assert variance_errors[-1] < 0.01


# --- another library ------------------------------------------------------------------------------------------


@dataclass
class Network:
    """Some smooth function of the image and the time, which predicts noise."""

    schedule: NoiseSchedule
    prediction: str = "epsilon"

    def output(self, x: Tensor, t: float) -> Tensor:
        return torch.sin(2 * x) + t * x.roll(1, -1)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(self.schedule.alpha(time)), float(self.schedule.sigma(time))
        return as_x0(self.prediction, self.output(x, t), x, alpha, sigma)  # type: ignore[arg-type]


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
def test_diffusers_takes_the_same_dpm_solver_steps(prediction: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    x, schedule = normal(3, 4), DiscreteSchedule.scaled_linear(1000)
    theirs = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=8.5e-4,
        beta_end=0.012,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    network = Network(schedule, prediction)
    expected = by_diffusers(theirs, network, x, steps)
    torch.testing.assert_close(
        DPMSolverSampler()(network, x, trailing(schedule, steps)), expected, rtol=1e-4, atol=1e-4
    )


# --- laws -----------------------------------------------------------------------------------------------------


def test_eta_one_is_ddpm_with_the_small_variance() -> None:
    schedule = DiscreteSchedule.linear(50, 1e-3, 0.1)
    x = normal(4, 3)
    for steps in (50, 11):
        grid = uniform(schedule, steps)
        one, other = (s(Network(schedule), x, grid, noise=stream(x)) for s in (DDIMSampler(1.0), DDPMSampler("small")))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


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
    plain = DiscreteSchedule.linear(1000)
    images = [
        sampler(Network(schedule, "v"), normal(3, 4), trailing(schedule, 50), noise=stream(normal(3, 4)))
        for schedule in (rescale_zero_terminal_snr(plain), plain)
    ]
    torch.testing.assert_close(*images, atol=0.1, rtol=0.1)


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
        (lambda: DDPMSampler("huge"), r"'small' or 'large', found 'huge'"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()

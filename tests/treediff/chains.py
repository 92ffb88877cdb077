"""Samplers, noise and a network for them, and exact flows, for tests of chains."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from treediff.core.noise import NoiseStream
from treediff.diffusion.parameterization import as_x0
from treediff.diffusion.samplers import (
    DDIMSampler,
    DDPMSampler,
    DPMSolver3Sampler,
    DPMSolverSampler,
    HeunSampler,
    Sampler,
)
from treediff.diffusion.schedule import NoiseSchedule
from treediff.testing import GaussianMixture

SAMPLERS: dict[str, Sampler] = {
    "DDIM": DDIMSampler(),
    "DDIM with noise": DDIMSampler(eta=0.5),
    "DDPM, small variance": DDPMSampler("small"),
    "DDPM, large variance": DDPMSampler("large"),
    "DPM-Solver++": DPMSolverSampler(),
    "DPM-Solver++ without a limit": DPMSolverSampler(limit=math.inf),
    "DPM-Solver++ with noise": DPMSolverSampler(eta=0.5),
    "SDE-DPM-Solver++": DPMSolverSampler(eta=1.0),
    "DPM-Solver++(3M)": DPMSolver3Sampler(),
    "Heun": HeunSampler(),
}


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

"""Exact denoiser of a known distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treediff.diffusion.schedule import NoiseSchedule
from treediff.testing.mixture import GaussianMixture

__all__ = ["ExactDenoiser"]


@dataclass(frozen=True)
class ExactDenoiser:
    """Denoiser `E[x_0 | x_t]` of a mixture of Gaussians under a schedule, for any sampler.

    Args:
        mixture: the distribution of clean data.
        schedule: the noise schedule.

    Examples:
        >>> from treediff.diffusion.schedule import LinearSchedule
        >>> point = GaussianMixture(torch.zeros(1), torch.ones(1, 2), 1e-6 * torch.eye(2)[None])
        >>> ExactDenoiser(point, LinearSchedule())(torch.zeros(1, 2), 0.9)
        tensor([[1.0000, 1.0000]], dtype=torch.float64)
    """

    mixture: GaussianMixture
    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Return `E[x_0 | x_t]`, `(B, F)` to `(B, F)`, in float64."""
        return self.mixture.denoise(x_t, *self._level(t))

    def score(self, x_t: Tensor, t: float) -> Tensor:
        """Return the gradient of `log p_t(x_t)`, `(B, F)` to `(B, F)`."""
        return self.mixture.noised(*self._level(t)).score(x_t)

    def _level(self, t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64)
        return float(self.schedule.alpha(time)), float(self.schedule.sigma(time))

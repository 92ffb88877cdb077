"""Denoisers around denoisers: guidance and clipping.

A guided denoiser is a denoiser. Guidance works on the estimate of `x_0`. For a given `x_t`, noise, velocity and score
are linear in `x_0`, so guidance on any of these three is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treediff.diffusion.denoiser import Denoiser
from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["ClippedDenoiser", "GuidedDenoiser", "check_guidance"]


@dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """Denoiser `x0 = negative + weight (positive - negative)`: towards one condition and away from another condition.

    The unconditional denoiser as the negative gives classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
    With the denoiser of the sibling as the negative, guidance leads away from the cluster most easily confused with a
    leaf.

    Args:
        positive: the denoiser of the wanted condition.
        negative: the denoiser of the unwanted condition; must have the same schedule.
        weight: 1 for the positive alone, more for more guidance; a number, or `(B,)`, one for each image.
        rescale: share, from 0 to 1, by which the standard deviation of each image is brought back to the standard
            deviation of the positive's estimate (Lin et al., arXiv 2305.08891, section 3.4).
        interval: times between which guidance acts; elsewhere only the positive is evaluated (Kynkaanniemi et al.,
            arXiv 2404.07724).

    Raises:
        ValueError: if `rescale` is not between 0 and 1, or the interval is not a part of [0, 1].
    """

    positive: Denoiser
    negative: Denoiser
    weight: float | Tensor = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_guidance(self.rescale, self.interval)

    @property
    def schedule(self) -> NoiseSchedule:
        """Schedule of the positive."""
        return self.positive.schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Return the guided estimate of `x_0`.

        Raises:
            ValueError: if there is not one weight for each image.
        """
        positive = self.positive(x_t, t)
        acts = self.interval[0] <= t <= self.interval[1]
        if not acts or (isinstance(self.weight, float | int) and self.weight == 1):
            return positive
        guided = torch.lerp(self.negative(x_t, t), positive, self._weight(positive))
        if not self.rescale:
            return guided
        spread, wanted = (_deviation(x.flatten(1)) for x in (guided, positive))
        # An image of one colour has a standard deviation of 0, which no factor changes.
        factor = torch.where(spread > 0, wanted / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)
        return guided * torch.lerp(torch.ones_like(factor), factor, self.rescale).view(-1, *[1] * (x_t.ndim - 1))

    def _weight(self, x0: Tensor) -> Tensor | float:
        if not isinstance(self.weight, Tensor):
            return self.weight  # stays a number: a copy to an accelerator would synchronise
        weight = self.weight.to(x0)
        if weight.ndim and weight.shape != x0.shape[:1]:
            raise ValueError(
                f"expected one weight, or one for each of the {len(x0)} images; found {tuple(weight.shape)}"
            )
        return weight.view(-1, *[1] * (x0.ndim - 1)) if weight.ndim else weight


def check_guidance(rescale: float, interval: tuple[float, float]) -> None:
    """Raise ValueError unless these are settings of `GuidedDenoiser`."""
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be between 0 and 1, found {rescale}")
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval must be two times, 0 <= low <= high <= 1, found {interval}")


def _deviation(x: Tensor) -> Tensor:
    """Return the standard deviation of each row; `Tensor.std` warns on an empty batch."""
    return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class ClippedDenoiser:
    """Denoiser with its estimate of `x_0` clipped to the range of all images (Ho et al., arXiv 2006.11239).

    Args:
        denoiser: the denoiser.
        low: least value.
        high: greatest value.
    """

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0

    @property
    def schedule(self) -> NoiseSchedule:
        """Schedule of the denoiser."""
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        """Return the clipped estimate of `x_0`."""
        return self.denoiser(x_t, t).clamp(self.low, self.high)

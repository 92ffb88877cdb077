"""How fast an image turns into noise.

A schedule says, for every time `t` in [0, 1], how much of the image `x_0` is left and how much noise there is:

    x_t = alpha(t) x_0 + sigma(t) eps,    eps ~ N(0, I),    alpha^2 + sigma^2 = 1.

`t = 0` is the clean image (`alpha = 1`) and `t = 1` the noisiest. All schedules here preserve variance, so each is one
decreasing function, kept as `log alpha`; from it come `alpha`, `sigma`, the log-SNR `log(alpha^2 / sigma^2)`, the
derivatives, and the way back from a log-SNR to its time. That way back puts every schedule on one axis, the continuous
ones (`treediff.diffusion.continuous`) as well as those of `T` steps (`treediff.diffusion.discrete`): step `n` of the
literature, counted from 1, is `t = n / T`, and libraries that count from 0 call it timestep `n - 1`.

What a schedule leaves open: what the network predicts (`parameterization`), which times are visited (`grids`), and how
one gets from one time to the next (`samplers`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.checks import check_noise, check_times, float_advice

__all__ = ["NoiseSchedule"]


class NoiseSchedule(ABC):
    """One decreasing function `log alpha(t)` and everything that follows from it.

    Times are floating-point tensors of any shape with values in [0, 1], and results have that shape and dtype. Other
    dtypes are a TypeError, and other values and NaN a ValueError where they can be looked at for nothing, see
    `treediff.checks.check_times`; a schedule of your own calls it in `log_alpha` and `d_log_alpha`. A schedule has no
    state: nothing that is called changes it.
    """

    #: Number of knots of a discrete schedule, None for a continuous one.
    steps: int | None = None
    #: The least time at which a network is asked; from there one step leads to the clean image.
    first: float = 1e-3

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """`log alpha(t)`; 0 at `t = 0`, and `-inf` where nothing of the image is left."""

    @abstractmethod
    def d_log_alpha(self, t: Tensor) -> Tensor:
        """The derivative of `log alpha` by `t`, which is minus half of the rate `beta(t)` of the diffusion."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """The time at which `log alpha` has a value; the nearest end if it never has."""

    def alpha(self, t: Tensor) -> Tensor:
        """What is left of the image."""
        check_times(t)
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""
        check_times(t)
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        """`log(alpha^2 / sigma^2)`, decreasing; infinite at `t = 0`."""
        check_times(t)
        log_alpha_squared = 2 * self.log_alpha(t)
        return log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared))

    def d_alpha(self, t: Tensor) -> Tensor:
        """The derivative of `alpha` by `t`."""
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """The derivative of `sigma` by `t`; infinite at `t = 0`, where the first noise comes in."""
        # sigma sigma' = -alpha alpha', because the squares add up to 1.
        return -(2 * self.log_alpha(t)).exp() * self.d_log_alpha(t) / self.sigma(t)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time that has a given log-SNR; the nearest end of [0, 1] for one that is never reached."""
        return self.time_of_log_alpha(-0.5 * F.softplus(-log_snr))

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """`alpha(t) x + sigma(t) noise`: the forward process in one leap (Ho et al., arXiv 2006.11239, eq. 4).

        Args:
            x: `(B, *shape)`, clean.
            noise: standard normal, of the shape and dtype of `x`.
            t: `(B,)`, or one time for all; from 0, the data, to 1.

        Raises:
            TypeError: if `x` or `t` is not floating point, or noise has another dtype than `x`.
            ValueError: if noise has another shape than `x`, there is not one time for each row or for all, or a time is
                NaN or outside of [0, 1] (looked at on a CPU only).
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, found {x.dtype}; convert it with {float_advice(x.dtype)}")
        check_noise(noise, x, "x")
        check_times(t)
        if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
            raise ValueError(
                f"expected one time for all rows, a number, or one for each, shape ({len(x)},); found {tuple(t.shape)}"
            )
        # A time in half precision has too few digits.
        t = torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        t = t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t
        return self.alpha(t).to(x.dtype) * x + self.sigma(t).to(x.dtype) * noise

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing of the image is left at `t = 1` (zero terminal SNR, Lin et al., arXiv 2305.08891)."""
        return float(self.log_alpha(torch.ones((), dtype=torch.float64, device="cpu"))) == -math.inf

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({settings})"

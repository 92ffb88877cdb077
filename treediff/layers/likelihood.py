"""Likelihoods of an observation given a decoder's output. Each class states the range of its data.

A likelihood maps a decoder's raw output to a log-probability and to an image. Log-probabilities are in nats,
summed over all axes but the first, in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BernoulliLikelihood", "GaussianLikelihood", "Likelihood"]


class Likelihood(nn.Module):
    """Base class of likelihoods.

    Attributes:
        data_range: smallest and largest value of the data, or None if any finite number is allowed.
    """

    data_range: tuple[float, float] | None = None

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return `log p(x | output)` in nats, `(B, ...)` to `(B,)`.

        Raises:
            ValueError: if `output` and `x` do not have the same shape.
        """
        raise TypeError(f"{type(self).__name__} must define log_prob(output, x)")

    def mean(self, output: Tensor) -> Tensor:
        """Return the expected observation, in the range of the data, which is shown as the image."""
        raise TypeError(f"{type(self).__name__} must define mean(output)")


class BernoulliLikelihood(Likelihood):
    """Independent Bernoulli variables given by logits, for data in [0, 1].

    `log p = sum( x log s + (1 - x) log(1 - s) )`, `s = sigmoid(output)`. For grey values this is TreeVAE's
    score (arXiv 2306.08984) and not a normalised density: values are not comparable with binarised data.

    Examples:
        >>> BernoulliLikelihood().log_prob(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([-1.3863])
    """

    data_range = (0.0, 1.0)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the log-probability of Bernoulli variables, `(B,)`; arguments as for `Likelihood.log_prob`."""
        output, x = _comparable(output, x)
        return -F.binary_cross_entropy_with_logits(output, x, reduction="none").flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        """Return `sigmoid(output)`."""
        return torch.sigmoid(output)


class GaussianLikelihood(Likelihood):
    """A Gaussian around the decoder's output, for any real data.

    `log p = -1/2 sum( (x - output)^2 / v + log(2 pi v) )` with one variance `v` for all pixels, either fixed or
    learned. `v = 0.5` gives the squared error of TreeVAE's colour models up to a constant; a learned `v`
    balances reconstruction against the KL terms by itself (sigma-VAE, arXiv 2006.13202).

    Args:
        variance: the variance, or its initial value when learned.
        learned: whether the variance is a parameter.
        data_range: range of the data, [0, 1] by default, to which images are clamped for display; None for
            data of any size.
        device: of the variance.
        dtype: of the variance.

    Raises:
        ValueError: if the variance is not positive, or the range is empty.

    Examples:
        >>> GaussianLikelihood(variance=1.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([-0.9189])
    """

    def __init__(
        self,
        variance: float = 0.5,
        *,
        learned: bool = False,
        data_range: tuple[float, float] | None = (0.0, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (variance > 0 and math.isfinite(variance)):
            raise ValueError(f"variance must be a positive number, found {variance}")
        if data_range is not None and not data_range[0] < data_range[1]:
            raise ValueError(f"data_range must be (smallest, largest) or None, found {data_range}")
        self.data_range = data_range
        logvar = torch.tensor(math.log(variance), device=device, dtype=dtype)
        self.learned = learned
        if learned:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar)

    def extra_repr(self) -> str:
        """Return the variance, whether it is learned, and the range of the data."""
        variance = "meta" if self.logvar.is_meta else f"{self.logvar.detach().exp().item():.3g}"
        return f"variance={variance}, learned={self.learned}, data_range={self.data_range}"

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the log-density of the Gaussian, `(B,)`; arguments as for `Likelihood.log_prob`."""
        output, x = _comparable(output, x)
        terms = (x - output).square() * torch.exp(-self.logvar) + (self.logvar + math.log(2 * math.pi))
        return -0.5 * terms.flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the output, clamped to the range of the data."""
        return output if self.data_range is None else output.clamp(*self.data_range)


def _comparable(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to float32 at least: half precision is too coarse for a sum over an image."""
    if output.shape != x.shape:
        raise ValueError(
            f"expected an output of the shape of the observations, found {tuple(output.shape)} for observations of "
            f"shape {tuple(x.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(output.dtype, x.dtype), torch.float32)
    return output.to(dtype), x.to(dtype)

"""Weightings of the noise levels in the loss.

A weighting is any function from log-SNRs `(B,)` to factors `(B,)` on the squared error of the network's own prediction.
`simple` and `min_snr` are two weightings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from treediff.diffusion.parameterization import Prediction, check_prediction

__all__ = ["Weighting", "min_snr", "simple"]

Weighting = Callable[[Tensor], Tensor]


def simple(log_snr: Tensor) -> Tensor:
    """Return 1 for every noise level (Ho et al., arXiv 2006.11239, eq. 14, where the network predicts noise)."""
    return torch.ones_like(log_snr)


def min_snr(prediction: Prediction, gamma: float = 5.0) -> Weighting:
    """Build the weighting `min(SNR, gamma)` on the error of the image (Hang et al., arXiv 2303.09556, section 3.4).

    On the error of other predictions the weight is `min(SNR, gamma) / SNR` for the noise and
    `min(SNR, gamma) / (SNR + 1)` for the velocity. Where nothing of the image is left, as at zero terminal SNR, the
    weight is 0: nothing is learned there.

    Args:
        prediction: what the network predicts.
        gamma: SNR at which the weight stops growing; above 0.

    Raises:
        ValueError: if there is no such prediction, or gamma is not above 0.

    Examples:
        >>> min_snr("epsilon")(torch.tensor([0.0, 10.0]).log())
        tensor([1.0000, 0.5000])
    """
    check_prediction(prediction)
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, found {gamma}")

    def weighting(log_snr: Tensor) -> Tensor:
        # In terms that stay finite at both ends: gamma / SNR, and 1 / (1 + 1 / SNR).
        capped = (gamma * torch.exp(-log_snr)).clamp(max=1)
        match prediction:
            case "epsilon":
                return capped
            case "x0":
                return log_snr.exp().clamp(max=gamma)
            case "v":
                return capped * torch.sigmoid(log_snr)

    return weighting

"""Whether a batch suits a model; one place, so that all models say the same."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_batch"]


def check_batch(
    x: object, shape: tuple[int, ...], dtype: torch.dtype, data_range: tuple[float, float] | None, what: str
) -> Tensor:
    """The batch itself, once it suits a model; values are looked at on a CPU only.

    Args:
        x: what was given.
        shape: of one row.
        dtype: of the weights; autocast allows others.
        data_range: least and greatest value, both allowed; None for any finite one.
        what: 'images' or 'observations', for messages.

    Raises:
        TypeError: if `x` is no tensor, not floating point, or of another dtype than the weights.
        ValueError: if it has another shape, is not finite, or leaves the range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {what} as a tensor, found {type(x).__name__}; torch.as_tensor(x) makes one")
    if not x.is_floating_point():
        raise TypeError(
            f"expected floating-point {what}, found {x.dtype}; convert them with .float(), and divide 8-bit images by "
            "255"
        )
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"expected {what} of shape (batch, {', '.join(map(str, shape))}), found {tuple(x.shape)}")
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"expected {what} of the dtype of the weights, {dtype}, found {x.dtype}; convert them with .to({dtype}), "
            "or the model with model.to(x.dtype)"
        )
    # Looking at values would stop an accelerator's stream, and a compiled graph, at every step.
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel():
        _check_values(x, data_range, what)
    return x


def _check_values(x: Tensor, data_range: tuple[float, float] | None, what: str) -> None:
    low, high = (float(v) for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} must be finite, found NaN or infinity; clean or mask the data first")
    if data_range is not None and (low < data_range[0] or high > data_range[1]):
        raise ValueError(
            f"{what} must lie in {list(data_range)}, found values from {low:.4g} to {high:.4g}; divide 8-bit images by "
            "255, and clamp what lies a little outside"
        )

"""Checks of images, times and noise, in one place, so that all messages agree.

Shapes and dtypes are always checked. Values of tensors are read on a CPU only, and not while PyTorch compiles:
elsewhere reading them would stop an accelerator's stream, or a graph, at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

__all__ = ["WHITE", "check_batch", "check_noise", "check_times", "float_advice"]

#: Greatest pixel of each dtype of whole numbers whose value of white is known.
WHITE = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}

_STEP = "step n of T steps, counted from 1, is t = n / T"
Shape = tuple[int, ...]


def check_batch(
    x: object, shape: tuple[int, ...], dtype: torch.dtype | None, data_range: tuple[float, float] | None, what: str
) -> Tensor:
    """Return the batch unchanged if it fits the model; values are read on a CPU only.

    Args:
        x: the batch.
        shape: of one row.
        dtype: of the weights; autocast allows others, and None any floating-point one.
        data_range: least and greatest value, both allowed; None for any finite one.
        what: 'images' or 'observations', for messages.

    Raises:
        TypeError: if `x` is no tensor, not floating point, or of another dtype than the weights.
        ValueError: if `x` has another shape, is not finite, or leaves the range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected {what} as a tensor, found {type(x).__name__}; torch.as_tensor(x) makes one")
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point {what}, found {x.dtype}; convert them with {float_advice(x.dtype)}")
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"expected {what} of shape (batch, {', '.join(map(str, shape))}), found {tuple(x.shape)}")
    if dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"expected {what} of the dtype of the weights, {dtype}, found {x.dtype}; convert them with .to({dtype}), "
            "or the model with model.to(x.dtype)"
        )
    if _may_look(x):
        _check_values(x, data_range, what)
    return x


def check_times(t: Tensor | float, name: str = "t") -> None:
    """Raise unless times, or levels of noise, lie in [0, 1]; values of a tensor are read on a CPU only.

    Args:
        t: a number, or a tensor of any shape.
        name: for messages.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if a time is NaN or outside of [0, 1].
    """
    if not isinstance(t, Tensor):
        low, high = t, t
    elif not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, from 0 to 1, found {t.dtype}; {_STEP}")
    elif not _may_look(t):
        return
    else:
        low, high = (float(value) for value in t.detach().aminmax())
    if not (low >= 0 and high <= 1):  # true of NaN, too
        raise ValueError(
            f"{name} must lie in [0, 1], where 0 is the data and 1 is nothing but noise, found {low:.4g} to "
            f"{high:.4g}; {_STEP}"
        )


def check_noise(noise: Tensor, like: Tensor, what: str) -> None:
    """Raise unless the noise has one number for each number of the tensor that it is added to.

    Args:
        noise: the noise.
        like: the tensor that the noise is added to.
        what: name of that tensor, for messages.

    Raises:
        TypeError: if the noise is not floating point, or (except under autocast) would widen the dtype.
        ValueError: if the noise has another shape, which might broadcast, as one noise for all images does.
    """
    if noise.shape != like.shape:
        raise ValueError(
            f"noise must have the shape of {what}, {tuple(like.shape)}, found {tuple(noise.shape)}; draw a number for "
            f"each: torch.randn_like({what})"
        )
    widens = torch.promote_types(noise.dtype, like.dtype) != like.dtype
    if not noise.is_floating_point() or (widens and not torch.is_autocast_enabled(like.device.type)):
        raise TypeError(
            f"noise must have the dtype of {what}, {like.dtype}, found {noise.dtype}; draw it as "
            f"torch.randn_like({what}), or convert floating-point noise with .to({like.dtype})"
        )


def _may_look(x: Tensor) -> bool:
    """Return whether there are values that can be read without waiting for a device."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > 0


def float_advice(dtype: torch.dtype) -> str:
    """Return advice on how to convert images of a dtype to floating point in [0, 1]."""
    if dtype == torch.bool:
        return "x.float()"
    if dtype in WHITE:
        return f"x.float() / {WHITE[dtype]}"
    return "x.float(), and divide images by what white is, 255 for 8 bits and 65535 for 16"


def _check_values(x: Tensor, data_range: tuple[float, float] | None, what: str) -> None:
    low, high = (float(v) for v in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{what} must be finite, found NaN or infinity; clean or mask the data first")
    if data_range is not None and (low < data_range[0] or high > data_range[1]):
        raise ValueError(
            f"{what} must lie in {list(data_range)}, found values from {low:.4g} to {high:.4g}; divide 8-bit images by "
            "255 and 16-bit ones by 65535, bring images from -1 to 1 to [0, 1] with (x + 1) / 2, and clamp what lies a "
            "little outside"
        )


def check_shape(name: str, shape: Shape) -> Shape:
    """Return a feature shape as a tuple; raise unless it is `(D,)` or `(D, h, w)`, all positive."""
    shape = check_numbers(name, shape)
    if len(shape) not in (1, 3):
        raise ValueError(f"{name} must be (width,) or (channels, height, width), found {shape}")
    return shape


def check_numbers(name: str, numbers: Sequence[int], *, some: bool = True) -> Shape:
    """Return sizes or widths as a tuple of whole numbers from 1 on, which must not be empty if `some` is set."""
    if isinstance(numbers, int | Integral):
        raise TypeError(f"{name} must be a tuple of numbers, found {numbers}; write ({numbers},) for one")
    if not isinstance(numbers, Sequence) or not all(isinstance(number, Integral) for number in numbers):
        raise TypeError(f"{name} must be a tuple of whole numbers, found {numbers!r}")
    numbers = tuple(int(number) for number in numbers)  # numpy's integers, too
    if min(numbers, default=0 if some else 1) < 1:
        raise ValueError(f"{name} must hold numbers of at least 1, found {numbers}")
    return numbers


def check_size(name: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """Return `(height, width)`; a single number is used for both."""
    pair = (size, size) if isinstance(size, int | Integral) else size
    if len(numbers := check_numbers(name, pair)) != 2:
        raise ValueError(f"{name} must be (height, width), found {numbers}")
    return numbers[0], numbers[1]


def check_positive(**numbers: int) -> None:
    """Raise unless counts and widths are whole numbers from 1 on."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise TypeError(f"{name} must be a whole number, found {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, found {number}")

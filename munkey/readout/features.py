"""Features of keys in whole numbers, for sums that are exact; see `munkey.store.sums`.

The features of a key depend on the key alone, to the bit: all operations are elementwise, or products of whole numbers
below 2^53 in float64. A matrix product of other numbers would round a row differently in another batch, and a row could
not be subtracted again.

Letters: `B` keys, `D` width of a key, `F` features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treediff.core.checks import check_positive
from treediff.core.noise import counter_normal, counter_uniform

__all__ = ["FEATURES", "Features", "FourierFeatures", "ReLUFeatures", "UnitFeatures"]

_KEY_BITS = 12  # of a key before a projection
_WEIGHT_BITS = 10  # of a standard deviation of the weights
_TURN = 1 << 12  # entries of the table of cosines


class Features(nn.Module, ABC):
    """A frozen map from keys to features in [-1, 1], as whole numbers from `-2^bits` to `2^bits`.

    Args:
        key_width: `D`.
        width: `F`.
        bits: precision of a feature.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or there are more than 15 bits.
    """

    name: ClassVar[str]

    def __init__(self, key_width: int, width: int, bits: int) -> None:
        super().__init__()
        check_positive(key_width=key_width, features=width, bits=bits)
        if bits > 15:
            raise ValueError(f"features have at most 15 bits, so that their sums are exact; found {bits}")
        self.key_width, self.width, self.bits = int(key_width), int(width), int(bits)

    @abstractmethod
    def forward(self, keys: Tensor) -> Tensor:
        """Return features `(B, F)` of keys `(B, D)`, whole numbers as float64."""

    def config(self) -> dict[str, Any]:
        """Return the arguments of the class, as plain JSON."""
        return {"name": self.name, "key_width": self.key_width, "bits": self.bits}


class UnitFeatures(Features):
    """The key itself, scaled to length 1: `round(2^bits k / |k|)`.

    Args:
        key_width: `D`, which is also `F`.
        bits: precision of a feature.

    Shapes:
        `(B, D)` to `(B, D)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or there are more than 15 bits.

    Examples:
        >>> UnitFeatures(2, bits=4)(torch.tensor([[3.0, 4.0]]))
        tensor([[10., 13.]], dtype=torch.float64)
    """

    name = "unit"

    def __init__(self, key_width: int, *, bits: int = 15) -> None:
        super().__init__(key_width, key_width, bits)

    def forward(self, keys: Tensor) -> Tensor:
        """Return the rounded keys of length 1, `(B, D)`."""
        return _unit(keys, self.bits)


class _Projected(Features):
    """Features of a random projection of the key of length 1, `w k`, with whole numbers for weights.

    Args:
        key_width: `D`.
        width: `F`.
        scale: standard deviation of `w k` for a key of length 1.
        seed: seed of the weights.
        bits: precision of a feature.
    """

    weight: Tensor

    def __init__(self, key_width: int, width: int, scale: float, seed: int, bits: int) -> None:
        super().__init__(key_width, width, bits)
        if not 0 < scale <= 64:
            raise ValueError(f"scale must be above 0, and 64 at most, found {scale}")
        self.scale, self.seed = float(scale), int(seed)
        normal = counter_normal(self.seed, torch.arange(key_width), (width,), dtype=torch.float64)
        # Not floating-point, which a model in lower precision would round.
        self.register_buffer("weight", (normal * scale * 2**_WEIGHT_BITS).round().to(torch.int32))

    def projected(self, keys: Tensor) -> Tensor:
        """Return `2^22 w k` of keys of length 1, `(B, F)`, whole numbers as float64."""
        return _unit(keys, _KEY_BITS) @ self.weight.double()

    def config(self) -> dict[str, Any]:
        """Return the arguments of the class, as plain JSON."""
        return {**super().config(), "width": self.width, "scale": self.scale, "seed": self.seed}


class FourierFeatures(_Projected):
    """Random Fourier features, `cos(w k + b)`, of a Gaussian kernel `exp(-scale^2 |k - k'|^2 / 2)`.

    The cosine is taken from a table of 4,096 entries.

    Args:
        key_width: `D`.
        width: `F`.
        scale: inverse length scale of the kernel, for keys of length 1.
        seed: seed of weights and phases.
        bits: precision of a feature.

    Shapes:
        `(B, D)` to `(B, F)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is out of range.

    Source: Rahimi and Recht, "Random features for large-scale kernel machines" (2007), algorithm 1.

    Examples:
        >>> FourierFeatures(2, width=8)(torch.tensor([[3.0, 4.0]])).shape
        torch.Size([1, 8])
    """

    name = "fourier"
    phase: Tensor
    cosines: Tensor

    def __init__(self, key_width: int, *, width: int, scale: float = 2.0, seed: int = 0, bits: int = 12) -> None:
        super().__init__(key_width, width, scale, seed, bits)
        uniform = counter_uniform(self.seed, torch.tensor([key_width]), (width,), dtype=torch.float64)[0]
        self.register_buffer("phase", (uniform * _TURN).floor().to(torch.int32))
        angles = torch.arange(_TURN, dtype=torch.float64) * (2 * math.pi / _TURN)
        self.register_buffer("cosines", (2**bits * angles.cos()).round().to(torch.int32))

    def forward(self, keys: Tensor) -> Tensor:
        """Return the rounded cosines, `(B, F)`."""
        turns = self.projected(keys).mul_(_TURN / (2 * math.pi * 2 ** (_KEY_BITS + _WEIGHT_BITS))).floor_()
        place = turns.add_(self.phase).remainder_(_TURN)
        return self.cosines[place.to(torch.int64)].double()


class ReLUFeatures(_Projected):
    """Random ReLU features, `max(0, w k)`, cut off at 1.

    Args:
        key_width: `D`.
        width: `F`.
        scale: standard deviation of `w k` for a key of length 1.
        seed: seed of the weights.
        bits: precision of a feature.

    Shapes:
        `(B, D)` to `(B, F)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is out of range.

    Source: RanPAC (McDonnell et al., arXiv 2307.02251).

    Examples:
        >>> bool((ReLUFeatures(2, width=8)(torch.tensor([[3.0, 4.0]])) >= 0).all())
        True
    """

    name = "relu"

    def __init__(self, key_width: int, *, width: int, scale: float = 0.25, seed: int = 0, bits: int = 12) -> None:
        super().__init__(key_width, width, scale, seed, bits)

    def forward(self, keys: Tensor) -> Tensor:
        """Return the rounded positive parts, `(B, F)`."""
        shift = 2 ** (_KEY_BITS + _WEIGHT_BITS - self.bits)
        return self.projected(keys).clamp_(min=0).div_(shift).floor_().clamp_(max=2**self.bits)


#: Features by their names in files.
FEATURES: dict[str, type[Features]] = {kind.name: kind for kind in (UnitFeatures, FourierFeatures, ReLUFeatures)}


def _unit(keys: Tensor, bits: int) -> Tensor:
    """Return `round(2^bits k / |k|)` as float64, to the bit the same in any batch."""
    wide = keys.to(torch.float64, copy=True)
    # Relative to a power of two near the greatest number, so that the squares are whole numbers, whose sum is exact.
    greatest = wide.abs().amax(1, keepdim=True)
    exponent = torch.frexp(greatest).exponent
    whole = torch.ldexp(wide, 20 - exponent).round_()
    length = whole.square().sum(1, keepdim=True).sqrt_().clamp_(min=1)
    unit = whole.mul_(2**bits).div_(length).round_()
    wide.zero_()  # a copy of rows that may be forgotten
    return unit

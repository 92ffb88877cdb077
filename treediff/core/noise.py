"""Noise that depends only on its seed, its sample and its draw.

A number drawn here is a pure function of a seed, the index of its sample, and the number of the draw within that
sample. So image 7 gets the same noise in a batch of 8 and in a batch of 800, on one process or four. Two leaves under
one root share the noise of their common path. There is no state and no loop over generators.

The generator is counter-based: the 64-bit finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) applied to the
three numbers in turn and then to the position inside the sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from treediff.core.modes import lasting
from treediff.core.threads import in_threads

__all__ = ["NoiseStream", "combine_seeds", "counter_normal", "counter_uniform", "drawing_from", "seed_from", "widest"]

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_BLOCK = 1 << 15  # numbers per block: a block fits into a cache, and one thread computes it
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def seed_from(generator: torch.Generator | None) -> int:
    """Return a seed drawn from a generator, or from PyTorch's default generator if there is none."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


@contextmanager
def drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Seed the weights of layers that are built in this context from a generator; None means the seed 0.

    PyTorch's layers draw from the default generator only; its state is restored afterwards.

    Examples:
        >>> with drawing_from(torch.Generator().manual_seed(1)):
        ...     first = torch.nn.Linear(2, 1)
        >>> with drawing_from(torch.Generator().manual_seed(1)):
        ...     print(torch.equal(torch.nn.Linear(2, 1).weight, first.weight))
        True
    """
    seed = 0 if generator is None else seed_from(generator)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def combine_seeds(*numbers: int) -> int:
    """Return one seed, 0 to 2**63 - 1, from several whole numbers of any sign; another order gives another seed.

    Other numbers give another seed, too, except that numbers that differ by a multiple of 2**62 count as the same.

    Examples:
        >>> combine_seeds(0, 1) == combine_seeds(0, 1), combine_seeds(0, 1) == combine_seeds(1, 0)
        (True, False)
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number * 2 + 1442695040888963407) % 2**63
    return mixed


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point dtype of a device: float64, or float32 on Apple's, the widest there."""
    return torch.float32 if device.type == "mps" else torch.float64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; the mask turns the shift into an unsigned one.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    return _mix_(x.clone())


def _mix_(x: Tensor) -> Tensor:
    """Mix in place, with one temporary tensor."""
    moved = torch.empty_like(x)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # As in `_shift_right`.
        torch.bitwise_right_shift(x, bits, out=moved)
        x.bitwise_xor_(moved.bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x


def _bits(seed: int, index: Tensor, draw: int | Tensor, count: int) -> Tensor:
    """Return `(n, count)` int64 with all 64 bits mixed."""
    return _spread(_keys(seed, index, draw), _positions(count, index.device))


def _keys(seed: int, index: Tensor, draw: int | Tensor) -> Tensor:
    """Return `(n,)` int64, one key for each row."""
    if index.dtype != torch.int64 or index.ndim != 1:
        raise TypeError(f"index must be (n,) int64, found {index.dtype} of shape {tuple(index.shape)}")
    if isinstance(draw, Tensor) and (draw.dtype != torch.int64 or draw.shape not in ((), index.shape)):
        raise TypeError(
            f"draw must be an int or ({len(index)},) int64, one for each row, found {draw.dtype} of shape "
            f"{tuple(draw.shape)}"
        )
    for name, number in (("seed", seed), ("draw", draw)):
        if not isinstance(number, Tensor) and not -(2**63) <= number < 2**63:
            raise ValueError(f"{name} must fit into 64 bits, from -2**63 to 2**63 - 1, found {number}")
    key = _mix(torch.full_like(index, seed) + _GOLDEN)
    return _mix((key ^ _mix(index * _GOLDEN)) + _mix(torch.full_like(index, 1) * draw) + _GOLDEN)


def _positions(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device) * _GOLDEN


def _spread(keys: Tensor, positions: Tensor) -> Tensor:
    return _mix_(keys[:, None] + positions)


def _checked(dtype: torch.dtype | None) -> torch.dtype:
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"noise has a floating-point dtype, found {dtype}")
    return dtype


def counter_uniform(
    seed: int,
    index: Tensor,
    shape: Sequence[int] = (),
    *,
    draw: int | Tensor = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw uniform numbers in [0, 1), never 1.

    Args:
        seed: any int of 64 bits, from -2**63 to 2**63 - 1.
        index: `(n,)` int64, the index of the sample of each row.
        shape: of one sample.
        draw: number of the draw within the sample; an int like the seed, or `(n,)` int64, one for each row.
        dtype: of the result; PyTorch's default dtype if not given.

    Returns:
        `(n, *shape)`.

    Raises:
        TypeError: if index or draw is no int64 of its shape, or the dtype is not floating point.
        ValueError: if seed or draw does not fit into 64 bits.

    Examples:
        >>> every = counter_uniform(0, torch.arange(8))
        >>> bool((counter_uniform(0, torch.tensor([5])) == every[5]).all())
        True
    """
    dtype = _checked(dtype)
    bits = _bits(seed, index, draw, math.prod(shape))
    # As many digits as the dtype holds, so that nothing is rounded: more digits could round up to 1.
    digits = min(53, 1 - int(math.log2(torch.finfo(dtype).eps)))
    return (_shift_right(bits, 64 - digits).to(dtype) * 2.0**-digits).view(len(index), *shape)


def counter_normal(
    seed: int,
    index: Tensor,
    shape: Sequence[int] = (),
    *,
    draw: int | Tensor = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw standard normal numbers, by the transform of Box and Muller; arguments as for `counter_uniform`.

    No absolute value exceeds 6.77, which one normal number in 7e10 would. On Apple's devices, which have no float64,
    the numbers are rounded slightly differently.

    Raises:
        TypeError: if index or draw is no int64 of its shape, or the dtype is not floating point.
        ValueError: if seed or draw does not fit into 64 bits.

    Examples:
        >>> counter_normal(0, torch.arange(3), (2, 4)).shape
        torch.Size([3, 2, 4])
    """
    dtype = _checked(dtype)
    count = math.prod(shape)
    with lasting():  # threads do not inherit inference mode
        found = torch.empty(len(index), count, dtype=dtype, device=index.device)
    size = max(1, _BLOCK // max(1, count)) if index.device.type == "cpu" else max(1, len(index))

    keys, positions = _keys(seed, index, draw), _positions(count, index.device)

    def fill(start: int) -> None:
        found[start : start + size] = _normal(_spread(keys[start : start + size], positions))

    in_threads(fill, range(0, len(index), size))
    return found.view(len(index), *shape)


def _normal(bits: Tensor) -> Tensor:
    wide = widest(bits.device)
    # Half a unit up keeps the logarithm finite.
    radius = _shift_right(bits, 32).to(wide).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).to(wide).mul_(2.0**-32 * 2 * math.pi)
    return radius.mul_(angle.cos_())


@dataclass(frozen=True, eq=False)
class NoiseStream:
    """Standard normal noise for a batch, one stream per image: draw `i` of an image depends on the image's index only.

    Args:
        seed: any int of 64 bits.
        index: `(B,)` int64, the index of the image of each row.
        shape: of one image.
        dtype: of the noise; PyTorch's default dtype if not given.

    Examples:
        >>> all_four = NoiseStream(0, torch.arange(4), (1, 2, 2))(7)
        >>> bool((NoiseStream(0, torch.tensor([3]), (1, 2, 2))(7) == all_four[3:]).all())
        True
    """

    seed: int
    index: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def __call__(self, draw: int) -> Tensor:
        """Return the noise of one draw, `(B, *shape)`."""
        return counter_normal(self.seed, self.index, self.shape, draw=draw, dtype=self.dtype)

"""Batches in which a row has the same bits wherever it is, whatever else is there, and however many rows there are.

A kernel adds up in an order that follows the shape of a batch and the place of a row, not what is in it. So for an
encoder that treats rows on their own, a batch that is always full gives a row the same bits if no place in it is
treated otherwise, and that can be tried: rows of noise are encoded in other places and among others. Where few rows are
left, a smaller batch does if it gives the same bits as a full one; the rest of it is filled with a row that is there.

An encoder that looks at all rows to decide something, as one that cuts padding off to the longest text does, could pass
such a trial and fail on data. Hence it is made only for encoders that say that they do not: see
`munkey.KeyEncoder.row_wise`.

Letters: `B` batch, `D` width of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["FullBatches"]

Encode = Callable[[Tensor], Tensor]

# Sizes of batches that are tried; the greatest is the full one. A processor is fastest where a batch fits into its
# caches, an accelerator where there is much to do.
_CPU: tuple[int, ...] = (1, 4, 16, 32)
_OTHER: tuple[int, ...] = (1, 4, 16, 64, 256)
_NUMBERS = 32  # of a row that are compared at least, since one or two may be equal by chance


class FullBatches:
    """Batches of one encoder, of sizes that were tried; each trial is made once for a shape and a setting.

    Args:
        width: `D`.

    Attributes:
        passed: what the trials said.
    """

    def __init__(self, width: int) -> None:
        self.rounds = -(-_NUMBERS // width)
        self.passed: dict[tuple[object, ...], bool] = {}

    def parts(self, encode: Encode, x: Tensor, weights: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Which rows are next, and a batch that begins with them and is to be encoded whole.

        Args:
            encode: from `(B, ...)` to `(B, D)`.
            x: `(B, ...)` all inputs.
            weights: of the encoder, whose layout decides on kernels as well.
        """
        sizes, start = _CPU if x.device.type == "cpu" else _OTHER, 0
        trial = _Trial(encode, x, sizes[-1], weights)
        if len(x) and not self._passed(trial, sizes[-1]):
            sizes = (1,)
        while start < len(x):
            left, whole = len(x) - start, sizes[-1]
            size = next(s for s in sizes if s == whole or (s >= left and self._passed(trial, s)))
            rows = x[start : start + size]
            if left < size:
                rows = torch.cat([rows, rows[:1].expand(size - left, *rows.shape[1:])])
            yield slice(start, start + min(size, left)), rows
            start += size

    def _passed(self, trial: _Trial, size: int) -> bool:
        key = size, *trial.setting
        if key not in self.passed:
            self.passed[key] = all(trial.passed(size, seed) for seed in range(self.rounds))
        return self.passed[key]


class _Trial:
    """Noise in the shape of some inputs, and what an encoder makes of it."""

    def __init__(self, encode: Encode, x: Tensor, whole: int, weights: Iterable[Tensor]) -> None:
        self.encode, self.x, self.whole = encode, x, whole
        layout = tuple((weight.dtype, weight.device, weight.stride()) for weight in weights)
        self.setting = (x.shape[1:], x.dtype, x.device, layout, *_setting())
        self.expected: dict[int, Tensor] = {}

    def passed(self, size: int, seed: int) -> bool:
        """Whether rows have the bits that they have in a whole batch; for the whole one, wherever they are."""
        noise, encode = _noise(self.x, self.whole, seed), self.encode
        if seed not in self.expected:
            self.expected[seed] = encode(noise)
        expected, one = self.expected[seed], self.whole // 2
        if size < self.whole:
            parts = zip(noise.split(size), expected.split(size), strict=True)
            return all(torch.equal(encode(part), found) for part, found in parts)
        alike = encode(noise[one : one + 1].expand_as(noise))  # one row in each place, and no others
        moved = encode(noise.roll(1, 0))
        return torch.equal(alike, expected[one : one + 1].expand_as(alike)) and torch.equal(moved, expected.roll(1, 0))


def _noise(x: Tensor, count: int, seed: int) -> Tensor:
    """Rows from 0 to 1 that differ in size, with an empty and a full one among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, *x.shape[1:], generator=generator)
    rows *= torch.logspace(-3, 0, 8).repeat(count)[:count].view(-1, *[1] * (x.ndim - 1))
    rows[1], rows[2] = 0, 1
    return rows.to(x)


def _setting() -> tuple[object, ...]:
    """What decides beside the shape which kernel is run."""
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )

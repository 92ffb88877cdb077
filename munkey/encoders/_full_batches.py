"""Batches in which the bits of a row depend neither on its place, nor on other rows, nor on the number of rows.

The order of sums in a kernel follows the shape of a batch and the place of a row, not the content of the row. If an
encoder processes rows independently, and its kernels treat all places alike, a batch that is always full gives a row
the same bits. A trial shows whether this holds: rows of noise are encoded in other places and among other rows. For the
last few rows a smaller batch is used if it gives the same bits as a full batch; free places are filled with copies of a
row.

An encoder that compares all rows, for example to cut padding to the longest text, could pass a trial and fail on data.
Hence trials are run only for encoders that declare to have no such operation: see `munkey.KeyEncoder.row_wise`.

Letters: `B` batch, `D` width of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["FullBatches"]

Encode = Callable[[Tensor], Tensor]

# Sizes of batches to try; the greatest is the full batch. A CPU is fastest when a batch fits into its caches, an
# accelerator when a batch is large.
_CPU: tuple[int, ...] = (1, 4, 16, 32)
_OTHER: tuple[int, ...] = (1, 4, 16, 64, 256)
_NUMBERS = 32  # compared for a row at least, since one or two may be equal by chance


class FullBatches:
    """Batches of one encoder, of sizes that passed a trial; each trial is run once for a shape and a setting.

    Args:
        width: `D`.

    Attributes:
        passed: results of the trials.
    """

    def __init__(self, width: int) -> None:
        self.rounds = -(-_NUMBERS // width)
        self.passed: dict[tuple[object, ...], bool] = {}

    def parts(self, encode: Encode, x: Tensor, weights: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the next rows, and a batch that begins with these rows and is to be encoded whole.

        Args:
            encode: from `(B, ...)` to `(B, D)`.
            x: `(B, ...)` all inputs.
            weights: of the encoder; their layout also decides which kernel runs.
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
    """A trial of an encoder on noise in the shape of some inputs."""

    def __init__(self, encode: Encode, x: Tensor, whole: int, weights: Iterable[Tensor]) -> None:
        self.encode, self.x, self.whole = encode, x, whole
        layout = tuple((weight.dtype, weight.device, weight.stride()) for weight in weights)
        self.setting = (x.shape[1:], x.dtype, x.device, layout, *_setting())
        self.expected: dict[int, Tensor] = {}

    def passed(self, size: int, seed: int) -> bool:
        """Return whether rows have the same bits as in a whole batch; for a whole batch, the same in all places."""
        noise, encode = _noise(self.x, self.whole, seed), self.encode
        if seed not in self.expected:
            self.expected[seed] = encode(noise)
        expected, one = self.expected[seed], self.whole // 2
        if size < self.whole:
            parts = zip(noise.split(size), expected.split(size), strict=True)
            return all(torch.equal(encode(part), found) for part, found in parts)
        alike = encode(noise[one : one + 1].expand_as(noise))  # the same row in each place
        moved = encode(noise.roll(1, 0))
        return torch.equal(alike, expected[one : one + 1].expand_as(alike)) and torch.equal(moved, expected.roll(1, 0))


def _noise(x: Tensor, count: int, seed: int) -> Tensor:
    """Return rows from 0 to 1 that differ in scale, among them a row of zeros and a row of ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, *x.shape[1:], generator=generator)
    rows *= torch.logspace(-3, 0, 8).repeat(count)[:count].view(-1, *[1] * (x.ndim - 1))
    rows[1], rows[2] = 0, 1
    return rows.to(x)


def _setting() -> tuple[object, ...]:
    """Return the settings that decide, besides the shape, which kernel runs."""
    return (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )

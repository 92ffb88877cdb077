"""Rows of a data set, read when they are indexed, so that a data set may be larger than memory.

Letters: `n` rows, `B` rows of a batch, `C H W` image, `D` width of a vector.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from treediff.core.checks import WHITE, check_positive, float_advice

__all__ = ["Indexable", "Rows"]

# A memory map gives its pages back after so many bytes have been read. The system maps several pages around each one,
# so rows in random order take up to ten times as much memory.
_KEPT = 1 << 24


class Indexable(Protocol):
    """Data set with a length, whose rows are found by their numbers."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: Any, /) -> Any:  # noqa: ANN401 - of many libraries
        """Return a row."""


class Rows(Dataset[Tensor]):
    """Rows of a data set as floating-point tensors, of which only those that are indexed are read and converted.

    Pixels are converted to `[0, 1]`: 8 and 16 bits without sign are divided by 255 and 65535, booleans become 0 and 1.
    Floating-point numbers stay as they are. Images of numpy and Pillow have their channels last, those of PyTorch
    first; in rows they are first, `(C, H, W)`, and grey images have one channel.

    A memory map gives pages back as it is read: the memory of a process does not grow with the file.

    Args:
        data: a tensor; a numpy array or memory map; a `torch.utils.data.Dataset`, or anything with `len` and `[]`,
            whose items are tensors, arrays or Pillow images, alone, in tuples or in mappings.
        column: of an item that is a tuple or a mapping: number or name of what is a row; the first of a tuple by
            default.
        dtype: floating-point dtype of the rows.

    Raises:
        TypeError: if the data have no length, no rows by number, or numbers whose greatest value is not known.
        ValueError: if there is no row, the dtype is not floating point, or items are mappings and no column is given.

    Examples:
        >>> images = np.full((5, 8, 8, 3), 255, np.uint8)
        >>> rows = Rows(images)
        >>> rows.shape, float(rows[torch.tensor([3, 0])].max())
        (torch.Size([5, 3, 8, 8]), 1.0)
    """

    def __init__(self, data: Indexable, *, column: str | int | None = None, dtype: torch.dtype = torch.float32) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(
                f"expected rows with a length and [], such as a tensor, an array or a Dataset; found "
                f"{type(data).__name__}; an iterable of batches has neither"
            )
        if not dtype.is_floating_point:
            raise ValueError(f"rows are floating point, found dtype={dtype}")
        if not len(data):
            raise ValueError("expected at least one row, found none")
        self.data, self.column, self.dtype = data, column, dtype
        self._picked: Tensor | None = None
        self._read = 0
        self.shape = torch.Size((len(data), *self[0].shape))

    @classmethod
    def of(cls, data: Indexable | Self, *, dtype: torch.dtype = torch.float32) -> Self:
        """Return the data as rows; rows of this dtype stay."""
        return data if isinstance(data, cls) and data.dtype == dtype else cls(data, dtype=dtype)

    def select(self, index: slice | Sequence[int] | Tensor) -> Rows:
        """Return some of the rows, in this order, without reading any."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
        chosen = copy.copy(self)
        chosen._picked = (torch.arange(len(self)) if self._picked is None else self._picked)[index]
        chosen.shape = torch.Size((len(chosen._picked), *self.shape[1:]))
        if not len(chosen._picked):
            raise ValueError("expected at least one row, found none")
        return chosen

    def __len__(self) -> int:
        return len(self.data) if self._picked is None else len(self._picked)

    def __repr__(self) -> str:
        return f"Rows({type(self.data).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Return a row, or rows `(B, ...)` for a slice, a list or a tensor of numbers or booleans."""
        if isinstance(index, int | np.integer):
            return self._floats(self._batch([int(index)]))[0]
        if isinstance(index, Tensor) and index.ndim == 0:
            return self[int(index)]
        return self._floats(self._batch(index))

    def __getitems__(self, index: list[int]) -> Tensor:
        """Return several rows at once, for a `DataLoader`; pass `collate_fn=lambda rows: rows`."""
        return self[index]

    def split(self, batch_size: int) -> Iterator[Tensor]:
        """Yield all rows in their order, a batch at a time."""
        check_positive(batch_size=batch_size)
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]

    # --- reading ------------------------------------------------------------------------------------------

    def _batch(self, index: slice | Sequence[int] | Tensor) -> Tensor:
        """Return rows as they are stored, `(B, ...)`, channels first."""
        if self._picked is not None:
            index = self._picked[index]
        if isinstance(self.data, Tensor | Rows):
            return self.data[index]
        if isinstance(self.data, np.ndarray):
            found = self.data[index.cpu().numpy() if isinstance(index, Tensor) else index]
            # A copy, as the file may change, in the byte order of this machine.
            rows = torch.from_numpy(np.array(found, dtype=found.dtype.newbyteorder("=")))
            self._give_back(found.nbytes)
            return _channels_first(rows)
        return self._items(index)

    def _items(self, index: slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(index, slice):
            numbers = list(range(*index.indices(len(self.data))))
        else:
            picked = torch.as_tensor(index)
            numbers = (picked.nonzero().squeeze(1) if picked.dtype == torch.bool else picked).tolist()
        if not numbers:
            return torch.empty(0, *self.shape[1:], dtype=self.dtype)
        if hasattr(self.data, "__getitems__"):
            items = self.data.__getitems__(numbers)
        else:
            items = [self.data[number] for number in numbers]
        return torch.stack([self._row(item) for item in items])

    def _row(self, item: Any) -> Tensor:  # noqa: ANN401
        """Return the row in an item."""
        if isinstance(item, Mapping):
            if self.column not in item:
                raise ValueError(
                    f"items have the columns {sorted(map(str, item))}; name one of them as column=, found "
                    f"{self.column!r}"
                )
            item = item[self.column]
        elif isinstance(item, tuple):
            item = item[0 if self.column is None else cast(int, self.column)]
        if isinstance(item, Tensor):
            return item
        return _channels_first(torch.from_numpy(np.array(item))[None])[0]

    def _floats(self, batch: Tensor) -> Tensor:
        """Convert what is stored to floating point; grey images get their channel."""
        if batch.ndim == 3:
            batch = batch[:, None]
        white = 1 if batch.is_floating_point() else WHITE.get(batch.dtype)
        if white is None or (white > 1 and batch.ndim != 4):
            raise TypeError(
                f"expected floating-point rows, or images of 8 or 16 bits, found {batch.dtype} of shape "
                f"{tuple(batch.shape[1:])}; convert them with {float_advice(batch.dtype)}"
            )
        rows = batch.to(self.dtype, memory_format=torch.contiguous_format)
        return rows if white == 1 else rows.div_(white)

    def _give_back(self, read: int) -> None:
        """Give the pages of a memory map back, which would otherwise count as memory of the process."""
        if not isinstance(self.data, np.memmap) or self.data.mode == "c":  # copies on write hold changes
            return
        self._read += read
        mapped = getattr(self.data, "_mmap", None)
        if self._read >= _KEPT and mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def _channels_first(rows: Tensor) -> Tensor:
    """Return images `(B, H, W, C)` as `(B, C, H, W)`; other rows, and channels that are first already, stay."""
    if rows.ndim != 4 or (rows.shape[1] in (1, 3) and rows.shape[3] not in (1, 3)):
        return rows
    return rows.movedim(3, 1)

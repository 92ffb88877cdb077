"""Records of an open file: reading, checking, writing, and moving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from munkey.store.digest import HASH, MODULUS, sum_of
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk
from munkey.store.file.journal import Note
from munkey.store.file.layout import Layout, Records

__all__ = ["Part", "RecordFile", "pieces"]

_ROWS = 4096  # at a time

#: Row numbers, consecutive or scattered.
Numbers = TypeVar("Numbers", range, Sequence[int])

#: Rows `(n, ...)` of all columns, and their hashes `(n, 32)`.
Part = tuple[Sequence[Tensor], Tensor]


@dataclass(frozen=True)
class RecordFile:
    """Records in a file, each in its place.

    Args:
        disk: `Disk` that reads and writes.
        file: descriptor of the file.
        layout: layout of the file.
        damaged: function that returns the error for a damaged record.
    """

    disk: Disk
    file: int
    layout: Layout
    damaged: Callable[[], ValueError]

    @contextmanager
    def some(self, rows: Sequence[int]) -> Iterator[Records]:
        """Yield a copy of the records of rows, which is overwritten on exit; a range is read at once."""
        width = self.layout.width
        data = bytearray(len(rows) * width)
        left = memoryview(data)
        try:
            for stretch in [rows] if isinstance(rows, range) else [range(row, row + 1) for row in rows]:
                size = len(stretch) * width
                self.disk.fill(self.file, self.layout.place(stretch.start), left[:size])
                left = left[size:]
            yield np.frombuffer(data, np.uint8).reshape(-1, width)
        finally:
            data[:] = bytes(len(data))

    def put(self, first: int, records: Records) -> None:
        """Write consecutive records from row `first` on."""
        self.disk.write(self.file, self.layout.place(first), np.ascontiguousarray(records).data.cast("B"))

    def put_rows(self, first: int, parts: Iterator[Part] | Sequence[Part]) -> None:
        """Write consecutive rows from row `first` on."""
        for columns, hashes in parts:
            records = self.layout.records(columns, hashes)
            self.put(first, records)
            records.fill(0)  # a copy of rows that may be forgotten later
            first += len(hashes)

    def zero(self, first: int, stop: int) -> None:
        """Overwrite the rows from `first` up to `stop` with zeros."""
        if stop > first:
            self.disk.zero(self.file, self.layout.place(first), (stop - first) * self.layout.width)

    def parts(self, count: int, total: int) -> Iterator[Part]:
        """Yield the first rows in chunks, each after it was checked.

        Args:
            count: number of rows.
            total: sum of the hashes of these rows.

        Raises:
            ValueError: if a row differs from what was written, as when another program wrote to the file.
        """
        for rows in _split(range(count)):
            with self.some(rows) as records, Scratch() as scratch:
                columns = [
                    scratch(torch.zeros(len(rows), *shape, dtype=dtype))
                    for shape, dtype in zip(self.layout.shapes, self.layout.dtypes, strict=True)
                ]
                hashes = torch.zeros(len(rows), HASH, dtype=torch.uint8)
                self.layout.read(records, columns, hashes)
                total -= sum_of(hashes)
                if not self.layout.whole(records).all():
                    raise self.damaged()
                yield columns, hashes
        if total % MODULUS:
            raise self.damaged()

    def total(self, rows: Sequence[int]) -> int | None:
        """Return the sum of the hashes of rows; None if a record is damaged."""
        total = 0
        for part in _split(rows):
            with self.some(part) as records:
                if not self.layout.whole(records).all():
                    return None
                total += sum_of(self.layout.hashes(records))
        return total % MODULUS

    # --- removed rows -------------------------------------------------------------------------------------

    def check_movers(self, before: int, after: int, movers: Sequence[int]) -> None:
        """Raise ValueError if a moving row, from `after` on, is damaged."""
        for tail, moving, _ in self._tail(before, after, movers, movers):
            if not self.layout.whole(tail[moving]).all():
                raise self.damaged()

    def move(self, note: Note) -> None:
        """Move rows into the holes, and overwrite removed rows.

        Moved rows are in the file twice afterwards, so that the move can be repeated.
        """
        first = note.after.count
        for tail, moving, holes in self._tail(note.before.count, first, note.holes, note.movers):
            records = tail[moving]
            # A damaged record is in its new place already: its old place was being overwritten.
            self._put_each(holes, records, self.layout.whole(records).tolist())
            records.fill(0)
            if len(moving) < len(tail):
                stays = np.zeros(len(tail), bool)
                stays[moving] = True
                tail[~stays] = 0
                self.put(first, tail)
            first += len(tail)

    def _tail(
        self, before: int, after: int, holes: Sequence[int], movers: Sequence[int]
    ) -> Iterator[tuple[Records, NDArray[np.int64], Sequence[int]]]:
        """Yield the records from `after` on in chunks, with the places of moving records and their holes."""
        places = np.asarray(movers, np.int64)
        for rows in _split(range(after, before)):
            here = slice(*np.searchsorted(places, (rows.start, rows.stop)).tolist())
            with self.some(rows) as records:
                yield records, places[here] - rows.start, holes[here]

    def _put_each(self, places: Sequence[int], records: Records, chosen: Sequence[bool]) -> None:
        """Write chosen records, each to its own place."""
        width, data = self.layout.width, records.reshape(-1).data
        for at, (place, wanted) in enumerate(zip(places, chosen, strict=True)):
            if wanted:
                self.disk.write(self.file, self.layout.place(place), data[at * width : (at + 1) * width])


def _split(rows: Numbers) -> Iterator[Numbers]:
    """Yield rows in chunks."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


def pieces(columns: Sequence[Tensor], hashes: Tensor, order: Tensor | None = None) -> Iterator[Part]:
    """Yield rows and hashes in chunks, sorted by `order` if given."""
    count = len(hashes)
    for start in range(0, count, _ROWS):
        part = slice(start, min(start + _ROWS, count))
        if order is None:
            yield [column[part] for column in columns], hashes[part]
            continue
        with Scratch() as scratch:
            yield [scratch(column[order[part]]) for column in columns], hashes[order[part].cpu()]

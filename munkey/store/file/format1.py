"""Files of the first format, with one column after another and a separate journal: reading and upgrading.

Letters: `R` rows the file has room for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from munkey.store.digest import checksum, hash_rows, sum_of
from munkey.store.file.disk import Disk, give_back, replacing, wipe, wipe_leftovers
from munkey.store.file.layout import BLOCK, DTYPES, STATE, Layout, State, described_by
from munkey.store.file.records import RecordFile, pieces
from munkey.store.schema import COLUMNS, columns_of, misfit

__all__ = ["upgrade"]

_JOURNAL, _LOCK = ".journal", ".lock"


def upgrade(disk: Disk, path: str, described: dict[str, Any], held: int) -> None:
    """Replace a file of the first format by a file of the present format with the same rows.

    Args:
        disk: `Disk` that reads and writes.
        path: path of the file.
        described: description of the file.
        held: locked descriptor of the file.

    Raises:
        BlockingIOError: if a store of the first release has the file open.
        ValueError: if the file is damaged; the file is then not changed.
    """
    there = disk.exists(path + _LOCK)
    guard = disk.open(path + _LOCK, create=True)
    try:
        if not disk.lock(guard):
            raise BlockingIOError(f"{path!r} is open in another store, here or in another process; close it there")
        old = _Old(disk, path, described, held)
        count, total = old.state()
        notes = old.notes()
        if notes:
            count, total = old.recovered(notes, count, total)
        columns = old.rows(count)
        hashes = hash_rows(old.secret, columns)
        if sum_of(hashes) != total:
            raise old.damaged()
        wrong = misfit(dict(zip(COLUMNS, columns, strict=True)), old.schema)
        if wrong:
            raise ValueError(f"{path!r} is no store that this library wrote: {wrong}")
        _write(disk, path, old, columns, hashes, held)
        if old.own(path + _JOURNAL):
            wipe(disk, path + _JOURNAL)
        there = not old.own(path + _LOCK)
        wipe_leftovers(disk, path)
    finally:
        if not there:
            disk.remove(path + _LOCK)
        give_back(disk, guard)


def _write(disk: Disk, path: str, old: _Old, columns: Sequence[Tensor], hashes: Tensor, held: int) -> None:
    layout = Layout(old.about, COLUMNS, old.shapes, old.dtypes, old.room, old.secret)
    with replacing(disk, path, held) as file:
        layout.write_header(disk, file)
        RecordFile(disk, file, layout, old.damaged).put_rows(0, pieces(columns, hashes))
        disk.write(file, STATE, State(len(hashes), sum_of(hashes), len(hashes)).to_bytes())
    give_back(disk, file)
    for column in columns:
        column.zero_()  # a copy of rows that may be forgotten later


class _Old:
    """A file of the first format."""

    def __init__(self, disk: Disk, path: str, described: dict[str, Any], file: int) -> None:
        self.disk, self.path, self.file = disk, path, file
        with described_by(path):
            self.dtypes = tuple(DTYPES[name] for name, _ in described["columns"])
            self.shapes = tuple(tuple(int(size) for size in shape) for _, shape in described["columns"])
            self.about, self.room = dict(described["about"]), int(described["room"])
            self.secret = bytes.fromhex(self.about.pop("secret"))
            *_, (keys,), (values,) = self.shapes
            self.schema = columns_of(keys, values, self.dtypes[-1])
            expected = [(column.shape, column.dtype) for column in self.schema]
            if list(zip(self.shapes, self.dtypes, strict=True)) != expected or min(keys, values, self.room + 1) < 1:
                raise KeyError("columns")
        widths = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        starts = [BLOCK + self.room * sum(widths[:place]) for place in range(len(widths))]
        self.places = list(zip(starts, widths, strict=True))
        if disk.size(file) != BLOCK + self.room * sum(widths):
            raise ValueError(
                f"{path!r} has {disk.size(file)} bytes, expected {BLOCK + self.room * sum(widths)}; it was cut short, "
                "or written to; restore a backup"
            )

    def damaged(self) -> ValueError:
        """Return the error for rows that differ from what was written."""
        return ValueError(f"{self.path!r} is damaged: its rows are not those that were written; restore a backup")

    def state(self) -> tuple[int, int]:
        """Return the number of rows and the sum of their hashes."""
        data = self.disk.read(self.file, STATE, 64)
        if checksum(data[:40])[:24] != data[40:]:
            raise ValueError(f"{self.path!r} is damaged: it does not say how many rows it has; restore a backup")
        count, total = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:40], "little")
        if count > self.room:
            raise ValueError(f"{self.path!r} is damaged: it says that it has more rows than places; restore a backup")
        return count, total

    def own(self, name: str) -> bool:
        """Return whether a file beside the store may belong to this library: no link, and empty or with notes."""
        if name not in self.disk.beside(name):
            return False
        file = self.disk.open_to_read(name)
        try:
            begins = self.disk.read(file, 0, 1)
            return self.disk.links(file) == 1 and begins in ((b"",) if name.endswith(_LOCK) else (b"", b"{", b"\0"))
        finally:
            self.disk.close(file)

    def notes(self) -> list[dict[str, Any]]:
        """Return the whole notes of the journal."""
        if not self.disk.exists(self.path + _JOURNAL):
            return []
        file, notes = self.disk.open_to_read(self.path + _JOURNAL), []
        try:
            data = self.disk.read(file, 0, self.disk.size(file))
        finally:
            self.disk.close(file)
        for line in data.split(b"\n")[:-1]:
            text, _, found = line.rpartition(b" ")
            if checksum(text) != found:
                break
            notes.append(json.loads(text))
        return notes

    def recovered(self, notes: list[dict[str, Any]], count: int, total: int) -> tuple[int, int]:
        """Finish an interrupted removal or take back an interrupted addition; return the state after that."""
        plan = notes[0]
        before, after = tuple(plan["before"]), tuple(plan["after"])
        if (count, total) not in (before, after):
            raise ValueError(
                f"the journal beside {self.path!r} is of another state of the file; if the file is a backup that was "
                f"put there, remove {self.path + _JOURNAL!r}"
            )
        if plan["change"] == "append":
            return count, total
        if (count, total) == before and len(notes) == 1:
            self._move(plan["movers"], plan["holes"])
        return int(after[0]), int(after[1])

    def _move(self, movers: Sequence[int], holes: Sequence[int]) -> None:
        """Copy rows to other places; the originals stay in place, so that the copy can be repeated."""
        for start, width in self.places:
            for mover, hole in zip(movers, holes, strict=True):
                row = bytearray(width)
                self.disk.fill(self.file, start + mover * width, memoryview(row))
                self.disk.write(self.file, start + hole * width, memoryview(row))
                row[:] = bytes(width)
        self.disk.sync(self.file)

    def rows(self, count: int) -> list[Tensor]:
        """Return all columns of the first rows."""
        columns = []
        for (start, width), shape, dtype in zip(self.places, self.shapes, self.dtypes, strict=True):
            data = bytearray(count * width)
            self.disk.fill(self.file, start, memoryview(data))
            column = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
            columns.append(column.view(count, *shape))
        return columns

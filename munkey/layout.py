"""Where the columns of a table lie in a file.

A block of 4096 bytes comes first: the description, and at its end the number of rows and the sum of their hashes. Then
one column after the other, each with room for all rows. Numbers are little-endian.

Letters: `R` rows the file has room for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from munkey.digest import checksum
from munkey.disk import Disk
from treediff.io import dtype_name

__all__ = ["Layout"]

_HEADER = 4096  # bytes: a block of a disk
_STATE = _HEADER - 64  # within one sector, which disks write at once
_FORMAT = 1
_ROWS = 4096  # at a time
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@dataclass(frozen=True)
class Layout:
    """A file's columns.

    Args:
        about: what the description says besides, as plain JSON.
        shapes: of a row of each column.
        dtypes: of each column.
        room: `R`.
    """

    about: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    room: int

    @property
    def widths(self) -> list[int]:
        """Bytes of a row of each column."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    @property
    def places(self) -> list[tuple[int, int]]:
        """First byte of each column, and bytes of one of its rows."""
        starts, start = [], _HEADER
        for width in self.widths:
            starts.append((start, width))
            start += self.room * width
        return starts

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return _HEADER + self.room * sum(self.widths)

    # --- description --------------------------------------------------------------------------------------

    def write_header(self, disk: Disk, file: int) -> None:
        """Write the description, and make the file as long as it is to be.

        Raises:
            ValueError: if the description does not fit.
        """
        columns = [[dtype_name(dtype), list(shape)] for dtype, shape in zip(self.dtypes, self.shapes, strict=True)]
        described = {"format": _FORMAT, "room": self.room, "columns": columns, "about": self.about}
        text = json.dumps(described, sort_keys=True).encode()
        if len(text) + 33 > _STATE:
            raise ValueError(f"the description of a store must fit into {_STATE - 33} bytes, found {len(text)}")
        disk.allocate(file, self.size)
        disk.write(file, 0, (text + b" " + checksum(text)).ljust(_STATE))

    @classmethod
    def read(cls, disk: Disk, file: int, path: str) -> Self:
        """The layout of a file.

        Raises:
            ValueError: if it has none, another format version, or another size than it says.
        """
        text, _, found = disk.read(file, 0, _STATE).rstrip().rpartition(b" ")
        if checksum(text) != found:
            raise ValueError(f"{path!r} is no store, or its first bytes are damaged; restore a backup")
        try:
            described = json.loads(text)
            if described["format"] != _FORMAT:
                raise ValueError(
                    f"{path!r} has format version {described['format']}, this munkey reads version {_FORMAT}; install "
                    "the release that wrote it"
                )
            dtypes = tuple(_DTYPES[name] for name, _ in described["columns"])
            shapes = tuple(tuple(int(size) for size in shape) for _, shape in described["columns"])
            layout = cls(dict(described["about"]), shapes, dtypes, int(described["room"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path!r} is no store: its description lacks something ({error!r})") from None
        if disk.size(file) != layout.size:
            raise ValueError(
                f"{path!r} has {disk.size(file)} bytes, expected {layout.size}; it was cut short, or written to; "
                "restore a backup"
            )
        return layout

    def write_state(self, disk: Disk, file: int, count: int, total: int) -> None:
        """Write the number of rows and the sum of their hashes."""
        state = count.to_bytes(8, "little") + total.to_bytes(32, "little")
        disk.write(file, _STATE, state + checksum(state)[:24])

    def read_state(self, disk: Disk, file: int, path: str) -> tuple[int, int]:
        """What `write_state` wrote.

        Raises:
            ValueError: if it is damaged.
        """
        data = disk.read(file, _STATE, 64)
        if checksum(data[:40])[:24] != data[40:]:
            raise ValueError(f"{path!r} is damaged: it does not say how many rows it has; restore a backup")
        return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:40], "little")

    # --- rows ---------------------------------------------------------------------------------------------

    def read_rows(self, disk: Disk, file: int, rows: Tensor) -> list[Tensor]:
        """All columns of some rows, in ascending order; those that lie together are read together."""
        columns = []
        for (start, width), shape, dtype in zip(self.places, self.shapes, self.dtypes, strict=True):
            data = bytearray(len(rows) * width)
            for place, first, count in _runs(rows):
                disk.fill(file, start + first * width, memoryview(data)[place * width : (place + count) * width])
            column = torch.frombuffer(data, dtype=dtype) if data else torch.zeros(0, dtype=dtype)
            columns.append(column.view(len(rows), *shape))
        return columns

    def write_rows(self, disk: Disk, file: int, first: int, columns: Sequence[Tensor]) -> None:
        """Write rows from a number on, some at a time."""
        for (start, width), column in zip(self.places, columns, strict=True):
            for number, part in enumerate(column.detach().split(_ROWS)):
                data = part.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                disk.write(file, start + (first + number * _ROWS) * width, data)

    def move_rows(self, disk: Disk, file: int, movers: Sequence[int], holes: Sequence[int]) -> None:
        """Copy rows to other places."""
        if not movers:
            return
        low, high = movers[0], movers[-1] + 1  # the last rows of the file
        for start, width in self.places:
            tail = bytearray((high - low) * width)
            disk.fill(file, start + low * width, memoryview(tail))
            for mover, hole in zip(movers, holes, strict=True):
                at = (mover - low) * width
                disk.write(file, start + hole * width, memoryview(tail)[at : at + width])
            tail[:] = bytes(len(tail))  # a copy of rows that may be forgotten later

    def zero_rows(self, disk: Disk, file: int, first: int, stop: int) -> None:
        """Overwrite rows with zeros."""
        for start, width in self.places:
            disk.zero(file, start + first * width, (stop - first) * width)


def _runs(rows: Tensor) -> list[tuple[int, int, int]]:
    """Stretches of consecutive numbers: place in the list, first number, how many."""
    if not len(rows):
        return []
    breaks = (rows.diff() != 1).nonzero().squeeze(1) + 1
    starts = torch.cat([breaks.new_zeros(1), breaks])
    counts = torch.cat([starts[1:], starts.new_tensor([len(rows)])]) - starts
    return list(zip(starts.tolist(), rows[starts].tolist(), counts.tolist(), strict=True))

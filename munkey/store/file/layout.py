"""Layout of the rows of a table in a file, format 2: row by row.

A block of 4096 bytes comes first: the description, and at its end the *state*. The state is the number of rows, the end
of places behind the rows that may hold data, and the sum of all row hashes. Then come the *records*, one for each row,
each in its place. A record is the bytes of all columns, padded to a multiple of 8, the hash of the row
(`munkey.store.digest`), and a *tag* that shows damage. Behind the records there is room for a note about a change that
is under way (`munkey.store.file.journal`). Numbers are little-endian.

The tag is the hash NH of UMAC (RFC 4418, section 5.2.2; Black et al., CRYPTO 1999) of a record's 32-bit words `m_i`,

    tag = sum over i of (m_2i + k_2i mod 2^32) (m_2i+1 + k_2i+1 mod 2^32)  mod 2^64,

with words `k_i` that are derived from the store's secret. A record that differs in any way has the same tag with a
probability of at most 2^-32. The tag is many times cheaper than the hash of the row, and is checked for all rows when a
file is opened.

Letters: `R` rows the file has room for, `W` bytes of a record.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from munkey.store.digest import HASH, checksum
from munkey.store.file.disk import Disk
from treediff.core.io import dtype_name

__all__ = ["BLOCK", "DTYPES", "STATE", "Layout", "Records", "State", "described_by", "read_description"]

BLOCK = 4096  # bytes: a block of a disk
STATE = BLOCK - 64  # within one sector, which disks write at once
_FORMAT = 2
_TAG = 8  # bytes
_CACHED = 512  # records at a time, which fit into a cache
DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}

Records = NDArray[np.uint8]


@dataclass(frozen=True)
class State:
    """The state of a file.

    Args:
        count: number of rows.
        total: sum of the hashes of the rows.
        tail: records from `count` up to `tail` may hold data, and are to be overwritten.
        logged: whether a log of receipts is kept beside the file, without which the file must not be opened.
    """

    count: int
    total: int
    tail: int
    logged: bool = False

    def to_bytes(self) -> bytes:
        """Return the state as 64 bytes."""
        numbers = (self.count, 7), (self.logged, 1), (self.tail, 8), (self.total, 32)
        data = b"".join(int(number).to_bytes(size, "little") for number, size in numbers)
        return data + checksum(data)[:16]

    @classmethod
    def from_bytes(cls, data: bytes) -> Self | None:
        """Return the state that `to_bytes` wrote; None if the bytes are damaged."""
        if checksum(data[:48])[:16] != data[48:]:
            return None
        count, logged, tail, total = (
            int.from_bytes(data[first:stop], "little") for first, stop in ((0, 7), (7, 8), (8, 16), (16, 48))
        )
        return cls(count, total, tail, bool(logged))


@dataclass(frozen=True)
class Layout:
    """The columns of a file, and the encoding of rows as records.

    Args:
        about: further content of the description, as plain JSON.
        names: names of the columns.
        shapes: shape of a row of each column.
        dtypes: dtype of each column.
        room: `R`.
        secret: secret of the store.
    """

    about: dict[str, Any]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    room: int
    secret: bytes

    @cached_property
    def widths(self) -> list[int]:
        """Bytes of a row of each column."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    @cached_property
    def hash_at(self) -> int:
        """Offset of the hash of a row in its record."""
        return -(-sum(self.widths) // 8) * 8

    @cached_property
    def width(self) -> int:
        """Bytes of a record, `W`."""
        return self.hash_at + HASH + _TAG

    @property
    def size(self) -> int:
        """Bytes of header and records."""
        return BLOCK + self.room * self.width

    def place(self, row: int) -> int:
        """Return the offset of a record in the file."""
        return BLOCK + row * self.width

    @cached_property
    def _words(self) -> NDArray[np.uint32]:
        """Words `k_i` of the tag."""
        return np.frombuffer(hashlib.shake_256(b"tag" + self.secret).digest(self.width - _TAG), "<u4")

    # --- header -------------------------------------------------------------------------------------------

    def write_header(self, disk: Disk, file: int) -> None:
        """Write the description, and extend the file to its full size.

        Raises:
            ValueError: if the description does not fit.
        """
        columns = [
            [name, dtype_name(dtype), list(shape)]
            for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True)
        ]
        about = {**self.about, "secret": self.secret.hex()}
        text = json.dumps({"format": _FORMAT, "room": self.room, "columns": columns, "about": about}, sort_keys=True)
        data = text.encode()
        if len(data) + 33 > STATE:
            raise ValueError(f"the description of a store must fit into {STATE - 33} bytes, found {len(data)}")
        disk.allocate(file, self.size)
        disk.write(file, 0, (data + b" " + checksum(data)).ljust(STATE))

    @classmethod
    def of(cls, described: dict[str, Any], disk: Disk, file: int, path: str) -> Self:
        """Return the layout of a file from its description.

        Raises:
            ValueError: if the description lacks an entry, or the file is shorter than described.
        """
        with described_by(path):
            names = tuple(str(name) for name, _, _ in described["columns"])
            dtypes = tuple(DTYPES[name] for _, name, _ in described["columns"])
            shapes = tuple(tuple(_size(size) for size in shape) for _, _, shape in described["columns"])
            about = dict(described["about"])
            secret = bytes.fromhex(about.pop("secret"))
            layout = cls(about, names, shapes, dtypes, _size(described["room"]), secret)
            if not 1 <= len(secret) <= 64:
                raise KeyError("secret")
        if disk.size(file) < layout.size:
            raise ValueError(
                f"{path!r} has {disk.size(file)} bytes, expected at least {layout.size}; it was cut short, or written "
                "to; restore a backup"
            )
        return layout

    # --- records ------------------------------------------------------------------------------------------

    def records(self, columns: Sequence[Tensor], hashes: Tensor) -> Records:
        """Return the records `(n, W)` of rows and their hashes."""
        records: Records = np.zeros((len(hashes), self.width), np.uint8)
        at = 0
        for column, width in zip(columns, self.widths, strict=True):
            rows = column.detach().reshape(len(column), -1).cpu().contiguous()
            records[:, at : at + width] = rows.view(torch.uint8).numpy()
            at += width
        records[:, self.hash_at : self.hash_at + HASH] = hashes.numpy()
        records[:, -_TAG:] = self.tags(records).view(np.uint8).reshape(-1, _TAG)
        return records

    def read(self, records: Records, columns: Sequence[Tensor], hashes: Tensor) -> None:
        """Write the content of records into contiguous columns `(n, ...)` and hashes `(n, 32)`, on a CPU.

        Raises:
            ValueError: if a boolean is neither 0 nor 1.
        """
        at = 0
        for column, width in zip(columns, self.widths, strict=True):
            to = column.detach().view(-1).view(torch.uint8).numpy().reshape(-1, width)
            if column.dtype == torch.bool and records[:, at : at + width].max(initial=0) > 1:
                raise ValueError("a truth value is 0 or 1")
            to[:] = records[:, at : at + width]
            at += width
        hashes.numpy()[:] = records[:, self.hash_at : self.hash_at + HASH]

    def hashes(self, records: Records) -> Tensor:
        """Return the hashes `(n, 32)` in records."""
        return torch.from_numpy(records[:, self.hash_at : self.hash_at + HASH].copy())

    def tags(self, records: Records) -> NDArray[np.uint64]:
        """Return the tags `(n,)` of records, computed from their content."""
        words = np.ascontiguousarray(records).view("<u4")[:, : len(self._words)]
        found = np.empty(len(records), "<u8")
        mixed = np.empty((min(_CACHED, len(records)), len(self._words)), "<u4")
        products = np.empty((len(mixed), len(self._words) // 2), "<u8")
        for start in range(0, len(records), _CACHED):
            part = words[start : start + _CACHED]
            here, both = mixed[: len(part)], products[: len(part)]
            np.copyto(here, part)  # an operand whose rows are apart would be copied to a buffer of NumPy's
            np.add(here, self._words, out=here)
            np.multiply(here[:, ::2], here[:, 1::2], out=both, dtype=np.uint64)
            both.sum(1, out=found[start : start + _CACHED])
        for copy in (mixed, products):  # of rows that may be forgotten later
            copy.fill(0)
        return found

    def whole(self, records: Records) -> NDArray[np.bool_]:
        """Return which records `(n,)` match their tags."""
        written = np.ascontiguousarray(records[:, -_TAG:]).view("<u8").reshape(-1)
        found: NDArray[np.bool_] = np.equal(self.tags(records), written)
        return found


class described_by:
    """Context that turns an error about an incomplete description into an error that names the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError | RecursionError):
            raise ValueError(
                f"{self.path!r} is no store: its description lacks something ({error!r}); restore a backup"
            ) from None


def _size(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**48:
        raise TypeError(f"a size is a whole number, found {number!r}")
    return number


def read_description(disk: Disk, file: int, path: str) -> dict[str, Any]:
    """Return the description of a file, of this format or the first format.

    Raises:
        ValueError: if there is no description, or the format is unknown.
    """
    text, _, found = disk.read(file, 0, STATE).rstrip().rpartition(b" ")
    if checksum(text) != found:
        raise ValueError(f"{path!r} is no store, or its first bytes are damaged; restore a backup")
    with described_by(path):
        described = json.loads(text)
        version = described["format"]
    if version not in (1, _FORMAT) or isinstance(version, bool):
        raise ValueError(
            f"{path!r} has format version {version}, this munkey reads versions 1 and {_FORMAT}; install the release "
            "that wrote it"
        )
    return dict(described)

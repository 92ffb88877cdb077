"""Databases that a store in a file is timed beside, with the same rows: SQLite and LMDB.

Both keep an id, a label, and key and value as bytes. A deletion is on the medium when `forget` returns. SQLite
overwrites deleted rows in its file (`secure_delete`). Its journal held the old pages; SQLite deletes or truncates the
journal, and these pages stay in free blocks of the disk. LMDB overwrites nothing: old pages stay in its file until new
pages need the room. `left` searches the files for rows.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROWS = 4096  # at a time
_CACHE = 256  # MiB: the 2 of SQLite's default overflow within a deletion, with a wait each time
_BLOCK = 1 << 26  # bytes
_NEEDLE = 64  # bytes of a key that are searched for


class Peer(Protocol):
    """A database in a separate folder, with rows of ids 0, 1, and so on."""

    def __init__(self, folder: Path, width: int) -> None: ...

    def fill(self, keys: Tensor) -> None:
        """Create rows with these keys `(R, D)`, which are the values as well, and stay open."""

    def open(self) -> None:
        """Open the files."""

    def forget(self, ids: Sequence[int]) -> None:
        """Delete rows, in one transaction."""

    def read(self) -> tuple[Tensor, ...]:
        """All rows: ids, labels, keys and values."""

    def close(self) -> None:
        """Close the files."""


class Columns:
    """Tensors that fill up, some rows at a time."""

    def __init__(self, room: int, width: int) -> None:
        self.ids, self.labels = np.empty(room, np.int64), np.empty(room, np.int64)
        self.keys, self.values = np.empty((room, width), np.float32), np.empty((room, width), np.float32)
        self.used = 0

    @property
    def all(self) -> tuple[NDArray, ...]:
        return self.ids, self.labels, self.keys, self.values

    def append(self, *rows: NDArray) -> None:
        stop = self.used + len(rows[0])
        for column, new in zip(self.all, rows, strict=True):
            column[self.used : stop] = new
        self.used = stop

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(x[: self.used]) for x in self.all)


def _some(keys: Tensor) -> Iterator[tuple[int, bytes]]:
    for start, part in zip(range(0, len(keys), _ROWS), keys.split(_ROWS), strict=True):
        for row, key in enumerate(part.numpy(), start):
            yield row, key.tobytes()


class SQLite:
    """A table in a file, with a rollback journal that is deleted after each transaction."""

    journal, after = "DELETE", ""

    def __init__(self, folder: Path, width: int) -> None:
        self.path, self.width = folder / "base", width

    def fill(self, keys: Tensor) -> None:
        base = sqlite3.connect(self.path)
        base.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, label INTEGER, key BLOB, value BLOB)")
        with base:
            base.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", ((row, -1, key, key) for row, key in _some(keys)))
        base.close()
        self.open()

    def open(self) -> None:
        self.base = sqlite3.connect(self.path, isolation_level=None)
        found = self.base.execute(f"PRAGMA journal_mode={self.journal}").fetchone()[0]
        if found != self.journal.lower():
            raise ValueError(f"SQLite keeps a journal of kind {found!r} there, expected {self.journal}")
        for setting in ("synchronous=FULL", "secure_delete=ON", f"cache_size=-{1024 * _CACHE}"):
            self.base.execute(f"PRAGMA {setting}").fetchall()

    def forget(self, ids: Sequence[int]) -> None:
        self.base.execute("BEGIN IMMEDIATE")
        self.base.executemany("DELETE FROM rows WHERE id = ?", ((instance,) for instance in ids))
        self.base.execute("COMMIT")
        if self.after and self.base.execute(self.after).fetchone()[0]:
            raise OSError("SQLite did not checkpoint the log, expected no other reader")

    def read(self) -> tuple[Tensor, ...]:
        last = self.base.execute("SELECT max(id) FROM rows").fetchone()[0]
        columns = Columns(0 if last is None else last + 1, self.width)
        cursor = self.base.execute("SELECT id, label, key, value FROM rows ORDER BY id")
        while some := cursor.fetchmany(_ROWS):
            ids, labels, keys, values = zip(*some, strict=True)
            columns.append(np.array(ids), np.array(labels), self._numbers(keys), self._numbers(values))
        return columns.tensors()

    def _numbers(self, rows: Iterable[bytes]) -> NDArray[np.float32]:
        return np.frombuffer(b"".join(rows), np.float32).reshape(-1, self.width)

    def close(self) -> None:
        self.base.close()


class SQLiteWAL(SQLite):
    """SQLite with a write-ahead log, which is checkpointed and truncated after each transaction."""

    journal, after = "WAL", "PRAGMA wal_checkpoint(TRUNCATE)"


class LMDB:
    """A tree in a file that is mapped into memory; ids are 8 bytes, the highest first."""

    def __init__(self, folder: Path, width: int) -> None:
        self.path = folder / "base"
        self.record = np.dtype([("label", "<i8"), ("key", "<f4", (width,)), ("value", "<f4", (width,))])

    def fill(self, keys: Tensor) -> None:
        self.open(max(1 << 30, 8 * len(keys) * self.record.itemsize))
        label = np.array(-1, "<i8").tobytes()
        pairs = ((row.to_bytes(8, "big"), label + key + key) for row, key in _some(keys))
        with self.base.begin(write=True) as writer:
            writer.cursor().putmulti(pairs, append=True)

    def open(self, size: int = 0) -> None:
        import lmdb

        self.base = lmdb.open(str(self.path), map_size=size, subdir=False, sync=True, metasync=True)

    def forget(self, ids: Sequence[int]) -> None:
        with self.base.begin(write=True) as writer:
            for instance in ids:
                if not writer.delete(instance.to_bytes(8, "big")):
                    raise KeyError(f"id {instance} is not there")

    def read(self) -> tuple[Tensor, ...]:
        with self.base.begin() as reader:
            columns = Columns(reader.stat()["entries"], self.record["key"].shape[0])
            entries = iter(reader.cursor())
            while some := list(itertools.islice(entries, _ROWS)):
                names, data = zip(*some, strict=True)
                ids, records = np.frombuffer(b"".join(names), ">i8"), np.frombuffer(b"".join(data), self.record)
                columns.append(ids, records["label"], records["key"], records["value"])
        return columns.tensors()

    def close(self) -> None:
        self.base.close()


PEERS: dict[str, type[Peer]] = {"sqlite": SQLite, "sqlite wal": SQLiteWAL}
if find_spec("lmdb"):
    PEERS["lmdb"] = LMDB


def filled(folder: Path, keys: Tensor, names: Iterable[str] = PEERS) -> dict[str, Peer]:
    """Open databases with these rows, each in a folder of the same name."""
    made = {}
    for name in names:
        (folder / name).mkdir()
        made[name] = PEERS[name](folder / name, keys.shape[1])
        made[name].fill(keys)
    return made


def left(folder: Path, keys: Tensor) -> int:
    """Number of the given keys that are still in the files of a folder; the files must be closed."""
    wanted = {row.tobytes()[:_NEEDLE] for row in keys.numpy()}
    found: set[bytes] = set()
    for path in folder.iterdir():
        with path.open("rb") as file:
            end = b""
            while block := file.read(_BLOCK):
                data = end + block
                found |= {needle for needle in wanted if needle in data}
                end = data[-_NEEDLE:]
    return len(found)

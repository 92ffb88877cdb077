"""File that follows a table row by row, and is whole whenever it is opened.

Rows have fixed places, so that a row is erased by overwriting it. A change is three writes with two waits:

1. a note is written with the numbers of the rows that change, and nothing of their content, *wait*;
2. new rows are written, or rows move into the holes and the other removed rows are overwritten with zeros. The state
   gets the new number of rows, *wait*;
3. the old places of moved rows are overwritten. Until then moved rows are in the file twice, removed rows not at all.

The next store that opens the file after an interruption finds the note. An interrupted removal moves its rows again:
old places are overwritten only when the new places are on the medium. The rows of an interrupted addition stay if all
of them are whole, and are removed otherwise. So the file holds the state before or the state after the change, and
nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import Enum, auto
from typing import NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Replaced
from munkey.store.digest import HASH, MODULUS, Digest, hash_rows, sum_of
from munkey.store.file.disk import Disk, Owner, check_name, replacing, wipe_leftovers
from munkey.store.file.format1 import upgrade
from munkey.store.file.journal import Note, clear, read_note, write_note
from munkey.store.file.layout import STATE, Layout, State, read_description
from munkey.store.file.records import Part, RecordFile, pieces
from munkey.store.follower import Follower, Undone
from munkey.store.table import Table

__all__ = ["Changing", "StoreFile"]

_BLOCK = 512  # rows at a time, which fit into a cache
_LOADED = 4096  # number of rows for which a further thread pays off


class Changing(ValueError):
    """Error for a read-only file that was changed meanwhile, so that the file has to be read again."""


class _Stage(Enum):
    """Progress of a change of a file."""

    NONE = auto()
    NOTING = auto()
    CHANGING = auto()
    FAILED = auto()
    CHANGED = auto()


class StoreFile(Follower):
    """An open file with the rows of a table.

    The file belongs to the process that opened it, which holds a lock on the file itself, whatever its name. A file
    that is opened to be read only has no lock, and refuses every change.

    Args:
        path: path of the file.
        disk: `Disk` that reads and writes.
        read_only: whether the file is opened to be read only.

    Attributes:
        state: number of rows, and the sum of their hashes.
        unsure: whether a change failed half way, so that file and memory may differ until the file is opened again.
    """

    file = -1
    layout: Layout
    _note: Note
    _seen: tuple[bytes, Note | None] | None = None  # state and note when the file was opened

    def __init__(self, path: str, disk: Disk, *, read_only: bool = False) -> None:
        self.path, self.disk, self.owner, self.read_only = path, disk, Owner(), read_only
        self.state = State(0, 0, 0)
        self.unsure = False
        self._table: Table | None = None
        self._digest: Digest | None = None
        self._stage = _Stage.NONE
        self._next: replacing | None = None

    # --- opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, layout: Layout, parts: Iterable[Part], disk: Disk) -> Self:
        """Return a new file with some rows.

        Raises:
            FileExistsError: if there is a file of that name.
            OSError: if the file cannot be written; then there is no file.
        """
        path = disk.resolve(path)
        if disk.exists(path):
            raise FileExistsError(f"there is a file {path!r} already; open it, or remove it")
        made = cls(path, disk)
        with made._closed_on_error():
            made._write_whole(layout, parts)
        return made

    @classmethod
    def open(cls, path: str, disk: Disk, *, read_only: bool = False) -> Self:
        """Return an existing file as it is; `recover`, then `load`, then `settle` make the file ready for changes.

        Raises:
            FileNotFoundError: if there is no such file.
            BlockingIOError: if another store has the file open, unless `read_only`.
            Changing: if `read_only`, and another process changes the file at this moment.
            ValueError: if the file is damaged, cut short, or of another kind.
        """
        path = disk.resolve(path)
        if not disk.exists(path):
            raise FileNotFoundError(f"no store at {path!r}")
        made = cls(path, disk, read_only=read_only)
        with made._closed_on_error():
            made._open()
            described = read_description(disk, made.file, path)
            if described["format"] == 1:
                if read_only:
                    raise ValueError(
                        f"{path!r} has the first format, which cannot be read without being changed; open it once to "
                        "be written, or read a copy"
                    )
                upgrade(disk, path, described, made.file)
                made._open()
                described = read_description(disk, made.file, path)
            made.layout = Layout.of(described, disk, made.file, path)
            made._read_state()
        return made

    def _open(self) -> None:
        """Open and lock the file that has the name, not a file that is being replaced."""
        while True:
            file, self.file = self.file, -1
            if file >= 0:
                self.disk.close(file)
            self.file = self.disk.open_to_read(self.path) if self.read_only else self.disk.open(self.path)
            if not self.read_only and not self.disk.lock(self.file):
                raise BlockingIOError(
                    f"{self.path!r} is open in another store, here or in another process; close it there"
                )
            if self.disk.is_of(self.file, self.path):
                return

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            changing = isinstance(error, ValueError) and self.file >= 0 and self.moved_on
            self.release()
            if changing:
                raise self._changing() from None
            raise

    def load(self, columns: Sequence[Tensor]) -> Tensor:
        """Read all rows into columns `(M, ...)`, and check every row; return their hashes `(M, 32)`.

        Raises:
            ValueError: if a row differs from what was written.
        """
        count, layout = self.state.count, self.layout
        hashes = torch.zeros(count, HASH, dtype=torch.uint8)
        threads = max(1, min(torch.get_num_threads(), count // _LOADED))

        def read(first: int) -> None:
            for start in range(first * _BLOCK, count, threads * _BLOCK):
                stop = min(start + _BLOCK, count)
                records = buffers[first][: stop - start]
                self.disk.fill(self.file, layout.place(start), records.reshape(-1).data)
                if not layout.whole(records).all():
                    raise self._damaged()
                try:
                    layout.read(records, [c[start:stop] for c in columns], hashes[start:stop])
                except ValueError as error:
                    raise ValueError(f"{self.path!r} is no store that this library wrote: {error}") from None

        # Reading and checking release Python's lock, so that threads share the work.
        buffers = np.zeros((threads, min(_BLOCK, count), layout.width), np.uint8)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(read, range(threads)):
                    pass
        finally:
            buffers.fill(0)  # copies of rows that may be forgotten later
        if sum_of(hashes) != self.state.total:
            raise self._damaged()
        return hashes

    def verify(self) -> None:
        """Hash every row in the file, and compare with the stored hashes.

        Raises:
            ValueError: if a row differs from what was written, or the file is closed.
        """
        self._usable()
        for columns, hashes in self._parts():
            if not torch.equal(hash_rows(self.layout.secret, columns), hashes):
                raise self._damaged()

    @property
    def moved_on(self) -> bool:
        """True if another process has changed or replaced the file since it was opened to be read only."""
        if not self.read_only:
            return False
        return not self.disk.is_of(self.file, self.path) or (self._seen is not None and self._look() != self._seen)

    def _look(self) -> tuple[bytes, Note | None]:
        """Read the state in the file, and the note behind the records."""
        state = self.disk.read(self.file, STATE, 64)
        try:
            return state, read_note(self.disk, self.file, self.layout.size)
        except (KeyError, TypeError, ValueError, RecursionError):  # the checksum of the note is right
            raise ValueError(
                f"{self.path!r} is damaged: the note of its last change is none that this library wrote; restore a "
                "backup"
            ) from None

    def _changing(self) -> Changing:
        return Changing(
            f"{self.path!r} is in the midst of a change; read it again when the store that changes it has done so, or "
            "open it once to be written, which finishes the change"
        )

    def _damaged(self) -> ValueError:
        if self.moved_on:
            return self._changing()
        return ValueError(f"{self.path!r} is damaged: its rows are not those that were written; restore a backup")

    def follow(self, table: Table, digest: Digest) -> None:
        """Follow a table with the same rows as the file from now on."""
        self._table, self._digest = table, digest

    def close(self) -> None:
        """Finish pending overwrites, and close the file; see `release`."""
        if self.file >= 0 and self.owner.here and not self.read_only and not self.unsure:
            with suppress(OSError):  # the next open does the same
                self._settle()
        self.release()

    def release(self) -> None:
        """Unlock and close the file as it is; in a forked process, only close the descriptor."""
        if self.file >= 0:
            if self.owner.here and not self.read_only:
                # Closing alone keeps the lock if forked processes share the descriptor.
                self.disk.unlock(self.file)
            self.disk.close(self.file)
        if self._next is not None and self._next.file != self.file and self.owner.here:
            self._next.release()  # a new file that replaced this file just before an interruption
        self.file, self._next = -1, None

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a store in a file cannot be pickled, as two would write to one file; save the model, or copy it"
        )

    def settle(self) -> None:
        """Overwrite the leftovers of an interruption, in and beside the file, once all rows are known to be whole."""
        wipe_leftovers(self.disk, self.path)
        self._settle()

    def _settle(self) -> None:
        """Overwrite everything behind the rows, and remove the note."""
        count, tail = self.state.count, self.state.tail
        if tail > count or self.disk.size(self.file) > self.layout.size:
            self._records.zero(count, tail)
            self.disk.sync(self.file)
            self._put_state(replace(self.state, tail=count))
            clear(self.disk, self.file, self.layout.size)
            self.disk.sync(self.file)

    @property
    def _records(self) -> RecordFile:
        return RecordFile(self.disk, self.file, self.layout, self._damaged)

    def _parts(self) -> Iterator[Part]:
        return self._records.parts(self.state.count, self.state.total)

    def _put_state(self, state: State) -> None:
        self.disk.write(self.file, STATE, state.to_bytes())
        self.state = state

    # --- changes ------------------------------------------------------------------------------------------

    def _usable(self) -> None:
        if self.file < 0:
            raise ValueError(f"the store in {self.path!r} is closed; open it again")

    def ready(self) -> None:
        """Raise an error if the file cannot be changed.

        Raises:
            ValueError: if the file is closed, or was opened to be read only.
            OSError: if a change failed half way.
            RuntimeError: in a process that was forked from the process that opened the file.
        """
        self._usable()
        if self.read_only:
            raise ValueError(f"{self.path!r} was opened to be read only; open it without read_only=True to change it")
        self.owner.check(f"the store in {self.path!r}")
        if self.unsure:
            raise OSError(
                f"{self.path!r} failed half way through a change; close the store and open it, which fixes the file"
            )

    def check(self, change: Change) -> None:
        """Raise an error if the file cannot be changed; see `ready`."""
        if not (isinstance(change, Moved) and change.order is None):
            self.ready()

    def write_ahead(self, change: Change) -> None:
        """Change the file.

        Raises:
            OSError: if a write fails. Unless `unsure`, the file is unchanged.
        """
        self._stage = _Stage.NONE
        table: Table = self._table  # type: ignore[assignment]
        digest: Digest = self._digest  # type: ignore[assignment]
        if isinstance(change, Added):
            self._append([column[change.rows] for column in table.columns], digest.of_new(change))
        elif isinstance(change, Removed) and len(change.gone):
            self._erase(change)
        elif isinstance(change, Moved) and change.order is not None:
            self.rebuild(pieces(table.columns, digest.hashes(), change.order), room=change.count, then=_Stage.CHANGED)
        elif isinstance(change, Replaced):
            rows = [rows.to(column) for rows, column in zip(change.columns, table.columns, strict=True)]
            hashes = hash_rows(self.layout.secret, rows)
            self.rebuild(pieces(rows, hashes), room=change.count, then=_Stage.CHANGED)

    def undo(self, change: Change) -> Undone:
        """Take back an addition; finish a removal if its note is already written.

        After an error of the disk nothing is finished: written data may not be on the medium.
        """
        if self._stage is _Stage.NONE:
            return Undone.STUCK if self.unsure else Undone.BACK
        if self._stage is _Stage.FAILED and isinstance(change, Removed):
            return Undone.STUCK
        stage, self._stage, self.unsure = self._stage, _Stage.NONE, True
        if not isinstance(change, Added) and stage is not _Stage.NOTING:
            if stage is _Stage.CHANGING:
                self._move(self._note)
            self.unsure = False
            return Undone.FORWARD
        before = self._note.before
        if isinstance(change, Added):
            self._records.zero(change.start, change.stop)
            self._put_state(replace(before, tail=change.stop))
        clear(self.disk, self.file, self.layout.size)
        self.disk.sync(self.file)
        self.unsure = False
        return Undone.BACK

    def _carry_out(self, note: Note, act: Callable[[], None]) -> None:
        """Write a note and then a change, and keep track of the progress at every moment."""
        self._note, self._stage = note, _Stage.NOTING
        write_note(self.disk, self.file, self.layout.size, note)
        self._stage, self.unsure = _Stage.CHANGING, True  # until it is finished or taken back
        try:
            act()
        except OSError:
            self._stage = _Stage.FAILED
            raise
        self._stage, self.unsure = _Stage.CHANGED, False

    def keep_log(self) -> None:
        """Record that a log is kept beside the file."""
        self.ready()
        if not self.state.logged:
            self._settle()  # recovery from the note of an earlier change would reset `logged`
            self._put_state(replace(self.state, logged=True))
            self.disk.sync(self.file)

    def _append(self, columns: Sequence[Tensor], hashes: Tensor) -> None:
        count = self.state.count
        stop = count + len(hashes)
        if stop > self.layout.room:
            self.rebuild(self._parts(), room=max(stop, count + count // 2))
        total = (self.state.total + sum_of(hashes)) % MODULUS
        after = replace(self.state, count=stop, total=total, tail=stop)

        def write() -> None:
            self._records.put_rows(count, pieces(columns, hashes))
            self._put_state(after)
            self.disk.sync(self.file)

        self._carry_out(Note("append", self.state, after), write)

    def _erase(self, change: Removed) -> None:
        holes, movers = change.holes.tolist(), change.movers.tolist()
        self._records.check_movers(change.before, change.after, movers)
        after = replace(self.state, count=change.after, total=self._total_after(change), tail=change.before)
        note = Note("erase", self.state, after, holes, movers)
        self._carry_out(note, lambda: self._move(note))

    def _total_after(self, change: Removed) -> int:
        """Return the sum of the hashes in the file after a removal."""
        digest: Digest = self._digest  # type: ignore[assignment]
        if digest.known and digest.total() == self.state.total:
            return digest.total_after(change)
        # Values were trained after they were written.
        gone = self._records.total(change.gone.tolist())
        if gone is None:
            raise self._damaged()
        return (self.state.total - gone) % MODULUS

    def _move(self, note: Note) -> None:
        records = self._records
        records.move(note)
        self._put_state(note.after)
        self.disk.sync(self.file)
        records.zero(note.after.count, note.after.tail)

    def rebuild(self, parts: Iterable[Part], *, room: int, then: _Stage = _Stage.NONE) -> None:
        """Write rows to a new file, which replaces this file; the bytes of this file are overwritten.

        Args:
            parts: the rows.
            room: number of rows that the new file has room for.
            then: stage of the change once the file is replaced.

        Raises:
            FileNotFoundError: if the file was renamed or removed since it was opened.
            OSError: if the new file cannot be written. This file is then unchanged, unless it was about to be replaced:
                then the store must be opened again.
        """
        self.ready()
        check_name(self.disk, self.file, self.path)
        old, file = self.layout, self.file
        self._write_whole(Layout(old.about, old.names, old.shapes, old.dtypes, room, old.secret), parts, file, then)
        self.disk.close(file)

    def _write_whole(self, layout: Layout, parts: Iterable[Part], held: int = -1, then: _Stage = _Stage.NONE) -> None:
        count = total = 0
        self._next = replacing(self.disk, self.path, held, new=held < 0)
        with self._next as file:
            layout.write_header(self.disk, file)
            records = RecordFile(self.disk, file, layout, self._damaged)
            for columns, hashes in parts:
                records.put_rows(count, [(columns, hashes)])
                count, total = count + len(hashes), total + sum_of(hashes)
            state = State(count, total % MODULUS, count, self.state.logged)
            self.disk.write(file, STATE, state.to_bytes())
            self.disk.sync(file)
            self.unsure = True  # from here on it is unknown which file the name leads to
        self.file, self.layout, self.state = file, layout, state
        self._next, self._stage = None, then
        self.unsure = False

    # --- recovery -----------------------------------------------------------------------------------------

    def _read_state(self) -> None:
        self._seen = found, note = self._look()
        state = State.from_bytes(found)
        if note is not None and not note.fits(self.layout.room):
            raise ValueError(
                f"{self.path!r} is damaged: the note of its last change is of rows it cannot have; restore a backup"
            )
        if state is None and (note is None or self.read_only):
            raise ValueError(f"{self.path!r} is damaged: it does not say how many rows it has; restore a backup")
        self.state = state or note.after  # type: ignore[union-attr]
        if not self.state.count <= self.layout.room or not self.state.tail <= self.layout.room:
            raise ValueError(f"{self.path!r} is damaged: it says that it has more rows than places; restore a backup")

    def recover(self) -> None:
        """Finish an interrupted removal; keep the rows of an interrupted addition if all are whole, or take them back.

        Raises:
            Changing: if a file that was opened to be read only is in the midst of a change.
        """
        _, note = self._seen  # type: ignore[misc]
        if note is None or not (_same(self.state, note.before) or _same(self.state, note.after)):
            return
        if self.read_only:
            if not _same(self.state, note.after) and note.change != "append":  # an addition changes no present row
                raise self._changing()
        elif note.change == "erase":
            self._move(note)
        elif self._arrived(note):
            self._put_state(note.after)
        else:
            self._put_state(replace(note.before, tail=note.after.count))

    def _arrived(self, note: Note) -> bool:
        """Return whether all rows of an interrupted addition are in the file."""
        coming = self._records.total(range(note.before.count, note.after.count))
        return coming is not None and (note.before.total + coming) % MODULUS == note.after.total


def _same(one: State, other: State) -> bool:
    return (one.count, one.total) == (other.count, other.total)

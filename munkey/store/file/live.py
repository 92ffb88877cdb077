"""A file that follows a table row for row, and is whole whenever it is opened.

Rows have fixed places, so that a row is erased by overwriting it. A change is three writes with two waits:

1. a note says which rows change, by number, and never what is in them; *wait*;
2. new rows are written, or rows move into the holes and the others that go are overwritten with zeros, and the state
   says how many there are; *wait*;
3. the places that rows moved from are overwritten. Rows that stay are there twice until then, no row that went.

Whoever opens the file after an interruption finds the note. Rows that were going are moved again: their old places are
overwritten only when the new ones are on the medium. Rows that were coming stay if all of them are whole, and go
otherwise. So the file holds the state before or the state after, and nothing in between.
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
from numpy.typing import NDArray
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Replaced, Step, long_lived
from munkey.store.digest import HASH, MODULUS, Digest, hash_rows, sum_of
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk, Owner, check_name, replacing, wipe_leftovers
from munkey.store.file.format1 import upgrade
from munkey.store.file.journal import Note, clear, read_note, write_note
from munkey.store.file.layout import STATE, Layout, Records, State, read_description
from munkey.store.follower import Follower, Undone
from munkey.store.table import Table

__all__ = ["Changing", "StoreFile", "pieces"]

_ROWS = 4096  # at a time
_BLOCK = 512  # at a time, which a cache holds

#: Rows `(n, ...)` of all columns, and their hashes `(n, 32)`.
Part = tuple[Sequence[Tensor], Tensor]


class Changing(ValueError):
    """A file that was opened to be read was changed meanwhile, so that it has to be read again."""


class _Stage(Enum):
    """How far a change of a file is."""

    NONE = auto()
    NOTING = auto()
    CHANGING = auto()
    FAILED = auto()
    CHANGED = auto()


class StoreFile(Follower):
    """An open file with the rows of a table.

    It belongs to the process that opened it, which holds a lock on the file itself, whatever its name. A file that is
    opened to be read has no lock, and refuses every change.

    Args:
        path: the file.
        disk: what reads and writes.
        read_only: whether it is opened to be read only.

    Attributes:
        state: number of rows, and the sum of their hashes.
        unsure: whether a change failed half way, so that file and memory may differ until the file is opened again.
    """

    file = -1
    layout: Layout
    _note: Note
    _seen: tuple[bytes, Note | None] | None = None  # what a reader found

    def __init__(self, path: str, disk: Disk, *, read_only: bool = False) -> None:
        self.path, self.disk, self.owner, self.read_only = path, disk, Owner(), read_only
        self.state = State(0, 0, 0)
        self._hashes = torch.zeros(0, HASH, dtype=torch.uint8)
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
            OSError: if it cannot be written; then there is none.
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
        """Return an existing file as it is; `recover`, then `load`, then `settle` make it ready for changes.

        Raises:
            FileNotFoundError: if there is no such file.
            BlockingIOError: if another store has it open, unless it is to be read only.
            Changing: if it is to be read only, and another process changes it at this moment.
            ValueError: if it is damaged, cut short, or of another kind.
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
        """Open and lock the file that has the name, not one that is just being replaced."""
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

    @property
    def hashes(self) -> Tensor:
        """Hashes `(M, 32)` of the rows as they are in the file."""
        return self._hashes[: self.state.count]

    def load(self, columns: Sequence[Tensor]) -> None:
        """Read all rows into columns `(M, ...)`, and check every one of them.

        Raises:
            ValueError: if a row is not what was written.
        """
        count = self.state.count
        with long_lived():
            self._hashes = torch.zeros(self.layout.room, HASH, dtype=torch.uint8)

        threads = max(1, min(torch.get_num_threads(), count // _ROWS))

        def read(first: int) -> None:
            for start in range(first * _BLOCK, count, threads * _BLOCK):
                stop = min(start + _BLOCK, count)
                records = buffers[first][: stop - start]
                self.disk.fill(self.file, self.layout.place(start), records.reshape(-1).data)
                if not self.layout.whole(records).all():
                    raise self._damaged()
                try:
                    self.layout.read(records, [c[start:stop] for c in columns], self._hashes[start:stop])
                except ValueError as error:
                    raise ValueError(f"{self.path!r} is no store that this library wrote: {error}") from None

        # Reading and checking leave Python's lock alone, so that threads share the work.
        buffers = np.zeros((threads, min(_BLOCK, count), self.layout.width), np.uint8)
        try:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(read, range(threads)):
                    pass
        finally:
            buffers.fill(0)  # copies of rows that may be forgotten later
        if sum_of(self.hashes) != self.state.total:
            raise self._damaged()

    def verify(self) -> None:
        """Hash every row in the file, and compare with what was written.

        Raises:
            ValueError: if a row is not what was written, or the file is closed.
        """
        self._usable()
        for columns, hashes in self._parts():
            if not torch.equal(hash_rows(self.layout.secret, columns), hashes):
                raise self._damaged()

    @property
    def moved_on(self) -> bool:
        """Whether another process has changed or replaced the file since it was opened to be read."""
        if not self.read_only:
            return False
        return not self.disk.is_of(self.file, self.path) or (self._seen is not None and self._look() != self._seen)

    def _look(self) -> tuple[bytes, Note | None]:
        """Return the state as it is in the file, and the note behind the records."""
        state = self.disk.read(self.file, STATE, 64)
        try:
            return state, read_note(self.disk, self.file, self.layout.size)
        except (KeyError, TypeError, ValueError, RecursionError):  # with the right checksum
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
        """Follow a table, which holds what the file holds, from now on."""
        self._table, self._digest = table, digest

    def close(self) -> None:
        """Overwrite what is left to be, and give the file back; see `release`."""
        if self.file >= 0 and self.owner.here and not self.read_only and not self.unsure:
            with suppress(OSError):  # whoever opens it next does the same
                self._settle()
        self.release()

    def release(self) -> None:
        """Give the file back as it is; in a forked process, its descriptor alone."""
        if self.file >= 0:
            if self.owner.here and not self.read_only:
                # Not only by closing, as forked processes may share the descriptor.
                self.disk.unlock(self.file)
            self.disk.close(self.file)
        if self._next is not None and self._next.file != self.file and self.owner.here:
            self._next.release()  # a file that took the place of the other one when this was interrupted
        self.file, self._next = -1, None

    def __del__(self) -> None:
        with suppress(Exception):
            self.release()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a store in a file cannot be pickled, as two would write to one file; save the model, or copy it"
        )

    def settle(self) -> None:
        """Overwrite what an interruption left, here and beside the file, once it is known that the rows are whole."""
        wipe_leftovers(self.disk, self.path)
        self._settle()

    def _settle(self) -> None:
        """Leave nothing behind the rows, and no note."""
        count, tail = self.state.count, self.state.tail
        if tail > count or self.disk.size(self.file) > self.layout.size:
            self._zero(count, tail)
            self.disk.sync(self.file)
            self._put_state(replace(self.state, tail=count))
            clear(self.disk, self.file, self.layout.size)
            self.disk.sync(self.file)

    # --- records ------------------------------------------------------------------------------------------

    @contextmanager
    def _some(self, start: int, stop: int) -> Iterator[Records]:
        """Give the records of some rows, a copy that is overwritten when the context is left."""
        data = bytearray((stop - start) * self.layout.width)
        try:
            self.disk.fill(self.file, self.layout.place(start), memoryview(data))
            yield np.frombuffer(data, np.uint8).reshape(-1, self.layout.width)
        finally:
            data[:] = bytes(len(data))

    def _put(self, first: int, records: Records) -> None:
        self.disk.write(self.file, self.layout.place(first), np.ascontiguousarray(records).data.cast("B"))

    def _put_each(self, places: Sequence[int], records: Records, chosen: Sequence[bool]) -> None:
        """Write chosen records to places of their own."""
        width, data = self.layout.width, records.reshape(-1).data
        for at, (place, wanted) in enumerate(zip(places, chosen, strict=True)):
            if wanted:
                self.disk.write(self.file, self.layout.place(place), data[at * width : (at + 1) * width])

    def _zero(self, first: int, stop: int) -> None:
        if stop > first:
            self.disk.zero(self.file, self.layout.place(first), (stop - first) * self.layout.width)

    def _put_state(self, state: State) -> None:
        self.disk.write(self.file, STATE, state.to_bytes())
        self.state = state

    def _parts(self) -> Iterator[Part]:
        """Give all rows in the file, some at a time, once they are checked.

        Raises:
            ValueError: if a row is not what was written, as when something else wrote to the file.
        """
        total = 0
        for start in range(0, self.state.count, _ROWS):
            stop = min(start + _ROWS, self.state.count)
            with self._some(start, stop) as records, Scratch() as scratch:
                columns = [
                    scratch(torch.zeros(stop - start, *shape, dtype=dtype))
                    for shape, dtype in zip(self.layout.shapes, self.layout.dtypes, strict=True)
                ]
                hashes = torch.zeros(stop - start, HASH, dtype=torch.uint8)
                self.layout.read(records, columns, hashes)
                total += sum_of(hashes)
                if not self.layout.whole(records).all() or not torch.equal(hashes, self.hashes[start:stop]):
                    raise self._damaged()
                yield columns, hashes
        if total % MODULUS != self.state.total:
            raise self._damaged()

    # --- changes ------------------------------------------------------------------------------------------

    @property
    def broken(self) -> bool:
        """Whether a change failed half way."""
        return self.unsure

    def _usable(self) -> None:
        if self.file < 0:
            raise ValueError(f"the store in {self.path!r} is closed; open it again")

    def ready(self) -> None:
        """Raise an error if the file cannot be changed.

        Raises:
            ValueError: if it is closed, or was opened to be read only.
            OSError: if a change failed half way.
            RuntimeError: in a process that was forked from the one that opened it.
        """
        self._usable()
        if self.read_only:
            raise ValueError(f"{self.path!r} was opened to be read only; open it without read_only=True to change it")
        self.owner.check(f"the store in {self.path!r}")
        if self.unsure:
            raise OSError(
                f"{self.path!r} failed half way through a change; close the store and open it, which mends it"
            )

    def check(self, change: Change) -> None:
        """Raise an error if the file cannot be changed, see `ready`."""
        if not (isinstance(change, Moved) and change.order is None):
            self.ready()

    def write_ahead(self, change: Change) -> None:
        """Change the file.

        Raises:
            OSError: if that fails. Unless `unsure`, the file is as it was.
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

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that follows rows which go; other changes are followed as they are written."""
        if not isinstance(change, Removed) or not len(change.gone):
            return []
        return [change.erase(self._hashes, scratch)]

    def undo(self, change: Change) -> Undone:
        """Take back rows that were coming; finish rows that were going once the note about them is written.

        After an error of the disk nothing is finished: what was written may not be on the medium.
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
            self._zero(change.start, change.stop)
            self._put_state(replace(before, tail=change.stop))
        clear(self.disk, self.file, self.layout.size)
        self.disk.sync(self.file)
        self.unsure = False
        return Undone.BACK

    def _carry_out(self, note: Note, act: Callable[[], None]) -> None:
        """Write a note and then a change, and know at any moment how far it is."""
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
        """Note that a log is kept beside the file."""
        self.ready()
        if not self.state.logged:
            self._settle()  # a note of a change from before would say that there is no log
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
            for (rows, some), first in zip(pieces(columns, hashes), range(count, stop, _ROWS), strict=True):
                records = self.layout.records(rows, some)
                self._put(first, records)
                records.fill(0)  # a copy of rows that may be forgotten later
            self._put_state(after)
            self.disk.sync(self.file)
            self._hashes[count:stop] = hashes

        self._carry_out(Note("append", self.state, after), write)

    def _erase(self, change: Removed) -> None:
        total = (self.state.total - sum_of(self.hashes[change.gone.cpu()])) % MODULUS
        after = replace(self.state, count=change.after, total=total, tail=change.before)
        note = Note("erase", self.state, after, change.holes.tolist(), change.movers.tolist())
        for tail, moving, _ in self._tail(note):
            if not self.layout.whole(tail[moving]).all():
                raise self._damaged()
        self._carry_out(note, lambda: self._move(note))

    def _move(self, note: Note) -> None:
        """Move rows into the holes, and overwrite what goes.

        Rows that move are there twice until the last line, so that they can be moved again.
        """
        first = note.after.count
        for tail, moving, holes in self._tail(note):
            records = tail[moving]
            # A record that is not whole is in its new place already, and the old one was being overwritten.
            self._put_each(holes, records, self.layout.whole(records).tolist())
            records.fill(0)
            stays = np.zeros(len(tail), bool)
            stays[moving] = True
            tail[~stays] = 0
            self._put(first, tail)
            first += len(tail)
        self._put_state(note.after)
        self.disk.sync(self.file)
        self._zero(note.after.count, note.after.tail)

    def _tail(self, note: Note) -> Iterator[tuple[Records, NDArray[np.int64], Sequence[int]]]:
        """Give the records behind the rows that stay, some at a time: those that move, and their holes."""
        movers = np.asarray(note.movers, np.int64)
        for start in range(note.after.count, note.before.count, _ROWS):
            stop = min(start + _ROWS, note.before.count)
            here = slice(*np.searchsorted(movers, (start, stop)).tolist())
            with self._some(start, stop) as records:
                yield records, movers[here] - start, note.holes[here]

    def rebuild(self, parts: Iterable[Part], *, room: int, then: _Stage = _Stage.NONE) -> None:
        """Write rows to a new file and put it in the place of this one, whose bytes are overwritten.

        Args:
            parts: the rows.
            room: how many rows there is to be room for.
            then: how far the change is that this is for, once it is done.

        Raises:
            FileNotFoundError: if the file was renamed or removed since it was opened.
            OSError: if it cannot be written; then the file is as it was, unless it was about to be replaced: then it
                is to be opened again.
        """
        self.ready()
        check_name(self.disk, self.file, self.path)
        old, file = self.layout, self.file
        self._write_whole(Layout(old.about, old.names, old.shapes, old.dtypes, room, old.secret), parts, file, then)
        self.disk.close(file)

    def _write_whole(self, layout: Layout, parts: Iterable[Part], held: int = -1, then: _Stage = _Stage.NONE) -> None:
        count = total = 0
        all_hashes = [torch.zeros(0, HASH, dtype=torch.uint8)]
        self._next = replacing(self.disk, self.path, held, new=held < 0)
        with self._next as file:
            layout.write_header(self.disk, file)
            for columns, hashes in parts:
                records = layout.records(columns, hashes)
                self.disk.write(file, layout.place(count), records.data.cast("B"))
                records.fill(0)  # a copy of rows that may be forgotten later
                count, total = count + len(hashes), total + sum_of(hashes)
                all_hashes.append(hashes)
            state = State(count, total % MODULUS, count, self.state.logged)
            self.disk.write(file, STATE, state.to_bytes())
            self.disk.sync(file)
            self.unsure = True  # which file the name leads to is not known from here on
        with long_lived():
            kept = torch.zeros(layout.room, HASH, dtype=torch.uint8)
            torch.cat(all_hashes, out=kept[:count])
        self.file, self.layout, self.state, self._hashes = file, layout, state, kept
        self._next, self._stage = None, then
        self.unsure = False

    # --- what a note announces ----------------------------------------------------------------------------

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
        """Finish rows that were going; keep rows that were coming if they are whole, or take them back.

        Raises:
            Changing: if a file that is to be read only is in the midst of a change.
        """
        _, note = self._seen  # type: ignore[misc]
        if note is None or not (_same(self.state, note.before) or _same(self.state, note.after)):
            return
        if self.read_only:
            if not _same(self.state, note.after) and note.change != "append":  # what is coming is written behind
                raise self._changing()
        elif note.change == "erase":
            self._move(note)
        elif self._arrived(note):
            self._put_state(note.after)
        else:
            self._put_state(replace(note.before, tail=note.after.count))

    def _arrived(self, note: Note) -> bool:
        """Return whether all rows that were coming are there."""
        total = note.before.total
        for start in range(note.before.count, note.after.count, _ROWS):
            with self._some(start, min(start + _ROWS, note.after.count)) as records:
                if not self.layout.whole(records).all():
                    return False
                total += sum_of(self.layout.hashes(records))
        return total % MODULUS == note.after.total


def _same(one: State, other: State) -> bool:
    return (one.count, one.total) == (other.count, other.total)


def pieces(columns: Sequence[Tensor], hashes: Tensor, order: Tensor | None = None) -> Iterator[Part]:
    """Give rows and hashes some at a time, in an order if there is one."""
    count = len(hashes)
    for start in range(0, count, _ROWS):
        part = slice(start, min(start + _ROWS, count))
        if order is None:
            yield [column[part] for column in columns], hashes[part]
            continue
        with Scratch() as scratch:
            yield [scratch(column[order[part]]) for column in columns], hashes[order[part].cpu()]

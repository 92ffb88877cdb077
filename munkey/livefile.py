"""A file that follows a table row for row, and is whole whenever it is looked at.

Rows have fixed places, so that a row is erased by overwriting it. Every change goes through a journal, a second file
that says which rows change, by number, and never what is in them:

1. the journal is written, and synced;
2. rows are written or moved, and synced;
3. what is gone is overwritten with zeros, the number of rows and their digest are written, and synced;
4. the journal is emptied, and synced.

Whoever opens the file after an interruption finds the journal and either finishes the change (rows were going) or takes
it back (rows were coming), so that the file holds the state before or the state after, and nothing in between.

Letters: `R` rows the file has room for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from munkey.digest import MODULUS, rows_hash
from munkey.disk import Disk, replacing, wipe_leftovers
from munkey.journal import Journal
from munkey.layout import Layout
from munkey.rows import Removal

__all__ = ["LiveFile"]

_JOURNAL, _LOCK = ".journal", ".lock"
_ROWS = 4096  # at a time

Columns = Sequence[Tensor]


class LiveFile:
    """An open file, its journal beside it with `.journal` at the end of its name, and a lock with `.lock`.

    Args:
        path: the file.
        disk: what reads and writes.

    Attributes:
        secret: under which rows are hashed.
        count: number of rows.
        total: sum of the hashes of the rows as they are in the file.
    """

    journal: Journal

    def __init__(self, path: str, disk: Disk) -> None:
        self.path, self.disk = path, disk
        self.file = self.guard = -1
        self.count = self.total = 0
        self.secret = b""
        self.unsure = False

    # --- opening ------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, about: Mapping[str, Any], columns: Columns, secret: bytes, disk: Disk) -> LiveFile:
        """A new file with some rows.

        Raises:
            FileExistsError: if there is a file of that name.
            BlockingIOError: if another store has it open.
            OSError: if it cannot be written; then there is none.
        """
        path = disk.resolve(path)
        live = cls(path, disk)
        live.secret = secret
        with live._closed_on_error():
            live._lock()
            if disk.exists(path):
                raise FileExistsError(f"there is a file {path!r} already; open it, or remove it")
            live.journal = Journal(path + _JOURNAL, disk)
            live.journal.clear()
            live._write_whole(
                about, [columns], [c.shape[1:] for c in columns], [c.dtype for c in columns], len(columns[0])
            )
        return live

    @classmethod
    def open(cls, path: str, disk: Disk) -> tuple[LiveFile, dict[str, Any], list[Tensor]]:
        """An existing file, once what was interrupted is finished or taken back: it, its description, its rows.

        Raises:
            FileNotFoundError: if there is no such file.
            BlockingIOError: if another store has it open.
            ValueError: if it is damaged, cut short, or of another kind.
        """
        path = disk.resolve(path)
        if not disk.exists(path):
            raise FileNotFoundError(f"no store at {path!r}")
        live = cls(path, disk)
        with live._closed_on_error():
            live._lock()
            live.file = disk.open(path)
            live.journal = Journal(path + _JOURNAL, disk)
            live.layout = Layout.read(disk, live.file, path)
            wipe_leftovers(disk, path)
            about = live.layout.about
            live.secret = bytes.fromhex(about["secret"])
            live._recover()
            columns = live.read(torch.arange(live.count))
            if rows_hash(live.secret, columns) != live.total:
                raise ValueError(f"{path!r} is damaged: its rows are not those that were written; restore a backup")
        return live, about, columns

    def _lock(self) -> None:
        # A file of its own: the file itself is replaced when it grows.
        self.guard = self.disk.open(self.path + _LOCK, create=True)
        if not self.disk.lock(self.guard):
            raise BlockingIOError(f"{self.path!r} is open in another store, here or in another process; close it there")

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def unsure_on_error(self) -> Iterator[None]:
        """What fails here leaves memory behind the file, which has then to be opened again."""
        try:
            yield
        except BaseException:
            self.unsure = True
            raise

    def close(self) -> None:
        """Give back everything; the file can be opened again, here or elsewhere."""
        if "journal" in vars(self):
            self.journal.close()
        for name in ("file", "guard"):
            if getattr(self, name) >= 0:
                self.disk.close(getattr(self, name))
                setattr(self, name, -1)

    # --- changes ------------------------------------------------------------------------------------------

    def read(self, rows: Tensor) -> list[Tensor]:
        """All columns of some rows, in ascending order."""
        return self.layout.read_rows(self.disk, self.file, rows)

    def append(self, columns: Columns) -> None:
        """Write new rows behind the others.

        Raises:
            OSError: if they cannot be written; then the file is as it was.
        """
        self.check()
        before, after = self.count, self.count + len(columns[0])
        if after > self.layout.room:
            self.rebuild(self._parts(), room=max(after, before + before // 2))
        old, total = self.total, (self.total + rows_hash(self.secret, columns)) % MODULUS
        self.journal.write({"change": "append", "before": (before, old), "after": (after, total)})
        self.unsure = True  # until it is finished or taken back
        try:
            self.layout.write_rows(self.disk, self.file, before, columns)
            self.disk.sync(self.file)
        except OSError:
            self._finish(before, after, old)
            self.unsure = False
            raise
        self._finish(after, after, total)
        self.unsure = False

    def erase(self, removal: Removal) -> None:
        """Remove rows, and move the last ones into the holes.

        Raises:
            OSError: if that fails; the file can be opened again, and the rows are then there or not, all of them.
        """
        self.check()
        wipe_leftovers(self.disk, self.path)
        gone = self.read(removal.gone.cpu())
        total = (self.total - rows_hash(self.secret, gone)) % MODULUS
        for column in gone:
            column.zero_()
        plan = {"change": "erase", "before": (removal.before, self.total), "after": (removal.after, total)}
        plan |= {"holes": removal.holes.tolist(), "movers": removal.movers.tolist()}
        self.journal.write(plan)
        self.unsure = True
        self._move(plan)
        self.unsure = False

    def _parts(self) -> Iterator[Columns]:
        """All rows, some at a time."""
        for start in range(0, self.count, _ROWS):
            columns = self.read(torch.arange(start, min(start + _ROWS, self.count)))
            yield columns
            for column in columns:
                column.zero_()  # copies of rows that may be forgotten later

    def rebuild(self, parts: Iterable[Columns], *, room: int) -> None:
        """Write rows to a new file and put it in the place of this one, whose bytes are overwritten.

        Raises:
            OSError: if it cannot be written; then the file is as it was, unless it was about to be replaced: then it
                is to be opened again.
        """
        self.check()
        old, layout = self.file, self.layout
        self._write_whole(layout.about, parts, layout.shapes, layout.dtypes, room)
        self.disk.close(old)

    def _write_whole(
        self,
        about: Mapping[str, Any],
        parts: Iterable[Columns],
        shapes: Sequence[torch.Size | tuple[int, ...]],
        dtypes: Sequence[torch.dtype],
        room: int,
    ) -> None:
        layout = Layout(dict(about), tuple(tuple(shape) for shape in shapes), tuple(dtypes), room)
        count = total = 0
        with replacing(self.disk, self.path) as file:
            layout.write_header(self.disk, file)
            for columns in parts:
                layout.write_rows(self.disk, file, count, columns)
                count, total = count + len(columns[0]), total + rows_hash(self.secret, columns)
            layout.write_state(self.disk, file, count, total % MODULUS)
            self.disk.sync(file)
            self.unsure = True  # which file the name leads to is not known from here on
        self.unsure = False
        self.file, self.layout, self.count, self.total = file, layout, count, total % MODULUS

    @property
    def broken(self) -> bool:
        """Whether a change failed half way."""
        return self.unsure or self.journal.broken

    def check(self) -> None:
        """Raise ValueError if the file is closed, OSError if a change failed half way."""
        if self.file < 0:
            raise ValueError(f"the store in {self.path!r} is closed; open it again")
        if self.broken:
            raise OSError(
                f"{self.path!r} failed half way through a change; close the store and open it, which mends it"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a store in a file cannot be pickled, as two would write to one file; save the model, or copy it"
        )

    # --- what the journal announces ----------------------------------------------------------------------

    def _recover(self) -> None:
        """Finish what was going, take back what was coming."""
        self.count, self.total = state = self.layout.read_state(self.disk, self.file, self.path)
        notes = self.journal.notes()
        if not notes:
            self.journal.clear()
            return
        plan = notes[0]
        before, after = tuple(plan["before"]), tuple(plan["after"])
        if state not in (before, after):
            raise ValueError(
                f"the journal beside {self.path!r} is of another state of the file; if the file is a backup that "
                f"was put there, remove {self.path + _JOURNAL!r}"
            )
        if state == after:  # all but the last step
            self._finish(after[0], max(before[0], after[0]), after[1])
        elif plan["change"] == "append":
            self._finish(before[0], after[0], before[1])
        elif len(notes) > 1:
            self._finish(after[0], before[0], after[1])
        else:
            self._move(plan)

    def _move(self, plan: Mapping[str, Any]) -> None:
        """Move rows into holes; until it is noted, they are still where they were, and can be moved again."""
        self.layout.move_rows(self.disk, self.file, plan["movers"], plan["holes"])
        self.disk.sync(self.file)
        self.journal.write({"moved": True})  # from here on the places that rows came from may be zero
        (before, _), (after, total) = plan["before"], plan["after"]
        self._finish(after, before, total)

    def _finish(self, count: int, wipe_to: int, total: int) -> None:
        """Have so many rows; what is behind them is overwritten."""
        self.layout.zero_rows(self.disk, self.file, count, wipe_to)
        self.layout.write_state(self.disk, self.file, count, total)
        self.disk.sync(self.file)
        self.count, self.total = count, total
        self.journal.clear()

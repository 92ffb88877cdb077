"""A store that lives in a file, and is whole there at every moment.

Letters: `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from munkey.disk import Disk
from munkey.livefile import LiveFile
from munkey.rows import Removal
from munkey.store import KeyStore
from munkey.table import wipe_copies

__all__ = ["DurableStore"]

_ROWS = 4096  # at a time


class DurableStore(KeyStore):
    """A `KeyStore` whose rows are in a file, too, and go from there when `forget` returns.

    The file follows row by row: `add` writes new rows, `forget` overwrites those that go, at a cost that follows what
    changes. When a call returns, its change is on the medium; an interruption at any moment leaves the state before or
    the state after, which the next `open` finds. A journal beside the file says which rows change, by number, and holds
    nothing of what is in them.

    Values that were trained are in the file after `sync`. Only one store at a time can have a file open.

    Make one with `create`, or of one in memory with `copy_of`, and open it again with `open`.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/store"
        >>> with DurableStore.create(path, key_width=3, value_width=2) as store:
        ...     store.add([7, 8], torch.eye(3)[:2])
        ...     store.forget([7]).forgotten
        (7,)
        >>> with DurableStore.open(path) as store:
        ...     list(store)
        [8]
    """

    live: LiveFile

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        key_width: int,
        value_width: int = 128,
        *,
        seed: int = 0,
        scale: float = 0.02,
        secret: bytes | None = None,
        dtype: torch.dtype | None = None,
        disk: Disk | None = None,
    ) -> Self:
        """An empty store in a new file; arguments as for `KeyStore`.

        Args:
            path: where; a journal and a lock are made beside it.
            key_width: `D`.
            value_width: `V`.
            seed: of the first values.
            scale: standard deviation of the first values.
            secret: under which digests are taken; it is kept in the file.
            dtype: of keys and values.
            disk: what reads and writes.

        Raises:
            FileExistsError: if there is a file of that name.
            OSError: if the file cannot be written.
        """
        empty = KeyStore(key_width, value_width, seed=seed, scale=scale, secret=secret, dtype=dtype)
        return cls.copy_of(empty, path, disk)

    @classmethod
    def copy_of(cls, store: KeyStore, path: str | os.PathLike[str], disk: Disk | None = None) -> Self:
        """A store in a new file with the rows, the seed and the secret of another, which stays as it is.

        What is attached to the other one, and its log, are not taken over. A model goes on with a memory in a file by
        `model.memory.store = DurableStore.copy_of(model.memory.store, path)`.

        Args:
            store: whose rows.
            path: where; a journal and a lock are made beside it.
            disk: what reads and writes.

        Raises:
            FileExistsError: if there is a file of that name.
            OSError: if the file cannot be written; there is then none, or all of it.

        Examples:
            >>> import tempfile
            >>> store = KeyStore(key_width=3, value_width=2)
            >>> store.add([7, 8], torch.eye(3)[:2])
            >>> with DurableStore.copy_of(store, tempfile.mkdtemp() + "/store") as durable:
            ...     durable.digest() == store.digest()
            True
        """
        made = cls(*store.widths, dtype=store.keys.dtype, **_settings(store))
        columns = [column[: store.used].to(own) for column, own in zip(store.columns, made.columns, strict=True)]
        made.values.requires_grad_(store.values.requires_grad)
        about = {**_settings(store), "secret": store.secret.hex(), "trained": store.values.requires_grad}
        made.live = LiveFile.create(os.fspath(path), about, columns, store.secret, disk or Disk())
        KeyStore.append(made, *columns)
        wipe_copies(columns, store.columns)
        return made

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, receipts: str | os.PathLike[str] | None = None, disk: Disk | None = None
    ) -> Self:
        """The store in a file; what was interrupted is first finished or taken back.

        Args:
            path: the file.
            receipts: a log; what it says is gone is forgotten again, see `KeyStore.keep_receipts`.
            disk: what reads and writes.

        Raises:
            FileNotFoundError: if there is no such file.
            BlockingIOError: if another store has it open, here or in another process.
            ValueError: if file or log are damaged, cut short, or of another kind.
        """
        live, about, columns = LiveFile.open(os.fspath(path), disk or Disk())
        settings: dict[str, Any] = {"seed": about["seed"], "scale": about["scale"], "secret": live.secret}
        keys, values = columns[-2:]
        store = cls(keys.shape[1], values.shape[1], dtype=keys.dtype, **settings)
        store.live = live
        store.values.requires_grad_(about["trained"])
        KeyStore.append(store, *columns)
        for column in columns:
            column.zero_()
        if receipts is not None:
            try:
                store.keep_receipts(receipts, disk=disk)
            except BaseException:
                store.close()
                raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give file and log back; values that were trained since `sync` are not there. The store stays readable."""
        self.live.close()
        super().close()

    def sync(self) -> None:
        """Write all values anew, as training left them; the old file is overwritten when the new one is whole.

        Raises:
            OSError: if that fails; the file is then as it was.
            ValueError: while the values are those of an average.
        """
        self._ready()
        parts = ([column[start : min(start + _ROWS, self.used)] for column in self.columns] for start in self._starts())
        self.live.rebuild(parts, room=max(self.live.layout.room, self.used))

    def compact(self) -> None:
        """Sort rows by id and view in memory and file, and give back room; values are written as by `sync`.

        Raises:
            OSError: if that fails; store and file are then as they were.
            ValueError: if an attached optimiser keeps something that mixes instances; or while the values are those of
                an average.
        """
        self.holders.check(self.values)
        self._ready()
        order = self.order()
        self.live.rebuild(self._in_order(order), room=self.used)
        with self.live.unsure_on_error():
            super().compact()

    def _in_order(self, order: Tensor) -> Iterator[list[Tensor]]:
        for start in self._starts():
            part = [column[order[start : start + _ROWS]] for column in self.columns]
            yield part
            for column in part:
                column.zero_()  # copies of rows that may be forgotten later

    def _checked(self, secret: bytes) -> bytes:
        if "live" in vars(self) and secret != self.secret:
            raise ValueError("a store keeps the secret that is in its file; a copy of it may have another")
        return super()._checked(secret)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyStore:
        """A copy is in memory only: two stores cannot follow one file."""
        other = KeyStore(*self.widths, device=self.keys.device, dtype=self.keys.dtype, **_settings(self))
        other.load_state_dict(self.state_dict())
        other.values.requires_grad_(self.values.requires_grad)
        memo[id(self)] = other
        return other

    def _take(self, found: dict[str, Tensor]) -> None:  # type: ignore[override]
        fitting = [found[name].to(column) for name, column in zip(found, self.columns, strict=True)]
        self.live.rebuild([fitting], room=len(fitting[0]))  # first, so that what fails there is nowhere
        with self.live.unsure_on_error():
            super()._take(found)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(self.keys[:0]).dtype != self.keys.dtype:
            raise ValueError(f"a store in a file keeps its dtype, {self.keys.dtype}; create one with another dtype=")
        return super()._apply(fn, recurse)

    def _starts(self) -> range:
        return range(0, self.used, _ROWS)

    def append(self, *columns: Tensor) -> Tensor:
        """See `RowTable.append`."""
        self._ready()
        fitting = [new.detach().to(column) for new, column in zip(columns, self.columns, strict=True)]
        self.live.append(fitting)  # first, so that what fails there is nowhere
        try:
            rows = super().append(*fitting)
        except BaseException:  # such as memory that is full
            new = list(range(self.used, self.live.count))
            self.live.erase(Removal.of(new, self.live.count, self.ids.device))
            raise
        wipe_copies(fitting, columns)
        return rows

    def _ready(self) -> None:
        super()._ready()
        self.live.check()

    def erase(self, ids: list[int], removal: Removal) -> None:
        """See `RowTable.erase`."""
        if len(removal.gone):
            self.live.erase(removal)
        super().erase(ids, removal)

    def row_bytes(self) -> int:
        """See `RowTable.row_bytes`; those in the file count, too."""
        return super().row_bytes() + sum(self.live.layout.widths)


def _settings(store: KeyStore) -> dict[str, Any]:
    return {"seed": store.seed, "scale": store.scale, "secret": store.secret}

"""Store in a file, whole at every moment.

Letters: `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, Self

import torch
from torch import Tensor

from munkey.store.digest import hash_rows
from munkey.store.file.disk import Disk
from munkey.store.file.layout import Layout
from munkey.store.file.live import Changing, StoreFile
from munkey.store.file.records import pieces
from munkey.store.log import known_to, verify
from munkey.store.schema import COLUMNS, Rows, columns_of, label_column
from munkey.store.store import KeyStore

__all__ = ["DurableStore"]

Path = str | os.PathLike[str]

#: Seconds between attempts to read a file that another process is changing.
_WAITS = tuple(0.001 * 2**attempt for attempt in range(8))


class DurableStore(KeyStore):
    """A `KeyStore` whose rows are also in a file, and are erased from the file when `forget` returns.

    The file follows row by row: `add` writes new rows, and `forget` overwrites removed rows, at a cost proportional to
    the change. When a call returns, its change is on the medium. An interruption at any moment leaves the state before
    or the state after the change, which the next `open` finds. A note in the file holds the numbers of the rows that
    change, and nothing of their content.

    Trained values are in the file after `sync`. Only one store at a time can have a file open for changes, whatever
    names the file has. Only the process that opened the file can change it; other processes can read it (`read_only`).

    `create` makes an empty store, `copy_of` copies a store in memory, and `open` opens an existing file.

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

    @classmethod
    def create(
        cls,
        path: Path,
        key_width: int,
        value_width: int = 128,
        *,
        seed: int = 0,
        scale: float = 0.02,
        secret: bytes | None = None,
        label_shape: Sequence[int] = (),
        label_dtype: torch.dtype = torch.int64,
        dtype: torch.dtype | None = None,
        disk: Disk | None = None,
    ) -> Self:
        """Return an empty store in a new file; arguments as for `KeyStore`.

        Args:
            path: path of the new file.
            key_width: `D`.
            value_width: `V`.
            seed: seed of the initial values.
            scale: standard deviation of the initial values.
            secret: secret of the digests, which is kept in the file.
            label_shape: shape of one label; one number by default.
            label_dtype: dtype of labels, int64 or float32.
            dtype: dtype of keys and values.
            disk: `Disk` that reads and writes.

        Raises:
            FileExistsError: if there is a file of that name.
            OSError: if the file cannot be written.
        """
        labels: dict[str, Any] = {"label_shape": label_shape, "label_dtype": label_dtype}
        empty = KeyStore(key_width, value_width, seed=seed, scale=scale, secret=secret, dtype=dtype, **labels)
        return cls.copy_of(empty, path, disk)

    @classmethod
    def copy_of(cls, store: KeyStore, path: Path, disk: Disk | None = None) -> Self:
        """Return a store in a new file with the rows, the seed and the secret of another store, which is not changed.

        The log of the other store, and attached optimisers and averages, are not taken over. The memory of a model
        moves to a file by `model.memory.store = DurableStore.copy_of(model.memory.store, path)`.

        Args:
            store: store whose rows are copied.
            path: path of the new file.
            disk: `Disk` that reads and writes.

        Raises:
            FileExistsError: if there is a file of that name.
            OSError: if the file cannot be written; there is then no file, or a whole file.

        Examples:
            >>> import tempfile
            >>> store = KeyStore(key_width=3, value_width=2)
            >>> store.add([7, 8], torch.eye(3)[:2])
            >>> with DurableStore.copy_of(store, tempfile.mkdtemp() + "/store") as durable:
            ...     durable.digest() == store.digest()
            True
        """
        made = cls(**store.settings())
        with store.lock:
            if store.used:
                made.append(Rows(*(column[: store.used] for column in store.columns)))
            made.values.requires_grad_(store.values.requires_grad)
        about = {"seed": store.seed, "scale": store.scale, "trained": made.values.requires_grad}
        table = made._table
        shapes, dtypes = ([getattr(column, name) for column in table.schema] for name in ("shape", "dtype"))
        layout = Layout(about, COLUMNS, tuple(shapes), tuple(dtypes), made.used, made.secret)
        parts = pieces(table.rows, made._digest.hashes())
        made._follow(StoreFile.create(os.fspath(path), layout, parts, disk or Disk()))
        if store.logged:  # a copy is a backup, which must not be opened without the log either
            made.live.keep_log()
        return made

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        receipts: Path | Literal[False] | None = None,
        new_log: bool = False,
        read_only: bool = False,
        disk: Disk | None = None,
    ) -> Self:
        """Return the store in a file; an interrupted change is first finished or taken back.

        Every row is compared with its tag (`munkey.store.file.layout`), so that damage is detected; `verify` compares
        the longer hashes.

        Args:
            path: path of the file.
            receipts: path of a log; rows that the log lists as forgotten are forgotten again, see
                `KeyStore.keep_receipts`. A store that had a log must be opened with the log, or with False to do
                without.
            new_log: whether to begin a log if there is none.
            read_only: whether the store is only searched. Nothing is written, not even to finish an interrupted change,
                and no lock is taken. Another process can change the file meanwhile; this store does not see such
                changes. A file in the midst of a change is read again, several times.
            disk: `Disk` that reads and writes.

        Raises:
            BlockingIOError: if another store has the file open, here or in another process.
            FileNotFoundError: if there is no such file, or no log.
            ValueError: if file or log are damaged, cut short, or of another kind, or if a log is missing. With
                `read_only` also if the store holds an instance that the log lists as forgotten, or if the file stays in
                the midst of a change.
        """
        disk = disk or Disk()
        for wait in _WAITS if read_only else ():
            with suppress(Changing):
                return cls._opened(path, receipts, new_log, read_only, disk)
            time.sleep(wait)
        return cls._opened(path, receipts, new_log, read_only, disk)

    @classmethod
    def _opened(
        cls, path: Path, receipts: Path | Literal[False] | None, new_log: bool, read_only: bool, disk: Disk
    ) -> Self:
        live = StoreFile.open(os.fspath(path), disk, read_only=read_only)
        try:
            if live.state.logged and receipts is None:
                raise ValueError(
                    f"{live.path!r} keeps a log of receipts, without which a restored backup brings forgotten "
                    "instances back; pass the log as receipts=, or receipts=False to open it without one"
                )
            live.recover()
            store = cls._loaded(live)
            if not read_only:
                live.settle()
            if receipts is not None and receipts is not False:
                if read_only:
                    _check_log(store, receipts, disk)
                else:
                    store.keep_receipts(receipts, new=new_log, disk=disk)
        except BaseException:
            live.release()
            raise
        return store

    @classmethod
    def _loaded(cls, live: StoreFile) -> Self:
        layout, about = live.layout, live.layout.about
        wrong = _other_kind(layout)
        if wrong:
            raise ValueError(f"{live.path!r} is no store that this library wrote: {wrong}")
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        dtypes = dict(zip(layout.names, layout.dtypes, strict=True))
        settings = {"seed": about["seed"], "scale": about["scale"], "secret": layout.secret}
        settings |= {"label_shape": shapes["labels"], "label_dtype": dtypes["labels"]}
        store = cls(shapes["keys"][0], shapes["values"][0], dtype=dtypes["keys"], **settings)
        hashes: list[Tensor] = []
        store._append((), lambda columns: hashes.append(live.load(columns)), live.state.count)
        store._digest.take(hashes[0])
        wrong = store.misfit()
        if wrong:
            raise ValueError(f"{live.path!r} is no store that this library wrote: {wrong}")
        store.values.requires_grad_(about["trained"])
        store._follow(live)
        return store

    def _follow(self, live: StoreFile) -> None:
        live.follow(self._table, self._digest)
        self._file, self._digest.eager = live, True

    @property
    def live(self) -> StoreFile:
        """Open file of the store."""
        live: StoreFile = self._file  # type: ignore[assignment]
        return live

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close file and log; values trained since the last `sync` are not in the file. The store stays readable."""
        with self.lock:
            self.live.close()
            self._close_log()

    def sync(self) -> None:
        """Write all trained values to a new file; the old file is overwritten once the new file is whole.

        Raises:
            OSError: if writing fails; the file is then unchanged.
            ValueError: while an average is in place of the values.
        """
        with self.lock:
            self._check_whole()
            self._check_own()
            hashes = hash_rows(self.secret, self._table.rows)
            room = max(self.live.layout.room, self.used)
            self.live.rebuild(pieces(self._table.rows, hashes), room=room)

    def verify(self) -> None:
        """Hash every row in the file again, and compare with the stored hashes.

        Raises:
            ValueError: if the file is damaged, or closed.
        """
        with self.lock:
            self.live.verify()


def _other_kind(layout: Layout) -> str | None:
    """Return why an undamaged description does not describe a store; None if the description does."""
    about, names = layout.about, layout.names
    if names != COLUMNS:
        return f"it has columns {names}, expected {COLUMNS}"
    numbers = type(about.get("seed")) is int and type(about.get("scale")) in (int, float)
    if not numbers or not math.isfinite(about["scale"]) or type(about.get("trained")) is not bool:
        return "seed and scale are to be numbers, and trained a truth value"
    found = {name: (shape, dtype) for name, shape, dtype in zip(names, layout.shapes, layout.dtypes, strict=True)}
    (key, dtype), (value, _) = found["keys"], found["values"]
    if len(key) != 1 or len(value) != 1 or min(*key, *value) < 1 or not dtype.is_floating_point:
        return "keys and values are to be rows of floating-point numbers"
    label, kind = found["labels"]
    if kind not in (torch.int64, torch.float32):
        return f"labels are to be int64 or float32, found {kind}"
    expected = {c.name: (c.shape, c.dtype) for c in columns_of(key[0], value[0], dtype, label_column(label, kind))}
    return None if found == expected else f"its columns are {found}, expected {expected}"


def _check_log(store: KeyStore, path: Path, disk: Disk) -> None:
    gone, dtypes = verify(path, secret=store.secret, disk=disk).gone()
    known = known_to(gone, dtypes, store.secret, Rows(*(column[: store.used] for column in store.columns)))
    if known:
        raise ValueError(
            f"the log {os.fspath(path)!r} says that {len(known)} of the ids in this store were forgotten; open the "
            "store once with this log and without read_only=True, which forgets them"
        )

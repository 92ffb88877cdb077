"""Keys, labels and values of instances, by id; forgotten instances are erased.

Letters: `M` rows, `D` width of a key, `V` width of a value, `B` instances of a call, `P` keys of each, `k` neighbours.
"""

from __future__ import annotations

import operator
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.search.exact import Neighbours, Search, at_least, nearest
from munkey.store.averages import AverageRows
from munkey.store.change import Added, Change, Moved, Removed, Replaced, long_lived
from munkey.store.checks import distinct, ordered_ids, some, to_forget
from munkey.store.codes import Codes
from munkey.store.digest import MODULUS, Digest, hash_rows, sum_of
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk
from munkey.store.file.live import StoreFile
from munkey.store.follower import Follower, commit
from munkey.store.gradients import GradientRows, gradient_check
from munkey.store.index import Index
from munkey.store.lock import Lock
from munkey.store.log import LoggedRows, ReceiptLog, row_tokens, tokens_of
from munkey.store.neighbours import NeighbourTables
from munkey.store.new import NewRows
from munkey.store.optimizers import OptimizerRows
from munkey.store.receipts import Receipt
from munkey.store.schema import COLUMNS, Rows, columns_of, label_column, misfit
from munkey.store.sums import RowSums, Summand
from munkey.store.table import Table
from treediff.core.checks import check_positive
from treediff.core.ema import EMA

__all__ = ["KeyStore", "not_there"]

_PLAIN = tuple(name for name in COLUMNS if name != "values")
P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[KeyStore, P], R]) -> Callable[Concatenate[KeyStore, P], R]:
    """Let one thread at a time use a store, and only a store that is whole."""

    @wraps(method)
    def call(self: KeyStore, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            self._check_whole()
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class KeyStore(nn.Module):
    """A table with one row for each instance: id, key, label, and a value that can be trained.

    An id may own several keys, such as keys of augmented copies of one image. Each key has its own row and value, and
    forgetting the id removes all of its rows.

    `forget` overwrites the rows, moves the last rows into the holes, and wipes the tail. This happens in the store and
    in all its followers (`munkey.store.follower`): gradients, attached optimisers and averages, a log, a file. Saved
    states and digests depend on the content alone: a store that forgot rows is indistinguishable from a store that
    never held these rows.

    Every change happens wholly or not at all. If a change is interrupted and cannot be finished, as when memory is
    full, the store refuses everything but `load_state_dict`.

    Calls from several threads run one after another; `with store.lock:` keeps several calls together, such as a search
    and the reading of the rows found. Copying or pickling a store copies its rows: processes never share memory.

    The initial value of a row is `scale` times normal noise, which depends on `seed`, id and view only.

    Args:
        key_width: `D`.
        value_width: `V`.
        seed: seed of the initial values.
        scale: standard deviation of the initial values.
        secret: secret of the digests, 1 to 64 bytes; drawn from the system if not given.
        label_shape: shape of one label; one number by default.
        label_dtype: dtype of labels, int64 or float32.
        device: device of the store.
        dtype: dtype of keys and values.

    Raises:
        TypeError: if a width is not an integer.
        ValueError: if a width is below 1, or the secret is empty or too long.

    Attributes:
        values: `(R, V)` parameter, with room for `R` rows; the same object through all changes.
        seed: seed of the initial values.
        scale: standard deviation of the initial values.
        lock: is held while a method runs; the same thread can hold the lock several times.

    Examples:
        >>> store = KeyStore(key_width=3, value_width=2)
        >>> store.add([7, 8], torch.eye(3)[:2], labels=torch.tensor([0, 1]))
        >>> store.forget([7]).forgotten
        (7,)
        >>> 7 in store, list(store)
        (False, [8])
    """

    any_rows = True  # a state with any number of rows fits
    ids: Tensor
    views: Tensor
    keys: Tensor
    values: nn.Parameter

    def __init__(
        self,
        key_width: int,
        value_width: int = 128,
        *,
        seed: int = 0,
        scale: float = 0.02,
        secret: bytes | None = None,
        label_shape: Sequence[int] = (),
        label_dtype: torch.dtype = torch.int64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(key_width=key_width, value_width=value_width)
        self.seed, self.scale = int(seed), float(scale)
        self.lock = Lock()
        labels = label_column(label_shape, label_dtype)
        schema = columns_of(int(key_width), int(value_width), dtype or torch.get_default_dtype(), labels)
        self._table = Table(schema, device)
        self.values = self._table.values
        self._index = Index(self._table)
        self._digest = Digest(self._table, secrets.token_bytes(32) if secret is None else secret)
        self._codes, self._gradients = Codes(self._table), GradientRows(self._table)
        self._neighbours = NeighbourTables()
        self._sums: dict[Summand, RowSums] = {}
        self._logged: LoggedRows | None = None
        self._file: StoreFile | None = None
        self._attached: list[OptimizerRows | AverageRows] = []
        self._others: list[Follower] = []
        self._torn = self._changing = False

    # --- content ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as in nn.Module
        if name in _PLAIN and "_table" in vars(self):
            return self._table[name]
        return super().__getattr__(name)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All columns, room included, in the order of `Rows`: ids, views, labels, permanent, keys, values."""
        return self._table.columns

    @property
    def used(self) -> int:
        """Number of rows in use, `M`."""
        return self._table.used

    @property
    def widths(self) -> tuple[int, int]:
        """Width of a key, and of a value."""
        return self._table["keys"].shape[1], self._table["values"].shape[1]

    @property
    def forgettable(self) -> int:
        """Number of rows that are not permanent."""
        return self.used - int(self._table["permanent"][: self.used].sum())

    def order(self) -> Tensor:
        """Return the row numbers `(M,)` sorted by id and view."""
        return self._table.order()

    def row_bytes(self) -> int:
        """Return the number of bytes that `forget` overwrites for each removed row."""
        kept = [tensor for part in self._parts for tensor in part.kept() if tensor.shape[0]]
        size = sum(tensor.numel() // tensor.shape[0] * tensor.element_size() for tensor in kept)
        return size + (0 if self._file is None else self._file.layout.width)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, instance: SupportsIndex) -> bool:
        return operator.index(instance) in self._index

    @_in_turn
    def __iter__(self) -> Iterator[int]:
        """Iterate over ids in ascending order; the order of rows would reveal the history."""
        return iter(sorted(self._index))

    @_in_turn
    def contains(self, ids: Iterable[int] | Tensor) -> Tensor:
        """Return which ids are in the store, `(B,)` bool."""
        return torch.tensor([instance in self._index for instance in ordered_ids(ids)], dtype=torch.bool)

    @_in_turn
    def missing(self, ids: Iterable[int]) -> list[int]:
        """Return the ids that are not in the store."""
        return self._index.missing(ids)

    @_in_turn
    def rows_of(self, ids: Iterable[int] | Tensor) -> Tensor:
        """Return the row numbers `(M,)` of ids, in the order of the ids.

        Row numbers change whenever an instance is forgotten.

        Raises:
            KeyError: if an id is not in the store.
        """
        wanted = ordered_ids(ids)
        self._require(wanted)
        return torch.tensor(self._index.of_all(wanted), dtype=torch.int64, device=self._table.device)

    @_in_turn
    def row_counts(self, ids: Iterable[int] | Tensor) -> Tensor:
        """Return the number of rows of each id, `(B,)` int64.

        Raises:
            KeyError: if an id is not in the store.
        """
        wanted = ordered_ids(ids)
        self._require(wanted)
        return torch.tensor([len(self._index.of(instance)) for instance in wanted], dtype=torch.int64)

    @_in_turn
    def one_row_of_each(self, ids: Iterable[int] | Tensor, uniform: Tensor) -> Tensor:
        """Return one row number for each id, `(B,)`, chosen by uniform numbers `(B,)` in [0, 1).

        Raises:
            KeyError: if an id is not in the store.
        """
        wanted = ordered_ids(ids)
        self._require(wanted)
        rows = self._index.one_of_each(wanted, uniform.tolist())
        return torch.tensor(rows, dtype=torch.int64, device=self._table.device)

    @_in_turn
    def get(self, ids: Iterable[int] | Tensor) -> Rows:
        """Return a copy of the rows of ids, in the order of the ids.

        Raises:
            KeyError: if an id is not in the store.
        """
        rows = self.rows_of(ids)
        return Rows(*(column[rows] for column in self._table.columns))

    @_in_turn
    def described(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of ids `(B,)`, keys `(B, D)` and labels `(B, ...)` of rows."""
        return self._table["ids"][rows], self._table["keys"][rows], self._table["labels"][rows]

    @_in_turn
    def labels_of(self, rows: Tensor) -> Tensor:
        """Return copies of the labels `(B, ...)` of rows."""
        return self._table["labels"][rows]

    def read(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        """Return the values `(..., V)` of rows, through which a gradient flows.

        The gradient is for the present rows: `backward` raises RuntimeError if rows were deleted or moved since.

        Args:
            rows: `(...)` int64 row numbers.
            sparse: whether the gradient is sparse, so that the cost of a step depends only on the rows that were read.
        """
        self._check_whole()
        read = F.embedding(rows, self.values, sparse=sparse)
        if read.requires_grad and not torch.compiler.is_compiling():
            read.register_hook(gradient_check(self._table, bool(self.optimizers)))
        return read

    def _require(self, ids: Sequence[int]) -> None:
        unknown = self._index.missing(ids)
        if unknown:
            raise not_there(unknown)

    # --- search -------------------------------------------------------------------------------------------

    @_in_turn
    def nearest(self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """Return the rows with the greatest dot product, exactly.

        Arguments and errors are those of `munkey.search.exact.nearest`.
        """
        keys, ids, views = (self._table[name][: self.used] for name in ("keys", "ids", "views"))
        return nearest(queries, keys, ids, k, views=views, screen=self._codes.get(), exclude_ids=exclude_ids)

    @_in_turn
    def nearest_to_rows(self, rows: Tensor, k: int, search: Search) -> tuple[Tensor, Tensor]:
        """Return row numbers and scores `(B, k)` of the neighbours of rows `(B,)`, without rows of the same id.

        Scores are those of the search. Neighbours are searched once, and again after rows were added or removed, or
        for another search.
        """
        keys = self._table["keys"]

        def find(wanted: Tensor) -> Neighbours:
            with Scratch() as scratch:  # rows that may be forgotten later
                return search(self, scratch(keys[wanted]), k, exclude_ids=self._table["ids"][wanted])

        return self._neighbours.get(search, k, rows, self.used, find)

    @_in_turn
    def at_least(self, queries: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return all pairs with a dot product of at least `threshold`.

        Returns:
            numbers of queries, ids, and float64 scores of the pairs, `(n,)` each.
        """
        query, row, scores = at_least(queries, self._table["keys"][: self.used], threshold)
        return query, self._table["ids"][row], scores

    @_in_turn
    def sums(self, summand: Summand) -> RowSums:
        """Return the sums of a function of rows, which follow all changes; see `munkey.store.sums`.

        Args:
            summand: function from keys and labels to whole numbers; equal summands have the same sums.
        """
        if summand not in self._sums:
            self._sums[summand] = RowSums(self._table, summand)
        return self._sums[summand]

    def forget_derived(self) -> None:
        """Overwrite and drop everything that was derived from sums, as of rows on other ranks that have changed."""
        for sums in self._sums.values():
            sums.forget_derived()

    # --- changes ------------------------------------------------------------------------------------------

    @property
    def _parts(self) -> list[Follower]:
        """The table and its followers, in the order in which they write ahead, and then change."""
        first = [self._table, *(part for part in (self._logged, self._file) if part is not None)]
        own = [self._index, self._digest, self._codes, self._gradients, self._neighbours]
        return [*first, *own, *self._sums.values(), *self._attached, *self._others]

    def _commit(self, change: Change) -> None:
        if self._changing:  # possible for a signal handler, in the thread that holds the lock
            raise RuntimeError("a change of this store is under way; let it finish, and change the store afterwards")
        self._changing = True
        try:
            commit(change, self._parts, self._tear)
        finally:
            self._changing = False

    def _check_own(self) -> None:
        """Raise ValueError while an average is in place of the values."""
        for part in self._attached:
            part.check(Moved(self.used, self._table.room))

    def _tear(self, torn: bool) -> None:
        self._torn = torn

    def _check_whole(self) -> None:
        if self._torn:
            raise RuntimeError(
                "this store was interrupted in the midst of a change that could not be finished, so its rows are "
                "neither those before nor those after; load it again"
                + ("" if self._file is None else f", with DurableStore.open({self._file.path!r})")
            )

    @_in_turn
    def add(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> None:
        """Store new instances, all of them or, after an error, none.

        Args:
            ids: `(B,)` int64, all different and not in the store.
            keys: `(B, D)`, or `(B, P, D)` for `P` keys of each instance.
            labels: `(B,)` int64, at least 0, or of the store's label shape and dtype; no labels if not given.
            values: shaped like the keys except for the width `V`; noise if not given.
            permanent: whether the instances are permanent, as for instances that weights were trained on; `forget`
                refuses permanent instances.

        Raises:
            TypeError: if ids or labels are not int64, or keys or values are not floating-point tensors.
            ValueError: if ids repeat or are in the store already, or a shape is wrong, or a number is not finite.
        """
        new = self.new_rows(ids, keys, labels, values, permanent=permanent)
        there = self._index.known(new.ids)
        if there:
            raise ValueError(f"ids {some(there)} are in the store already; use replace to change them")
        self._append(new.ids, new.write, new.rows)

    def new_rows(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> NewRows:
        """Return checked rows for this store, without adding them; arguments and errors as for `add`."""
        given = keys, labels, values
        return NewRows(ordered_ids(ids), *given, permanent, self._table.schema, self.seed, self.scale)

    @_in_turn
    def append(self, rows: Rows) -> Added:
        """Store unchanged rows, such as rows of another store, with new ids and all views of each id."""
        found = rows.ids.unique().tolist()

        def write(columns: Sequence[Tensor]) -> None:
            for column, new in zip(columns, rows, strict=True):
                column.copy_(new.detach())

        return self._append(found, write, len(rows.ids))

    def _append(self, ids: Sequence[int], write: Callable[[tuple[Tensor, ...]], None], count: int) -> Added:
        for part in self._parts:
            part.check(Added(self.used, self.used + count))
        room = self._table.more_room(count)
        if room is not None:
            self._commit(room)
        change = self._table.stage(write, count)
        try:
            self._commit(change)
        except BaseException:
            if self.used == change.start:  # refused after the new rows were written
                self._table.undo(change)
            raise
        try:
            for part in self._parts:
                part.confirm(change)
        except BaseException:
            self.take_back(change, ids)
            raise
        return change

    @_in_turn
    def take_back(self, change: Added, ids: Sequence[int]) -> None:
        """Remove rows that were just added, without a trace."""
        if self._logged is not None:
            self._logged.undo(change)
        rows = range(change.start, change.stop)
        self._commit(Removed.of(ids, rows, change.stop, self._table.device))

    @_in_turn
    def replace(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Receipt:
        """Store new keys, labels and values of instances in the store; arguments as for `add`.

        Nothing of the old rows is left: the ids are forgotten first, as the receipt shows. Forgetting and adding are
        two changes, so that an interruption between the two changes leaves the ids forgotten.

        Raises:
            KeyError: if an id is not in the store.
            TypeError: as for `add`.
            ValueError: as for `add` and `forget`.
        """
        new = self.new_rows(ids, keys, labels, values)
        receipt = self.forget(new.ids)
        self._append(new.ids, new.write, new.rows)
        return receipt

    @_in_turn
    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Erase instances in the store and all its followers, all of them or, after an error, none.

        The cost is proportional to the removed rows and independent of the remaining rows, except for the digests in
        the receipt. For the digests all rows are hashed if that was not done yet or values were trained since. No work
        is left for later.

        Args:
            ids: `(B,)` int64; an id that comes twice counts once.
            missing: 'raise' or 'ignore' ids that are not in the store. An absent id is no evidence of whether the id
                ever was in the store.

        Raises:
            KeyError: if an id is not in the store, unless `missing` is 'ignore'.
            TypeError: if ids are not integers.
            ValueError: if `missing` is another word, an id is permanent, or an attached optimiser keeps state that
                mixes instances.
        """
        wanted = to_forget(ids, missing)
        absent = self._index.missing(wanted)
        if missing == "raise" and absent:
            raise not_there(absent)
        known = sorted(set(wanted).difference(absent)) if absent else wanted
        return self._forget(known, tuple(absent), logged=True)

    def _forget(self, known: Sequence[int], absent: tuple[int, ...], *, logged: bool) -> Receipt:
        removal = self.removal_of(known)
        total = self._digest.total_after(removal)
        receipt = Receipt(
            forgotten=tuple(known),
            absent=absent,
            rows=len(removal.gone),
            bytes=len(removal.gone) * self.row_bytes(),
            before=self._digest.hexdigest(),
            after=self._digest.hexdigest(removal.after, total),
            time=time.time(),
        )
        self.remove(removal, receipt if logged else None)
        return receipt

    def removal_of(self, known: Sequence[int]) -> Removed:
        """Plan the removal of ids that are in the store; errors as for `forget`."""
        table = self._table
        removal = Removed.of(known, self._index.of_all(known), self.used, table.device, planned_at=table.changes)
        stay = table["permanent"].index_select(0, removal.gone)
        if stay.any():
            held = distinct(table["ids"][removal.gone[stay]])
            raise ValueError(
                f"ids {some(held)} are permanent: weights were trained on these instances, and would not forget them "
                "with their rows; train again without them"
            )
        for part in self._parts:
            part.check(removal)
        return removal

    @_in_turn
    def remove(self, removal: Removed, receipt: Receipt | None = None) -> None:
        """Carry out a removal that `removal_of` planned, and write a receipt to the log if there is a log."""
        self._commit(replace(removal, receipt=receipt))

    @_in_turn
    def compact(self) -> None:
        """Sort rows by id and view in the store and all its followers, and free unused room.

        Afterwards an optimiser's state fits a saved table, which is in this order. In a file, values are written as by
        `DurableStore.sync`.

        Raises:
            OSError: if the file cannot be written; store and file are then unchanged.
            ValueError: if an attached optimiser keeps state that mixes instances, or while an average is in place of
                the values.
        """
        self._commit(Moved(self.used, self.used, self.order()))

    # --- digest and receipts ------------------------------------------------------------------------------

    @property
    def secret(self) -> bytes:
        """Secret of the digests, 1 to 64 bytes; another secret gives other digests."""
        return self._digest.secret

    @secret.setter
    def secret(self, secret: bytes) -> None:
        if secret != self.secret and self._file is not None:
            raise ValueError("a store keeps the secret that is in its file; a copy of it may have another")
        if secret != self.secret and self._logged is not None:
            raise ValueError("a log of receipts is kept under the secret the store has; a copy of it may have another")
        self._digest.secret = secret

    @_in_turn
    def digest(self) -> str:
        """Return a hexadecimal digest of the content, the same for the same rows in any order.

        All rows are hashed when a digest is first taken, and after values were trained; otherwise only added and erased
        rows are hashed. Changes of `values.data`, which PyTorch does not count, are not noticed until `compact`,
        training, or a save to a folder.
        """
        return self._digest.hexdigest()

    @_in_turn
    def total(self) -> int:
        """Return the sum of the hashes of all rows; see `munkey.store.digest`."""
        return self._digest.total()

    def total_after(self, removal: Removed) -> int:
        """Return the sum of the hashes after a removal."""
        return self._digest.total_after(removal)

    def digest_of(self, rows: int, total: int) -> str:
        """Return the digest of `rows` rows whose hashes sum to `total`."""
        return self._digest.hexdigest(rows, total)

    def distrust_digest(self) -> None:
        """Make the next digest hash all rows again: values may have changed unnoticed."""
        self._digest.clear()

    def tokens(self, rows: Tensor | slice) -> list[str]:
        """Return the tokens of rows in a log; see `munkey.store.log`."""
        return row_tokens(self._table, self.secret, rows)

    def tokens_of(self, rows: Rows) -> list[str]:
        """Return the tokens in a log of rows that are not in the store yet."""
        return tokens_of(self.secret, rows.ids, rows.labels, rows.keys)

    def total_with(self, rows: Rows) -> int:
        """Return the sum of the hashes of all rows and of further rows that are not in the store yet."""
        return (self.total() + sum_of(hash_rows(self.secret, tuple(rows)))) % MODULUS

    @property
    def log(self) -> ReceiptLog | None:
        """Log of receipts; None if no log is kept here."""
        return None if self._logged is None else self._logged.log

    @property
    def logged(self) -> bool:
        """True if a log of receipts is kept, here or beside the file."""
        return self._logged is not None or (self._file is not None and self._file.state.logged)

    @_in_turn
    def keep_receipts(self, path: str | os.PathLike[str], *, new: bool = False, disk: Disk | None = None) -> Receipt:
        """Write a receipt to a log whenever ids are forgotten; first, forget again what the log lists as forgotten.

        So a restored backup with its log forgets again all instances that were forgotten since the backup. A receipt is
        written before rows are erased: if the erasure fails, the rows are erased when the store next gets the log.

        Args:
            path: path of the log; see `munkey.store.log`.
            new: whether to begin a log if there is none.
            disk: `Disk` that reads and writes.

        Returns:
            receipt of the instances that were forgotten again, which is not logged twice.

        Raises:
            BlockingIOError: if another store writes to the log.
            FileNotFoundError: if there is no log, unless `new`: without its log a store keeps instances of a backup
                that were forgotten.
            OSError: if the log cannot be read or written.
            ValueError: if a line of the log was changed, if the log is of another store or of keys of another dtype, or
                as for `forget`.
        """
        if self._file is not None:
            self._file.ready()  # before anything is written
        self._close_log()
        self._logged = None
        log = ReceiptLog(path, self.secret, new=new, disk=disk)
        try:
            logged = LoggedRows(self._table, self._digest, log)
            log.settle(self._digest.hexdigest())
            known = logged.known(Rows(*self._table.rows))
            receipt = self._forget(known, (), logged=False)
            if self._file is not None:
                self._file.keep_log()
        except BaseException:
            log.close()
            raise
        self._logged = logged
        return receipt

    def close(self) -> None:
        """Close the log of receipts; changes that must be logged are refused until `keep_receipts` opens a log."""
        with self.lock:
            self._close_log()

    def _close_log(self) -> None:
        if self._logged is not None:
            self._logged.log.close()

    # --- followers ----------------------------------------------------------------------------------------

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Attached optimisers."""
        return [part.held for part in self._attached if isinstance(part, OptimizerRows)]

    @property
    def averages(self) -> list[EMA]:
        """Attached averages."""
        return [part.held for part in self._attached if isinstance(part, AverageRows)]

    @property
    def followed(self) -> bool:
        """True if an attached optimiser or average has a row for each row of the store."""
        return any(isinstance(part, AverageRows) or part.has_rows for part in self._attached)

    @property
    def changes(self) -> int:
        """Number of times that rows were added, removed or moved."""
        return self._table.changes

    @_in_turn
    def attach(self, *held: torch.optim.Optimizer | EMA) -> None:
        """Make optimisers and averages follow the rows, so that their state is erased, moved and grown, too.

        Attach optimisers and averages before anything is forgotten, or right after store and optimiser were loaded.

        Args:
            *held: optimisers of PyTorch with `store.values` among their parameters, and averages of a model that
                holds the store.

        Raises:
            TypeError: if an argument is neither an optimiser nor an average.
            ValueError: if an argument does not follow the values, or may hold data of deleted rows.
        """
        for each in held:
            if not any(part.is_of(each) for part in self._attached):
                self._attached.append(self._following(each))

    def _following(self, held: object) -> OptimizerRows | AverageRows:
        if isinstance(held, EMA):
            return AverageRows(self._table, held)
        if isinstance(held, torch.optim.Optimizer):
            digest = weakref.ref(self._digest)  # an optimiser must not keep a store alive
            return OptimizerRows(self._table, held, lambda: _clear(digest))
        hint = "; use treediff.EMA, which can follow" if isinstance(held, torch.optim.swa_utils.AveragedModel) else ""
        raise TypeError(f"expected an optimiser of PyTorch or an EMA, found {type(held).__name__}{hint}")

    def detach(self, *held: torch.optim.Optimizer | EMA) -> None:
        """Detach optimisers and averages, which keep their state of instances and no longer forget with the store."""
        with self.lock:
            for part in list(self._attached):
                if any(part.is_of(each) for each in held):
                    part.release()
                    self._attached.remove(part)

    @_in_turn
    def follow(self, follower: Follower) -> None:
        """Make a custom follower follow every change of the rows; see `munkey.store.follower`."""
        if follower not in self._others:
            self._others.append(follower)

    def unfollow(self, follower: Follower) -> None:
        """Remove a follower that was given to `follow`."""
        with self.lock:
            if follower in self._others:
                self._others.remove(follower)

    def check_replaceable(self) -> None:
        """Raise ValueError if data would stay behind when another store takes the place of this store."""
        if self._attached:
            raise ValueError("an optimiser or an average follows the values; detach it, shard or load, then attach")
        if self._others:
            name = type(self._others[0]).__name__
            raise ValueError(f"a {name} holds copies of all keys; close() it, and make one of the new store")
        if self._file is not None:
            raise ValueError("the store lives in a file, which would keep all rows; take a copy.deepcopy of the model")
        if self.log is not None and not self.log.closed:
            raise ValueError("the store keeps a log of receipts; close() it, and give the new store the log afterwards")

    # --- as a module --------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self.lock:
            self._check_whole()
            order = self.order()
            for name, column in zip(COLUMNS, self._table.columns, strict=True):
                destination[prefix + name] = column[order]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = [prefix + name for name in COLUMNS]
        missing = [name for name in known if name not in state_dict]
        missing_keys += missing
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in known]
        if missing:
            return
        found = {name: state_dict[prefix + name].detach() for name in COLUMNS}
        wrong = misfit(found, self._table.schema)
        if wrong is None and self.followed:
            wrong = "an optimiser or an average follows the present rows; load first, then attach, or detach it"
        if wrong:
            error_msgs.append(f"rows of {prefix.rstrip('.') or 'a store'} do not fit: {wrong}")
            return
        with self.lock:
            self._take(Rows(**found))

    def _take(self, rows: Rows) -> None:
        """Replace all rows by the given rows, without rows that the log lists as forgotten."""
        with long_lived(), Scratch() as scratch:
            fitting = Rows(*(new.to(own) for new, own in zip(rows, self._table.columns, strict=True)))
            if self._logged is not None:
                gone = self._logged.known(fitting)
                kept = ~torch.isin(fitting.ids, torch.tensor(gone, dtype=torch.int64, device=fitting.ids.device))
                if bool(fitting.permanent[~kept].any()):
                    raise ValueError(
                        f"ids {some(gone)} are permanent in this state, and the log says that they were forgotten; "
                        "load a state of this store, or keep another log"
                    )
                if gone:
                    fitting = Rows(*(scratch(column[kept]) for column in fitting))
            self._commit(Replaced(tuple(fitting)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self.lock, long_lived():
            self._check_whole()
            if self._file is not None and fn(self._table["keys"][:0]).dtype != self._table["keys"].dtype:
                dtype = self._table["keys"].dtype
                raise ValueError(f"a store in a file keeps its dtype, {dtype}; create one with another dtype=")
            probe = fn(torch.zeros(1))
            if probe.device.type == "cpu" and probe.is_shared():
                raise ValueError(
                    "a store cannot share its memory with other processes: rows move when something is forgotten, and "
                    "the index of the others would not follow. Let each process have a copy (copy.deepcopy, pickle, or "
                    "DurableStore.open(path, read_only=True)), or one process answer for all"
                )
            self._digest.clear()  # the bytes of rows change
            self._codes.clear()
            for sums in self._sums.values():
                sums.clear()
            before = self._table["values"]
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self._table.values = self.values
            if before.data_ptr() != self._table["values"].data_ptr():
                before.zero_()
            self._table.converted(fn)
            self._neighbours.clear()  # rounding to another dtype may change neighbours
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments that make an empty store like this store."""
        key_width, value_width = self.widths
        about: dict[str, Any] = {"seed": self.seed, "scale": self.scale, "secret": self.secret}
        labels = self._table["labels"]
        about |= {"label_shape": tuple(labels.shape[1:]), "label_dtype": labels.dtype}
        return {"key_width": key_width, "value_width": value_width, "dtype": self._table["keys"].dtype, **about}

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyStore:
        """Return a copy of the rows in memory, without followers."""
        with self.lock, long_lived():
            self._check_whole()
            other = KeyStore(**self.settings(), device=self._table.device)
            memo[id(self)], memo[id(self.values)] = other, other.values
            if self.used:
                other.append(Rows(*self._table.rows))
            other.values.requires_grad_(self.values.requires_grad)
            other.train(self.training)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a copy of the rows as bytes, so that processes never share memory."""
        with self.lock:
            self._check_whole()
            for part in (self._file, self.log):
                if part is not None:
                    part.__reduce__()
            columns = [column.cpu().contiguous() for column in self._table.rows]
            data = [column.view(-1).view(torch.uint8).numpy().tobytes() for column in columns]
            about = self.values.requires_grad, self.training, str(self._table.device)
            return _unpickled, (self.settings(), data, *about)

    def misfit(self) -> str | None:
        """Return what is wrong with the rows; None if the rows can be used."""
        rows = dict(zip(COLUMNS, self._table.rows, strict=True))
        return misfit(rows, self._table.schema, differ=len(self) == self.used)

    def extra_repr(self) -> str:
        """Return size and widths."""
        return (
            f"{len(self._index)} instances, {self.used} rows, key_width={self.widths[0]}, value_width={self.widths[1]}"
        )


def not_there(ids: list[int]) -> KeyError:
    """Return the error for ids that are not in a store."""
    return KeyError(f"ids {some(ids)} are not in the store; forget can pass over them with missing='ignore'")


def _unpickled(settings: dict[str, Any], data: list[bytes], trained: bool, training: bool, device: str) -> KeyStore:
    store = KeyStore(**settings)
    columns = []
    for content, column in zip(data, store.columns, strict=True):
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)
        columns.append(flat.view(column.dtype).view(-1, *column.shape[1:]))
    if len(columns[0]):
        store.append(Rows(*columns))
    store.values.requires_grad_(trained)
    return store.train(training).to(device)


def _clear(digest: weakref.ref[Digest]) -> None:
    found = digest()
    if found is not None:
        found.clear()

"""Keys, labels and values of instances, by id; what is forgotten is erased.

Letters: `M` rows, `D` width of a key, `V` width of a value, `B` instances of a call, `P` keys of each.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from munkey.checks import as_ids, check_rows, distinct, some, to_forget
from munkey.disk import Disk
from munkey.receipt_log import ReceiptLog, tokens_of
from munkey.receipts import Receipt
from munkey.rows import Removal
from munkey.searched import SearchedRows
from treediff import EMA
from treediff.noise import counter_normal

__all__ = ["KeyStore"]


class KeyStore(SearchedRows):
    """A table with one row for each instance: id, key, label, and a value that can be trained.

    An id may own several keys, as of changed copies of one image; each has a row and a value of its own, and forgetting
    the id takes them all.

    `forget` overwrites the rows, moves the last rows into the holes, and wipes the tail, in the store and in every
    gradient, optimiser and average that `attach` was told of. Content alone decides what is saved and what `digest`
    says: a store that forgot cannot be told from one that never held what it forgot.

    A value begins as `scale` times normal noise which depends on `seed`, id and view only.

    Args:
        key_width: `D`.
        value_width: `V`.
        seed: of the first values.
        scale: standard deviation of the first values.
        secret: 1 to 64 bytes under which digests are taken; drawn from the system if not given.
        device: where the store lives.
        dtype: of keys and values.

    Raises:
        TypeError: if a width is not whole.
        ValueError: if a width is below 1, or the secret is empty or too long.

    Examples:
        >>> store = KeyStore(key_width=3, value_width=2)
        >>> store.add([7, 8], torch.eye(3)[:2], labels=torch.tensor([0, 1]))
        >>> store.forget([7]).forgotten
        (7,)
        >>> 7 in store, list(store)
        (False, [8])
    """

    def __init__(
        self,
        key_width: int,
        value_width: int = 128,
        *,
        seed: int = 0,
        scale: float = 0.02,
        secret: bytes | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(key_width, value_width, secret=secret, device=device, dtype=dtype)
        self.seed, self.scale = seed, scale
        self.log: ReceiptLog | None = None

    def _checked(self, secret: bytes) -> bytes:
        if "log" in vars(self) and self.log is not None and secret != self.secret:
            raise ValueError("a log of receipts is kept under the secret the store has; a copy of it may have another")
        return super()._checked(secret)

    # --- writing ------------------------------------------------------------------------------------------

    def add(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> None:
        """Store new instances; all of them or, if something is wrong, none.

        Args:
            ids: `(B,)` int64, all different and none of them there.
            keys: `(B, D)`, or `(B, P, D)` for `P` keys of each.
            labels: `(B,)` int64, at least 0; none if not given.
            values: shaped like the keys but for the width `V`; noise if not given.
            permanent: whether they are there for good, as those are that weights were trained on; `forget` refuses
                them.

        Raises:
            TypeError: if ids or labels are no int64, or keys or values no floating-point tensors.
            ValueError: if ids repeat or are there already, or a shape is wrong, or a number is not finite.
        """
        wanted = as_ids(ids)
        there = [instance for instance in wanted if instance in self.index]
        if there:
            raise ValueError(f"ids {some(there)} are in the store already; use replace to change them")
        self._write(wanted, self.new_rows(wanted, keys, labels, values, permanent))

    def replace(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Receipt:
        """Store new keys, labels and values of instances that are there; arguments as for `add`.

        Nothing of the old ones is left: they are forgotten first, which the receipt says. These are two changes, one
        after the other, so that an interruption between them leaves the ids forgotten.

        Raises:
            KeyError: if an id is not there.
            TypeError: as for `add`.
            ValueError: as for `add` and `forget`.
        """
        wanted = as_ids(ids)
        rows = self.new_rows(wanted, keys, labels, values, permanent=False)
        receipt = self.forget(wanted)
        self._write(wanted, rows)
        return receipt

    def new_rows(
        self, ids: list[int], keys: Tensor, labels: Tensor | None, values: Tensor | None, permanent: bool
    ) -> tuple[Tensor, ...]:
        """One tensor for each column of the table."""
        keys, labels, values = check_rows(ids, keys, labels, values, self.widths, self.keys.dtype)
        count, device = keys.shape[1], self.ids.device
        owner = torch.tensor(ids, dtype=torch.int64, device=device).repeat_interleave(count)
        view = torch.arange(count, device=device).repeat(len(ids))
        if values is None:
            noise = counter_normal(self.seed, owner, (self.widths[1],), draw=view, dtype=self.values.dtype)
            values = self.scale * noise
        labels, stays = labels.repeat_interleave(count), torch.full_like(view, permanent, dtype=torch.bool)
        return owner, view, labels, stays, keys.flatten(0, 1), values.reshape(-1, self.widths[1])

    def _write(self, ids: list[int], columns: Sequence[Tensor]) -> None:
        rows = self.append(*columns)
        if self.log is None or not self.log.gone:
            return
        try:
            self.log.returned(self.tokens(rows))
        except Exception:  # a log that was closed, too
            self.erase(ids, Removal.of(rows.tolist(), self.used, self.ids.device))
            self.forget_total()
            raise

    # --- forgetting ---------------------------------------------------------------------------------------

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Erase instances, here and in all that is attached; all of them or, if something is wrong, none.

        The cost follows the rows that go, not those that stay; but for the digest, which is taken anew if values were
        trained since the last one, and tables of neighbours.

        Args:
            ids: `(B,)` int64; an id that comes twice counts once.
            missing: 'raise' or 'ignore' ids that are not there. That an id is not there says nothing of whether it ever
                was.

        Raises:
            KeyError: if an id is not there, unless that is to be ignored.
            TypeError: if ids are no whole numbers.
            ValueError: if `missing` is another word, an id is there for good, or an attached optimiser keeps something
                that mixes instances.
        """
        wanted = to_forget(ids, missing)
        absent = self.index.missing(wanted)
        if missing == "raise":
            self._require(absent)
        known = sorted(set(wanted).difference(absent)) if absent else wanted
        return self._forget(known, tuple(absent), self.log)

    def _ready(self) -> None:
        """Raise an error if `erase` would."""
        self.holders.check_still()

    def removal_of(self, known: list[int]) -> Removal:
        """What `erase` would do to the rows of ids that are there; errors as for `forget`."""
        removal = Removal.of(self.index.of_all(known), self.used, self.ids.device)
        self._check_forgettable(removal.gone)
        self._ready()
        return removal

    def _forget(self, known: list[int], absent: tuple[int, ...], log: ReceiptLog | None) -> Receipt:
        removal = self.removal_of(known)
        before, total = self.digest(), self.total_after(removal)
        after, size = self.digest_of(removal.after, total), len(removal.gone) * self.row_bytes()
        receipt = Receipt(tuple(known), absent, len(removal.gone), size, before, after, time.time())
        if log is not None and known:
            # First, so that whoever finds the rows after an interruption knows that they are to go.
            log.forgot(receipt, self.tokens(removal.gone))
        self.erase(known, removal)
        self.keep_total(total)
        return receipt

    def tokens(self, rows: Tensor | slice) -> list[str]:
        """What a log knows rows by; see `munkey.receipt_log`."""
        keys = self.keys[rows]
        tokens = tokens_of(self.secret, self.ids[rows], self.labels[rows], keys)
        if not isinstance(rows, slice):
            keys.zero_()  # a copy of rows that are to go
        return tokens

    def keep_receipts(self, path: str | os.PathLike[str], *, disk: Disk | None = None) -> Receipt:
        """Write a receipt to a log whenever something is forgotten; first, forget what the log says is gone.

        So whoever restores a backup and gives it the log has all that was forgotten since forgotten again. A receipt is
        written before rows are erased: if that fails, they are erased when the log is next given to the store.

        Args:
            path: the log; it is made if there is none. See `munkey.receipt_log`.
            disk: what reads and writes.

        Returns:
            what was forgotten again; it is not logged twice.

        Raises:
            BlockingIOError: if another store writes to the log.
            OSError: if the log cannot be read or written.
            ValueError: if a line of the log was changed, or it is of another store, or as for `forget`.
        """
        KeyStore.close(self)  # the log alone, whatever else a subclass would close
        self.log = None
        log = ReceiptLog(path, self.secret, disk=disk)
        try:
            receipt = self._forget_again(log)
        except BaseException:
            log.close()
            raise
        self.log = log
        return receipt

    def close(self) -> None:
        """Give the log of receipts back; what it should hold is refused until `keep_receipts` names one again."""
        if self.log is not None:
            self.log.close()

    def _forget_again(self, log: ReceiptLog) -> Receipt:
        """Forget what a log says is gone."""
        rows = slice(0, self.used)
        gone = [token in log.gone for token in self.tokens(rows)] if log.gone else []
        known = sorted({owner for owner, there in zip(self.ids[rows].tolist(), gone, strict=False) if there})
        return self._forget(known, (), None)

    def _take(self, found: dict[str, Tensor]) -> None:  # type: ignore[override]
        super()._take(found)
        if self.log is not None:
            self._forget_again(self.log)

    def attach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Tell the store what else keeps something of its values, so that it can be erased, moved and grown there too.

        Args:
            *holders: optimisers of PyTorch with `store.values` among their parameters, and averages of a model that
                holds the store.

        Raises:
            TypeError: if one is something else.
            ValueError: if one does not follow the values.
        """
        store = weakref.ref(self)  # an optimiser does not keep a store alive

        def stepped(*_: object) -> None:
            found = store()
            if found is not None:
                found.forget_total()

        for holder in holders:
            self.holders.attach(self.values, holder, stepped)

    def detach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Leave out what was attached; it keeps what it has of instances, and forgetting does not reach it any more."""
        for holder in holders:
            self.holders.detach(holder)

    def _check_forgettable(self, rows: Tensor) -> None:
        stay = self.permanent[rows]
        if stay.any():
            held = distinct(self.ids[rows[stay]])
            raise ValueError(
                f"ids {some(held)} are there for good: weights were trained on them, and would not forget them with "
                "their rows; train anew without them"
            )
        self.holders.check(self.values)
        self.holders.check_copies()

"""A `KeyStore` whose rows are spread over the ranks of a process group.

Letters: `B` instances of a call on this rank, `M` rows, `D` width of a key, `V` width of a value, `P` keys of an
instance, `N` ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from munkey.checks import as_ids, to_forget
from munkey.digest import MODULUS
from munkey.disk import Disk
from munkey.receipt_log import ReceiptLog
from munkey.receipts import Receipt
from munkey.rows import Removal
from munkey.sharded import files
from munkey.sharded.placement import check_place, owners
from munkey.sharded.ranks import Ranks
from munkey.sharded.writing import WritableRows
from munkey.store import KeyStore
from munkey.stored import not_there
from treediff import EMA, __version__

__all__ = ["ShardedKeyStore"]


class ShardedKeyStore(WritableRows):
    """A `KeyStore` on all ranks of a process group, each of which holds the rows whose ids hash to it.

    Methods, answers, receipts and digests are those of one `KeyStore` with all rows. Every call is a collective: all
    ranks make it, in the same order, each with what it has. Of `add` and `replace` each rank gives other instances; the
    rows travel to where they belong. Of `forget` ranks may name the same ids: what any of them names goes.

    Without a process group there is one rank.

    Args:
        key_width: `D`.
        value_width: `V`.
        seed: of the first values.
        scale: standard deviation of the first values.
        secret: under which digests are taken; that of rank 0 is drawn from the system if none is given.
        dtype: of keys and values.
        group: the ranks; the default group if not given.

    Raises:
        TypeError: as for `KeyStore`.
        ValueError: as for `KeyStore`, and if ranks are given something different, or run another version.

    Attributes:
        local: the rows of this rank, a `KeyStore`.

    Examples:
        >>> store = ShardedKeyStore(key_width=3, value_width=2)
        >>> store.add([7, 8], torch.eye(3)[:2], labels=torch.tensor([0, 1]))
        >>> store.forget([7]).forgotten, list(store)
        ((7,), [8])
    """

    def __init__(
        self,
        key_width: int,
        value_width: int = 128,
        *,
        seed: int = 0,
        scale: float = 0.02,
        secret: bytes | None = None,
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks(group)
        local = ranks.agree(
            lambda: KeyStore(key_width, value_width, seed=seed, scale=scale, secret=secret, dtype=dtype)
        )
        if secret is None:
            local.secret = ranks.gather(local.secret)[0]
        self._start(local, ranks)

    def _start(self, local: KeyStore, ranks: Ranks) -> None:
        ranks.same("version of munkey", __version__)
        about = {"widths": local.widths, "dtype": str(local.keys.dtype), "seed": local.seed, "scale": local.scale}
        ranks.same("settings of a store", {**about, "trained": local.values.requires_grad})
        ranks.same("digest of an empty store, which the secret decides", local.digest_of(0, 0))
        super().__init__(local, ranks)

    @classmethod
    def around(cls, local: KeyStore, group: dist.ProcessGroup | None = None) -> Self:
        """A store of rows that are on their ranks already, such as those of a `DurableStore` on each.

        Args:
            local: the rows of this rank.
            group: the ranks.

        Raises:
            ValueError: if settings or secrets are not the same on all ranks, or a row belongs to another rank.
        """
        store, ranks = cls.__new__(cls), Ranks(group)
        ranks.agree(lambda: check_place(local.ids[: local.used], ranks.rank, ranks.size))
        store._start(local, ranks)
        return store

    @classmethod
    def of(cls, store: KeyStore, group: dist.ProcessGroup | None = None) -> Self:
        """The rows of a store that all ranks have; each keeps its own. The store itself is left as it is.

        `model.shard()` does it with the memory of a model.

        Args:
            store: the same one on all ranks; of empty ones the secret of rank 0 is taken.
            group: the ranks.

        Raises:
            ValueError: if settings or content are not the same on all ranks.
        """
        ranks = Ranks(group)
        secret = store.secret if len(store) else ranks.gather(store.secret)[0]
        if ranks.any(len(store) > 0):
            ranks.same("content of a store, and secret", store.digest())
        local = KeyStore(*store.widths, seed=store.seed, scale=store.scale, secret=secret, dtype=store.keys.dtype)
        local.values.requires_grad_(store.values.requires_grad)
        columns = [column[: store.used] for column in store.columns]
        mine = owners(columns[0], ranks.size) == ranks.rank
        local.append(*(column[mine] for column in columns))
        return cls.around(local, group)

    @property
    def seed(self) -> int:
        """Of the first values."""
        return self.local.seed

    @property
    def scale(self) -> float:
        """Standard deviation of the first values."""
        return self.local.scale

    @property
    def secret(self) -> bytes:
        """Under which digests are taken."""
        return self.local.secret

    def digest(self) -> str:
        """See `KeyStore.digest`: that of one store with all rows."""
        return self._digest(self.ranks.gather((self.local.used, self.local.total())))

    def _digest(self, parts: Sequence[tuple[int, int]]) -> str:
        return self.local.digest_of(sum(rows for rows, _ in parts), sum(total for _, total in parts) % MODULUS)

    def replace(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Receipt:
        """Store new keys, labels and values of instances that are there; see `KeyStore.replace` and `add`."""
        columns = self.ranks.agree(lambda: self.local.new_rows(as_ids(ids), keys, labels, values, False))
        route, own = self._sent(columns)
        self.ranks.agree(lambda: self._check_new(own, route, there=True))
        receipt = self.forget(columns[0])  # their ids: `ids` may be an iterator, which can be read once
        self._append(own)
        return receipt

    # --- forgetting ---------------------------------------------------------------------------------------

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Erase instances on all ranks; see `KeyStore.forget`. What any rank names goes; all get the same receipt."""
        wanted = torch.tensor(self.ranks.agree(lambda: to_forget(ids, missing)), dtype=torch.int64)
        everything = self.ranks.gather_rows(wanted)[0].unique()
        mine = everything[owners(everything, self.ranks.size) == self.ranks.rank].tolist()
        unknown = self.local.index.missing(mine)
        words, parts = zip(*self.ranks.gather((missing, unknown)), strict=True)
        if len(set(words)) > 1:
            raise ValueError(f"all ranks must say the same of missing ids, found {', '.join(map(repr, words))}")
        absent = sorted(instance for part in parts for instance in part)
        if missing == "raise" and absent:
            raise not_there(absent)
        return self._forget(sorted(set(mine).difference(unknown)), tuple(absent), note=True)

    def _forget(self, mine: list[int], absent: tuple[int, ...], *, note: bool) -> Receipt:
        """Erase ids of this rank here, and those of others there."""
        local = self.local
        removal = self.ranks.agree(lambda: local.removal_of(mine))
        receipt, total = self._receipt(mine, absent, removal)
        if note and self.logged and receipt.forgotten:
            # First, so that whoever finds the rows after an interruption knows that they are to go.
            tokens = self._all_tokens(removal.gone)
            self.ranks.agree(lambda: self.log.forgot(receipt, tokens) if self.log else None)
        self.ranks.agree(lambda: local.erase(mine, removal))
        local.keep_total(total)
        self._recount()
        return receipt

    def _receipt(self, mine: list[int], absent: tuple[int, ...], removal: Removal) -> tuple[Receipt, int]:
        """For all ranks the same, and the sum of hashes of this rank afterwards."""
        local = self.local
        total, gone = local.total_after(removal), len(removal.gone)
        now = (local.used, local.total()), (removal.after, total), time.time()
        said = self.ranks.gather((mine, gone, gone * local.row_bytes(), *now))
        known, rows, sizes, before, after, times = zip(*said, strict=True)
        forgotten = tuple(sorted(instance for part in known for instance in part))
        digests = self._digest(before), self._digest(after)
        return Receipt(forgotten, absent, sum(rows), sum(sizes), *digests, times[0]), total

    def keep_receipts(self, path: str | os.PathLike[str], *, disk: Disk | None = None) -> Receipt:
        """Write receipts to a log, which rank 0 keeps; first, all ranks forget what it says is gone.

        See `KeyStore.keep_receipts`. A receipt is written before any rank erases: if a rank is interrupted, what it did
        not erase goes when the store is loaded and given the log again.
        """
        self.close()
        self.logged = False
        self.log = self.ranks.agree(lambda: ReceiptLog(path, self.secret, disk=disk) if self.ranks.rank == 0 else None)
        try:
            receipt = self._forget_again()
        except BaseException:
            self.close()
            raise
        self.logged = True
        return receipt

    def _forget_again(self) -> Receipt:
        """Forget what the log says is gone."""
        gone = self.ranks.gather(self.log.gone if self.log else set[str]())[0]
        rows = slice(0, self.local.used)
        there = [token in gone for token in self.local.tokens(rows)] if gone else []
        mine = sorted({owner for owner, known in zip(self.local.ids[rows].tolist(), there, strict=False) if known})
        return self._forget(mine, (), note=False)

    def _loaded(self) -> None:
        super()._loaded()
        if self.logged:
            self._forget_again()

    def close(self) -> None:
        """Give the log of receipts back; see `KeyStore.close`."""
        if self.log is not None:
            self.log.close()

    # --- what follows, and files --------------------------------------------------------------------------

    def attach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Tell this rank's rows what else keeps something of their values; see `KeyStore.attach`."""
        self.local.attach(*holders)

    def detach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Leave out what was attached."""
        self.local.detach(*holders)

    def compact(self) -> None:
        """Sort rows by id and view on each rank, and give back room; see `KeyStore.compact`."""
        self.ranks.agree(self.local.compact)
        self._recount()

    def save(self, folder: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        """Write all rows to a folder, each rank its own; see `munkey.sharded.files`.

        Args:
            folder: made if there is none; what it held before is overwritten when all of the new is there.
            disk: what writes.

        Raises:
            OSError: if a rank cannot write; the folder holds what it held before.
        """
        files.save(self, os.fspath(folder), disk or Disk())

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None, disk: Disk | None = None
    ) -> Self:
        """Read what any number of ranks saved.

        Args:
            folder: the same for all ranks.
            group: the ranks.
            disk: what wipes what an interrupted save left.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: naming the file that is damaged or of another kind.
        """
        ranks = Ranks(group)
        local, digest = files.load(os.fspath(folder), ranks, disk or Disk())
        store = cls.around(local, group)
        if store.digest() != digest:
            raise ValueError(
                f"the rows in {os.fspath(folder)!r} are not those its manifest speaks of; restore a backup"
            )
        return store

    def extra_repr(self) -> str:
        """Size and ranks."""
        return f"{len(self)} instances, {self.used} rows on {self.ranks.size} ranks, this is rank {self.ranks.rank}"

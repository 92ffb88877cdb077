"""A `KeyStore` whose rows are spread over the ranks of a process group.

A row has one number for all ranks: `N` times its number on its rank, plus the rank.

Letters: `B` instances or queries of a call on this rank, `M` rows, `D` width of a key, `V` width of a value, `P` keys
of an instance, `k` neighbours, `N` ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from munkey.search.exact import Neighbours, Search, check_queries, exact
from munkey.sharded import folder as folders
from munkey.sharded.packing import pack, unpack
from munkey.sharded.placement import check_place, owners
from munkey.sharded.ranks import Ranks, Route
from munkey.sharded.shared_neighbours import SharedNeighbours
from munkey.sharded.shared_sums import SharedSums
from munkey.store.change import Added, Removed
from munkey.store.checks import ordered_ids, some, to_forget
from munkey.store.digest import MODULUS
from munkey.store.file.disk import Disk
from munkey.store.lock import Lock
from munkey.store.log import ReceiptLog, known_to
from munkey.store.receipts import Receipt
from munkey.store.schema import COLUMNS, Rows
from munkey.store.store import KeyStore, not_there
from munkey.store.sums import Summand
from treediff.core import __version__
from treediff.core.checks import check_positive
from treediff.core.ema import EMA

__all__ = ["ShardedKeyStore"]


class ShardedKeyStore(nn.Module):
    """A `KeyStore` on all ranks of a process group, each of which holds the rows whose ids hash to it.

    Methods, answers, receipts and digests are the same as for one `KeyStore` with all rows. Every call is a collective:
    all ranks make the call, in the same order, each with its own arguments. For `add` and `replace` each rank gives
    other instances, and the rows are sent to their ranks. For `forget` ranks may give the same ids: an id that any rank
    gives is forgotten. A rank without ids passes an empty list. An error of one rank is raised on all ranks.

    Without a process group there is one rank.

    Args:
        key_width: `D`.
        value_width: `V`.
        seed: seed of the initial values.
        scale: standard deviation of the initial values.
        secret: secret of the digests; if not given, the secret of rank 0, drawn from the system.
        dtype: dtype of keys and values.
        group: process group of the ranks; the default group if not given.

    Raises:
        TypeError: as for `KeyStore`.
        ValueError: as for `KeyStore`, and if arguments or versions of ranks differ.

    Attributes:
        local: the rows of this rank, a `KeyStore`.

    Examples:
        >>> store = ShardedKeyStore(key_width=3, value_width=2)
        >>> store.add([7, 8], torch.eye(3)[:2], labels=torch.tensor([0, 1]))
        >>> store.forget([7]).forgotten, list(store)
        ((7,), [8])
    """

    per_rank = True  # each rank holds other rows
    local: KeyStore

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
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        ranks = Ranks(group)
        about: dict[str, Any] = {"seed": seed, "scale": scale, "secret": secret, "dtype": dtype}
        about |= {"label_shape": label_shape, "label_dtype": label_dtype}
        local = ranks.agree(lambda: KeyStore(key_width, value_width, **about))
        if secret is None:
            local.secret = ranks.gather(local.secret)[0]
        self._start(local, ranks)

    def _start(self, local: KeyStore, ranks: Ranks) -> None:
        ranks.same("version of munkey", __version__)
        about = {"widths": local.widths, "dtype": str(local.keys.dtype), "seed": local.seed, "scale": local.scale}
        about["labels"] = str((tuple(local.labels.shape[1:]), local.labels.dtype))
        ranks.same("settings of a store", {**about, "trained": local.values.requires_grad})
        ranks.same("digest of an empty store, which the secret decides", local.digest_of(0, 0))
        super().__init__()
        self.local, self.ranks = local, ranks
        self.log: ReceiptLog | None = None
        self.logged = False  # whether rank 0 keeps a log
        self._near = SharedNeighbours()
        local.follow(self._near)
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
        self._recount()

    @classmethod
    def around(cls, local: KeyStore, group: dist.ProcessGroup | None = None) -> Self:
        """Return a store of rows that are on their ranks already, such as the rows of a `DurableStore` on each rank.

        Args:
            local: the rows of this rank.
            group: process group of the ranks.

        Raises:
            ValueError: if settings or secrets are not the same on all ranks, or a row belongs to another rank.
        """
        store, ranks = cls.__new__(cls), Ranks(group)
        ranks.agree(lambda: check_place(local.ids[: local.used], ranks.rank, ranks.size))
        store._start(local, ranks)
        return store

    @classmethod
    def of(cls, store: KeyStore, group: dist.ProcessGroup | None = None) -> Self:
        """Return a sharded copy of a store that all ranks have; the store itself is not changed.

        Each rank keeps its own rows. `model.shard()` shards the memory of a model.

        Args:
            store: the same store on all ranks; for empty stores the secret of rank 0 is used.
            group: process group of the ranks.

        Raises:
            ValueError: if settings or content are not the same on all ranks.
        """
        ranks = Ranks(group)
        secret = store.secret if len(store) else ranks.gather(store.secret)[0]
        if ranks.any(len(store) > 0):
            ranks.same("content of a store, and secret", store.digest())
        local = KeyStore(**{**store.settings(), "secret": secret})
        local.values.requires_grad_(store.values.requires_grad)
        mine = owners(store.ids[: store.used], ranks.size) == ranks.rank
        if mine.any():
            local.append(Rows(*(column[: store.used][mine] for column in store.columns)))
        return cls.around(local, group)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in _OF_ONE:
            raise AttributeError(
                f"a store on several ranks has no {name} of its own; those of this rank are in .local.{name}, and "
                ".get(ids) fetches rows from all"
            )
        return super().__getattr__(name)

    # --- what all ranks hold ------------------------------------------------------------------------------

    def _recount(self) -> None:
        """Synchronise row counts across ranks, after every change."""
        self._near.clear()
        local = self.local
        local.forget_derived()
        self.counts = self.ranks.gather((len(local), local.used, local.forgettable))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:  # noqa: ANN401
        ids = state_dict.get(prefix + "local.ids", torch.zeros(0, dtype=torch.int64))
        self.ranks.agree(lambda: check_place(ids, self.ranks.rank, self.ranks.size))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __len__(self) -> int:
        return sum(count[0] for count in self.counts)

    @property
    def used(self) -> int:
        """Number of rows on all ranks, `M`."""
        return sum(count[1] for count in self.counts)

    @property
    def forgettable(self) -> int:
        """Number of rows that are not permanent, on all ranks."""
        return sum(count[2] for count in self.counts)

    @property
    def widths(self) -> tuple[int, int]:
        """Width of a key, and of a value."""
        return self.local.widths

    @property
    def values(self) -> nn.Parameter:
        """Values of this rank, for an optimiser."""
        return self.local.values

    @property
    def seed(self) -> int:
        """Seed of the initial values."""
        return self.local.seed

    @property
    def scale(self) -> float:
        """Standard deviation of the initial values."""
        return self.local.scale

    @property
    def secret(self) -> bytes:
        """Secret of the digests."""
        return self.local.secret

    @property
    def lock(self) -> Lock:
        """Lock of the rows of this rank."""
        return self.local.lock

    def digest(self) -> str:
        """Return the digest of one store with all rows; see `KeyStore.digest`."""
        return self._digest(self.ranks.gather((self.local.used, self.local.total())))

    def _digest(self, parts: Sequence[tuple[int, int]]) -> str:
        return self.local.digest_of(sum(rows for rows, _ in parts), sum(total for _, total in parts) % MODULUS)

    # --- by id --------------------------------------------------------------------------------------------

    def __contains__(self, instance: int) -> bool:
        return bool(self.contains([instance]))

    def __iter__(self) -> Iterator[int]:
        """Iterate over all ids in ascending order."""
        mine = torch.tensor(list(self.local), dtype=torch.int64)
        return iter(self.ranks.gather_rows(mine)[0].sort().values.tolist())

    def contains(self, ids: Iterable[int] | Tensor) -> Tensor:
        """Return which ids are in the store, `(B,)` bool; see `KeyStore.contains`."""
        route, wanted = self._wanted(ids)
        return route.back(self.local.contains(wanted))

    def rows_of(self, ids: Iterable[int] | Tensor) -> Tensor:
        """Return the row numbers `(M,)` of ids, for all ranks; see `KeyStore.rows_of`."""
        route, wanted = self._wanted(ids)
        rows = self.ranks.agree(lambda: self.local.rows_of(wanted))
        return route.back_several(self._everywhere(rows), self.local.row_counts(wanted))[0]

    def one_row_of_each(self, ids: Iterable[int] | Tensor, uniform: Tensor) -> Tensor:
        """Return one row number for each id, `(B,)`, for all ranks; see `KeyStore.one_row_of_each`."""
        route, wanted = self._wanted(ids)
        numbers = route.there(uniform)
        return route.back(self._everywhere(self.ranks.agree(lambda: self.local.one_row_of_each(wanted, numbers))))

    def get(self, ids: Iterable[int] | Tensor) -> Rows:
        """Return a copy of the rows of ids, in the order of the ids; see `KeyStore.get`."""
        return Rows(*self._fetched(self.rows_of(ids), self.local.columns))

    def _wanted(self, ids: Iterable[int] | Tensor) -> tuple[Route, Tensor]:
        """Return the route of ids to their ranks, and the ids that this rank received."""
        wanted = torch.tensor(self.ranks.agree(lambda: ordered_ids(ids)), dtype=torch.int64)
        route = Route(self.ranks, owners(wanted, self.ranks.size))
        return route, route.there(wanted)

    def _everywhere(self, rows: Tensor) -> Tensor:
        """Return the numbers for all ranks of rows of this rank."""
        return torch.where(rows < 0, rows, rows * self.ranks.size + self.ranks.rank)

    # --- by row -------------------------------------------------------------------------------------------

    def read(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        """Return the values `(..., V)` of rows; see `KeyStore.read`. All ranks run the backward pass, too.

        The gradient is of the mean of the losses of all ranks, as with `DistributedDataParallel`.
        """
        route, own = self._rows(rows.flatten())
        found = route.back(_scaled_gradient(self.local.read(own, sparse=sparse), 1 / self.ranks.size))
        read: Tensor = found.unflatten(0, rows.shape)
        return read

    def described(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of ids `(B,)`, keys `(B, D)` and labels `(B, ...)` of rows; see `KeyStore.described`."""
        local = self.local
        ids, keys, labels = self._fetched(rows, (local.ids, local.keys, local.labels))
        return ids, keys, labels

    def labels_of(self, rows: Tensor) -> Tensor:
        """Return copies of the labels `(B, ...)` of rows; see `KeyStore.labels_of`."""
        return self._fetched(rows, (self.local.labels,))[0]

    def sums(self, summand: Summand) -> SharedSums:
        """Return the sums of a function of rows; see `KeyStore.sums`."""
        return SharedSums(self.local.sums(summand), self.ranks, self.described)

    def _rows(self, rows: Tensor) -> tuple[Route, Tensor]:
        route = Route(self.ranks, rows % self.ranks.size)
        return route, route.there(rows // self.ranks.size)

    def _fetched(self, rows: Tensor, columns: tuple[Tensor, ...]) -> list[Tensor]:
        """Return copies of columns of rows, sent in one message."""
        route, own = self._rows(rows)
        packed = pack([column[own] for column in columns])
        found = route.back(packed)
        packed.zero_()  # a copy of rows that may be forgotten
        return unpack(found, columns)

    # --- search -------------------------------------------------------------------------------------------

    def nearest(self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """Return the rows with the greatest dot product, exactly; see `KeyStore.nearest`.

        Every rank searches the `k` nearest of its rows, and the best of all ranks are kept.
        """
        ranks, local = self.ranks, self.local
        counts = self._query_counts(queries, k, exclude_ids)
        everyone, _ = ranks.gather_rows(queries, counts)
        own = None if exclude_ids is None else ranks.gather_rows(exclude_ids, counts)[0]
        found = local.nearest(everyone, k, exclude_ids=own)
        if ranks.size > 1:
            everyone.zero_()  # copies of queries, which may be keys
        mine, take = counts[ranks.rank], [counts[ranks.rank]] * ranks.size
        columns = found.ids, self._everywhere(found.rows), found.scores, found.candidates
        parts = unpack(ranks.exchange(pack(columns), counts, take), columns)
        ids, rows, scores, candidates = (part.unflatten(0, (ranks.size, mine)) for part in parts)
        return _merged(ids, rows, scores, candidates, k)

    def _query_counts(self, queries: Tensor, k: int, exclude_ids: Tensor | None) -> list[int]:
        """Return the number of queries of each rank, after checking the arguments on all ranks."""
        error = None
        try:
            check_positive(k=k)
            check_queries(queries, self.local.keys)
        except (TypeError, ValueError) as raised:
            error = raised
        count, wanted = (0, 0) if error else (len(queries), k)
        said = self.ranks.numbers(error is not None, count, wanted, exclude_ids is not None)
        self.ranks.fail(error, anywhere=self.ranks.size > 1 and any(failed for failed, *_ in said))
        if len({tuple(settings) for _, _, *settings in said}) > 1:
            each = ", ".join(f"rank {rank} {k} and {bool(ids)}" for rank, (_, _, k, ids) in enumerate(said))
            raise ValueError(
                f"all ranks must request the same number of neighbours, with or without ids to exclude; found {each}"
            )
        return [count for _, count, _, _ in said]

    def nearest_to_rows(self, rows: Tensor, k: int, search: Search) -> tuple[Tensor, Tensor]:
        """Return row numbers and scores `(B, k)` of the neighbours of rows; see `KeyStore.nearest_to_rows`."""
        if search is not exact:
            raise TypeError("a store on several ranks does its own search; leave search= out")
        route, own = self._rows(rows)
        near, scores, unknown = self._near.get(k, own, self.local.used)
        if self.ranks.any(len(unknown) > 0):
            queries = self.local.keys[unknown]
            found = self.nearest(queries, k, exclude_ids=self.local.ids[unknown])
            queries.zero_()  # a copy of rows that may be forgotten later
            near[unknown], scores[unknown] = found.rows, found.scores
        return route.back(near[own]), route.back(scores[own])

    def at_least(self, queries: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return all pairs with a dot product of at least `threshold`; see `KeyStore.at_least`.

        The pairs of a query are in no particular order.
        """
        everyone, counts = self.ranks.gather_rows(queries)
        query, ids, scores = self.ranks.agree(lambda: self.local.at_least(everyone, threshold))
        edges = torch.tensor(counts).cumsum(0)
        route = Route(self.ranks, torch.searchsorted(edges, query, right=True))
        first = int(edges[self.ranks.rank]) - counts[self.ranks.rank]
        query, ids, scores = unpack(route.there(pack((query, ids, scores))), (query, ids, scores))
        return query - first, ids, scores

    # --- adding -------------------------------------------------------------------------------------------

    def add(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> None:
        """Store new instances; see `KeyStore.add`. Each rank gives its own instances, or none.

        Raises:
            ValueError: as for `KeyStore.add`, and if two ranks give the same id.
        """
        rows = self.ranks.agree(lambda: self._made(ids, keys, labels, values, permanent))
        route, own = self._sent(rows)
        self.ranks.agree(lambda: self._check_new(own, route, there=False))
        self._append(own)

    def replace(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Receipt:
        """Store new keys, labels and values of instances in the store; see `KeyStore.replace` and `add`."""
        rows = self.ranks.agree(lambda: self._made(ids, keys, labels, values, False))
        wanted = rows.ids.clone()  # `ids` may be an iterator, which can be read once
        route, own = self._sent(rows)
        self.ranks.agree(lambda: self._check_new(own, route, there=True))
        receipt = self.forget(wanted)
        self._append(own)
        return receipt

    def _made(
        self, ids: Iterable[int] | Tensor, keys: Tensor, labels: Tensor | None, values: Tensor | None, permanent: bool
    ) -> Rows:
        return self.local.new_rows(ids, keys, labels, values, permanent=permanent).made(self.local.columns)

    def _sent(self, rows: Rows) -> tuple[Route, Rows]:
        """Return the route of the given rows, and the rows of all ranks that belong to this rank."""
        route = Route(self.ranks, owners(rows.ids, self.ranks.size))
        packed = pack(tuple(rows))
        own = unpack(route.there(packed), self.local.columns)
        for copy in (packed, *rows):  # of rows that may be forgotten later
            copy.zero_()
        return route, Rows(*own)

    def _check_new(self, own: Rows, route: Route, *, there: bool) -> None:
        ids = [part.unique() for part in own.ids.split(route.take)]
        found, counts = torch.cat(ids).unique(return_counts=True)
        twice = found[counts > 1].tolist()
        if twice:
            raise ValueError(f"ids {some(twice)} come from two ranks; give each instance to one of them")
        known = [instance for instance in found.tolist() if (instance in self.local) != there]
        if known and there:
            raise not_there(known)
        if known:
            raise ValueError(f"ids {some(known)} are in the store already; use replace to change them")

    def _append(self, own: Rows) -> None:
        """Append rows and log the ids that return. If one rank fails, all ranks take their rows back."""
        added: Added | None = None

        def write() -> None:
            nonlocal added
            if len(own.ids):
                added = self.local.append(own)

        try:
            mark = self._returning(own)
            try:
                self.ranks.agree(write)
                if mark is not None:
                    self.ranks.agree(lambda: self.log.returned() if self.log else None)
            except BaseException:
                if added is not None:
                    self.local.take_back(added, own.ids.unique().tolist())
                if mark is not None and self.log is not None:
                    with suppress(Exception):
                        self.log.restore(mark)
                raise
        finally:
            for column in own:
                column.zero_()  # a copy of rows that may be forgotten later
        self._recount()

    def _returning(self, own: Rows) -> Any:  # noqa: ANN401 - a mark of a log
        """Log on rank 0 that rows are about to return; return the mark to go back to, None if nothing was logged."""
        if not self.logged:
            return None
        tokens = self._all(self.local.tokens_of(own))
        back = self.ranks.gather(self.log.back(tokens) if self.log else [])[0]
        if not back:
            return None
        total = self.local.total_with(own)
        parts = self.ranks.gather((self.local.used + len(own.ids), total))
        after = self._digest(parts)
        mark = self.log.mark() if self.log else ()
        self.ranks.agree(lambda: self.log.returning(back, after) if self.log else None)
        return mark

    def _all(self, tokens: list[str]) -> list[str]:
        return [token for part in self.ranks.gather(tokens) for token in part]

    # --- forgetting ---------------------------------------------------------------------------------------

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Erase the ids that any rank gives; see `KeyStore.forget`. All ranks get the same receipt."""
        wanted = torch.tensor(self.ranks.agree(lambda: to_forget(ids, missing)), dtype=torch.int64)
        everything = self.ranks.gather_rows(wanted)[0].unique()
        mine = everything[owners(everything, self.ranks.size) == self.ranks.rank].tolist()
        unknown = self.local.missing(mine)
        words, parts = zip(*self.ranks.gather((missing, unknown)), strict=True)
        if len(set(words)) > 1:
            raise ValueError(f"all ranks must pass the same missing=, found {', '.join(map(repr, words))}")
        absent = sorted(instance for part in parts for instance in part)
        if missing == "raise" and absent:
            raise not_there(absent)
        return self._forget(sorted(set(mine).difference(unknown)), tuple(absent), note=True)

    def _forget(self, mine: list[int], absent: tuple[int, ...], *, note: bool) -> Receipt:
        """Erase ids of this rank, while every other rank erases its ids."""
        local = self.local
        removal = self.ranks.agree(lambda: local.removal_of(mine))
        receipt = self._receipt(mine, absent, removal)
        if note and self.logged and receipt.forgotten:
            # The log is written first, so that rows that an interruption leaves are known to be forgotten.
            tokens = self._all(local.tokens(removal.gone))
            dtype = local.keys.dtype
            self.ranks.agree(lambda: self.log.forgot(receipt, tokens, dtype) if self.log else None)
        self.ranks.agree(lambda: local.remove(removal))
        self._recount()
        return receipt

    def _receipt(self, mine: list[int], absent: tuple[int, ...], removal: Removed) -> Receipt:
        """Return the receipt, the same on all ranks."""
        local, gone = self.local, len(removal.gone)
        now = (local.used, local.total()), (removal.after, local.total_after(removal)), time.time()
        said = self.ranks.gather((mine, gone, gone * local.row_bytes(), *now))
        known, rows, sizes, before, after, times = zip(*said, strict=True)
        forgotten = tuple(sorted(instance for part in known for instance in part))
        return Receipt(forgotten, absent, sum(rows), sum(sizes), self._digest(before), self._digest(after), times[0])

    def keep_receipts(self, path: str | os.PathLike[str], *, new: bool = False, disk: Disk | None = None) -> Receipt:
        """Write receipts to a log on rank 0; first, all ranks forget again what the log lists as forgotten.

        See `KeyStore.keep_receipts`. A receipt is written before any rank erases. If a rank is interrupted, its
        remaining rows are erased when the store is loaded and given the log again.
        """
        self.close()
        self.logged = False
        self.log = self.ranks.agree(
            lambda: ReceiptLog(path, self.secret, new=new, disk=disk) if self.ranks.rank == 0 else None
        )
        try:
            digest = self.digest()
            self.ranks.agree(lambda: self.log.settle(digest) if self.log else None)
            receipt = self._forget_again()
        except BaseException:
            self.close()
            raise
        self.logged = True
        return receipt

    def _forget_again(self) -> Receipt:
        """Forget again what the log lists as forgotten."""
        gone, dtypes = self.ranks.gather((self.log.gone, self.log.dtypes) if self.log else None)[0] or (set(), {})
        rows = Rows(*(column[: self.local.used] for column in self.local.columns))
        mine = self.ranks.agree(lambda: known_to(gone, dtypes, self.secret, rows))
        return self._forget(mine, (), note=False)

    def close(self) -> None:
        """Close the log of receipts; see `KeyStore.close`."""
        if self.log is not None:
            self.log.close()

    # --- followers and files ------------------------------------------------------------------------------

    def attach(self, *held: torch.optim.Optimizer | EMA) -> None:
        """Make optimisers and averages follow the rows of this rank; see `KeyStore.attach`."""
        self.local.attach(*held)

    def detach(self, *held: torch.optim.Optimizer | EMA) -> None:
        """Detach optimisers and averages; see `KeyStore.detach`."""
        self.local.detach(*held)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimisers attached on this rank."""
        return self.local.optimizers

    @property
    def followed(self) -> bool:
        """True if an optimiser or average attached on this rank has a row for each row of this rank."""
        return self.local.followed

    def compact(self) -> None:
        """Sort rows by id and view on each rank, and free unused room; see `KeyStore.compact`."""
        self.ranks.agree(self.local.compact)
        self._recount()

    def save(self, folder: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
        """Write all rows to a folder, each rank its own rows; see `munkey.sharded.folder`.

        Args:
            folder: path of the folder, made if there is none; its old content is overwritten once the new is complete.
            disk: `Disk` that writes.

        Raises:
            OSError: if a rank cannot write; the folder then holds its old content.
        """
        shard = folders.Shard(self.local, self.digest)
        folders.save(shard, self.ranks, os.fspath(folder), disk or Disk())

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None, disk: Disk | None = None
    ) -> Self:
        """Read a store that any number of ranks saved.

        Args:
            folder: path of the folder, the same for all ranks.
            group: process group of the ranks.
            disk: `Disk` that wipes the leftovers of an interrupted save.

        Raises:
            FileNotFoundError: naming the file that is missing.
            ValueError: naming the file that is damaged or of another kind.
        """
        ranks = Ranks(group)
        local, digest = folders.load(os.fspath(folder), ranks, disk or Disk())
        store = cls.around(local, group)
        if store.digest() != digest:
            raise ValueError(
                f"the rows in {os.fspath(folder)!r} do not match the digest in its manifest; restore a backup"
            )
        return store

    def alone(self) -> KeyStore:
        """Return the rows of this rank as a separate store, which no part of this store follows any more."""
        self.local.unfollow(self._near)
        return self.local

    def check_replaceable(self) -> None:
        """Raise ValueError if data would stay behind when another store takes the place of this store."""
        self.local.unfollow(self._near)
        try:
            self.local.check_replaceable()
        finally:
            self.local.follow(self._near)
        if self.log is not None and not self.log.closed:
            raise ValueError("the store keeps a log of receipts; close() it, and give the new store the log afterwards")

    def extra_repr(self) -> str:
        """Return size and ranks."""
        return f"{len(self)} instances, {self.used} rows on {self.ranks.size} ranks, this is rank {self.ranks.rank}"


_OF_ONE = (*(name for name in COLUMNS if name != "values"), "columns", "row_bytes")


def _loaded(store: ShardedKeyStore, _: object) -> None:
    """Count rows again after `load_state_dict`, and forget again what the log lists as forgotten."""
    store._recount()
    if store.logged:
        store._forget_again()


def _merged(ids: Tensor, rows: Tensor, scores: Tensor, candidates: Tensor, k: int) -> Neighbours:
    """Return the best of the neighbours `(N, B, k)` that the ranks found, by score, then by id.

    The views of an id are on one rank, in order.
    """
    ids, rows, scores = (x.transpose(0, 1).flatten(1) for x in (ids, rows, scores))
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return Neighbours(ids.gather(1, order), rows.gather(1, order), scores.gather(1, order), candidates.sum(0))


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    if x.requires_grad and factor != 1:
        x.register_hook(lambda grad: grad * factor)
    return x

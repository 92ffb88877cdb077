"""Rows that are spread over ranks, read by id and found by key.

A row has one number for all ranks: `N` times its number on its rank, plus the rank.

Letters: `B` instances or queries of a call on this rank, `M` rows, `D` width of a key, `V` width of a value, `k`
neighbours, `N` ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from munkey.checks import as_ids, check_width
from munkey.holders import Holders
from munkey.retrieval import Neighbours, check_queries
from munkey.searched import Search, exact
from munkey.sharded.packing import pack, unpack
from munkey.sharded.placement import check_place, owners
from munkey.sharded.ranks import Ranks, Route
from munkey.store import KeyStore
from munkey.stored import Rows

__all__ = ["ShardedRows"]


class ShardedRows(nn.Module):
    """What is asked of a `ShardedKeyStore`; arguments, answers and errors as for `KeyStore`.

    Every call is a collective. Each rank asks for what it wants, as in training, where each has a batch of its own; one
    that wants nothing asks for no ids. An error of one rank is raised on all.

    Args:
        local: the rows that belong to this rank.
        ranks: of the group.
    """

    per_rank = True  # no rank has what another has
    local: KeyStore

    def __init__(self, local: KeyStore, ranks: Ranks) -> None:
        super().__init__()
        self.local, self.ranks = local, ranks
        self._near: dict[int, tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]
        self._recount()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name in _OF_ONE:
            raise AttributeError(
                f"a store on several ranks has no {name} of its own; those of this rank are in .local.{name}, and "
                ".get(ids) fetches rows from all"
            )
        return super().__getattr__(name)

    # --- what all ranks know ------------------------------------------------------------------------------

    def _recount(self) -> None:
        """After every change: who is near whom has to be looked up again, and all ranks learn how many there are."""
        self._near.clear()
        local = self.local
        self.counts = self.ranks.gather((len(local), local.used, local.forgettable))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:  # noqa: ANN401
        ids = state_dict.get(prefix + "local.ids", torch.zeros(0, dtype=torch.int64))
        self.ranks.agree(lambda: check_place(ids, self.ranks.rank, self.ranks.size))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _loaded(self) -> None:
        """After `load_state_dict`."""
        self._recount()

    def __len__(self) -> int:
        return sum(count[0] for count in self.counts)

    @property
    def used(self) -> int:
        """`M`, on all ranks."""
        return sum(count[1] for count in self.counts)

    @property
    def forgettable(self) -> int:
        """How many rows are not there for good, on all ranks."""
        return sum(count[2] for count in self.counts)

    @property
    def widths(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.local.widths

    @property
    def values(self) -> nn.Parameter:
        """Those of this rank, for an optimiser."""
        return self.local.values

    @property
    def holders(self) -> Holders:
        """What follows the values of this rank."""
        return self.local.holders

    # --- by id --------------------------------------------------------------------------------------------

    def __contains__(self, instance: int) -> bool:
        return bool(self.contains([instance]))

    def __iter__(self) -> Iterator[int]:
        """All ids in ascending order."""
        mine = torch.tensor(list(self.local), dtype=torch.int64)
        return iter(self.ranks.gather_rows(mine)[0].sort().values.tolist())

    def contains(self, ids: Iterable[int] | Tensor) -> Tensor:
        """See `KeyStore.contains`."""
        route, asked = self._asked(ids)
        return route.back(self.local.contains(asked))

    def rows_of(self, ids: Iterable[int] | Tensor) -> Tensor:
        """See `KeyStore.rows_of`."""
        route, asked = self._asked(ids)
        rows = self.ranks.agree(lambda: self.local.rows_of(asked))
        counts = torch.tensor([len(self.local.index.of(instance)) for instance in asked.tolist()], dtype=torch.int64)
        return route.back_several(self._everywhere(rows), counts)[0]

    def one_row_of_each(self, ids: Iterable[int] | Tensor, uniform: Tensor) -> Tensor:
        """See `KeyStore.one_row_of_each`."""
        route, asked = self._asked(ids)
        numbers = route.there(uniform)
        return route.back(self._everywhere(self.ranks.agree(lambda: self.local.one_row_of_each(asked, numbers))))

    def get(self, ids: Iterable[int] | Tensor) -> Rows:
        """See `KeyStore.get`."""
        return Rows(*self._fetched(self.rows_of(ids), self.local.columns))

    def _asked(self, ids: Iterable[int] | Tensor) -> tuple[Route, Tensor]:
        """The way of ids to their ranks, and those that came here."""
        wanted = torch.tensor(self.ranks.agree(lambda: as_ids(ids)), dtype=torch.int64)
        route = Route(self.ranks, owners(wanted, self.ranks.size))
        return route, route.there(wanted)

    def _everywhere(self, rows: Tensor) -> Tensor:
        """Numbers for all ranks of rows of this one."""
        return torch.where(rows < 0, rows, rows * self.ranks.size + self.ranks.rank)

    # --- by row -------------------------------------------------------------------------------------------

    def read(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        """See `KeyStore.read`; all ranks go backward, too.

        A gradient is that of the mean of the losses of all ranks, as it is with `DistributedDataParallel`.
        """
        route, own = self._rows(rows.flatten())
        found = route.back(_scaled_gradient(self.local.read(own, sparse=sparse), 1 / self.ranks.size))
        read: Tensor = found.unflatten(0, rows.shape)
        return read

    def described(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `KeyStore.described`."""
        local = self.local
        ids, keys, labels = self._fetched(rows, (local.ids, local.keys, local.labels))
        return ids, keys, labels

    def _rows(self, rows: Tensor) -> tuple[Route, Tensor]:
        route = Route(self.ranks, rows % self.ranks.size)
        return route, route.there(rows // self.ranks.size)

    def _fetched(self, rows: Tensor, columns: tuple[Tensor, ...]) -> list[Tensor]:
        """Copies of columns of rows, in one piece."""
        route, own = self._rows(rows)
        packed = pack([column[own] for column in columns])
        found = route.back(packed)
        packed.zero_()  # a copy of rows that may be forgotten
        return unpack(found, columns)

    # --- by key -------------------------------------------------------------------------------------------

    def nearest(self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """See `KeyStore.nearest`: every rank looks for the `k` nearest among its rows, the best of all are kept."""
        ranks, local = self.ranks, self.local
        counts = self._asking(queries, k, exclude_ids)
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

    def _asking(self, queries: Tensor, k: int, exclude_ids: Tensor | None) -> list[int]:
        """How many queries each rank has, once all is as it must be everywhere."""
        error = None
        try:
            check_width(k=k)
            check_queries(queries, self.local.keys)
        except (TypeError, ValueError) as raised:
            error = raised
        count, wanted = (0, 0) if error else (len(queries), k)
        said = self.ranks.numbers(error is not None, count, wanted, exclude_ids is not None)
        self.ranks.fail(error, anywhere=self.ranks.size > 1 and any(failed for failed, *_ in said))
        if len({tuple(settings) for _, _, *settings in said}) > 1:
            each = ", ".join(f"rank {rank} {k} and {bool(ids)}" for rank, (_, _, k, ids) in enumerate(said))
            raise ValueError(f"all ranks must ask for as many neighbours, with or without ids to exclude; found {each}")
        return [count for _, count, _, _ in said]

    def nearest_to_rows(self, rows: Tensor, k: int, search: Search) -> tuple[Tensor, Tensor]:
        """See `KeyStore.nearest_to_rows`."""
        if search is not exact:
            raise TypeError("a store on several ranks does its own search; leave search= out")
        route, own = self._rows(rows)
        near, scores = self._table(k)
        unknown = own.unique()
        unknown = unknown[near[unknown, 0] == _UNKNOWN]
        if self.ranks.any(len(unknown) > 0):
            queries = self.local.keys[unknown]
            found = self.nearest(queries, k, exclude_ids=self.local.ids[unknown])
            queries.zero_()  # a copy of rows that may be forgotten later
            near[unknown], scores[unknown] = found.rows, found.scores
        return route.back(near[own]), route.back(scores[own])

    def _table(self, k: int) -> tuple[Tensor, Tensor]:
        """Neighbours of the rows of this rank, as far as they were looked up."""
        if k not in self._near:
            shape = self.local.used, k
            self._near[k] = torch.full(shape, _UNKNOWN), torch.zeros(shape, dtype=torch.float64)
        return self._near[k]

    def at_least(self, queries: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """See `KeyStore.at_least`; the pairs of a query come in no particular order."""
        everyone, counts = self.ranks.gather_rows(queries)
        query, ids, scores = self.ranks.agree(lambda: self.local.at_least(everyone, threshold))
        edges = torch.tensor(counts).cumsum(0)
        route = Route(self.ranks, torch.searchsorted(edges, query, right=True))
        first = int(edges[self.ranks.rank]) - counts[self.ranks.rank]
        query, ids, scores = unpack(route.there(pack((query, ids, scores))), (query, ids, scores))
        return query - first, ids, scores


_OF_ONE = ("ids", "views", "labels", "permanent", "keys", "columns", "index", "screen", "row_bytes")
_UNKNOWN = -2  # -1 says that there is no neighbour


def _loaded(store: Any, _: object) -> None:  # noqa: ANN401
    store._loaded()


def _merged(ids: Tensor, rows: Tensor, scores: Tensor, candidates: Tensor, k: int) -> Neighbours:
    """The best of what each rank found, `(N, B, k)`: by score, then by id; views of an id are on one rank, in order."""
    ids, rows, scores = (x.transpose(0, 1).flatten(1) for x in (ids, rows, scores))
    order = ids.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return Neighbours(ids.gather(1, order), rows.gather(1, order), scores.gather(1, order), candidates.sum(0))


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    if x.requires_grad and factor != 1:
        x.register_hook(lambda grad: grad * factor)
    return x

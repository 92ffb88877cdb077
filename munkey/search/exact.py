"""Nearest keys by dot product, exactly: a fast screen in low precision, then float64 for the few remaining rows.

Rows that a first pass over all keys does not rule out (`munkey.search.bounds`) are compared in float32. The few
remaining rows are scored in float64, each separately, so that the result depends neither on the batch nor on row
numbers. Ties go to the smaller id, and to its first view.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from munkey.search.bounds import Pairs, may_overflow, plain, product, screened
from munkey.search.scores import pair_scores
from munkey.search.screen import Screen, length_above
from treediff.core.checks import check_positive

__all__ = [
    "Neighbours",
    "Screen",
    "Search",
    "Searchable",
    "at_least",
    "check_queries",
    "exact",
    "nearest",
]

_PAIRS = 1 << 21  # pairs of a query and a row at a time
_ROWS_AT_ONCE = 1 << 19  # scores at a time


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of each query, the nearest first; a nearer row has a greater score.

    Args:
        ids: `(B, k)` int64 owners; -1 if there were fewer than `k` rows.
        rows: `(B, k)` int64 row numbers; -1 likewise.
        scores: `(B, k)`, of an exact search dot products in float64; `-inf` likewise.
        candidates: `(B,)` int64, number of rows that were scored one by one.
    """

    ids: Tensor
    rows: Tensor
    scores: Tensor
    candidates: Tensor


class Searchable(Protocol):
    """Interface of a store for a search; columns have room for more rows than are in use.

    Attributes:
        keys: `(R, D)`.
        ids: `(R,)` int64, the owner of each row.
        views: `(R,)` int64, the number of each row among the rows of its owner.
    """

    keys: Tensor
    ids: Tensor
    views: Tensor

    @property
    def lock(self) -> AbstractContextManager[None]:
        """Lock, under which no row is added, removed or moved."""

    @property
    def used(self) -> int:
        """Number of rows in use, the first of each column."""

    @property
    def changes(self) -> int:
        """Number of times that rows were added, removed or moved."""

    def nearest(self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """Return the rows with the greatest dot product, exactly."""


class Search(Protocol):
    """Function that finds the nearest rows of a store.

    Scores depend on query and key alone: scores of stored rows are kept, and used in every epoch of training.
    """

    def __call__(self, store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """Return the `k` nearest rows of each query `(B, D)`, without rows of the owners `exclude_ids` `(B,)`."""


def exact(store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
    """Return the rows with the greatest dot product of all rows; see `nearest`."""
    return store.nearest(queries, k, exclude_ids=exclude_ids)


@torch.no_grad()
def nearest(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    k: int,
    *,
    views: Tensor | None = None,
    screen: Screen | None = None,
    exclude_ids: Tensor | None = None,
) -> Neighbours:
    """Return the `k` rows with the greatest dot product, exactly; ties go to the smaller ids.

    Args:
        queries: `(B, D)`.
        keys: `(R, D)`, of the same dtype, finite.
        ids: `(R,)` int64, the owner of each row.
        k: number of rows.
        views: `(R,)` int64, the number of each row among the rows of its owner; needed if an owner has several rows.
        screen: screen of the keys, if precomputed; otherwise the first pass is over the keys themselves.
        exclude_ids: `(B,)` int64, for each query an owner whose rows are left out.

    Raises:
        TypeError: if `k` is not an integer.
        ValueError: if `k` is below 1, or the queries are not `(B, D)`, of the dtype of the keys, and finite.

    Examples:
        >>> nearest(torch.tensor([[1.0, 0.2]]), torch.eye(2), torch.tensor([7, 8]), k=1).ids
        tensor([[7]])
    """
    check_positive(k=k)
    check_queries(queries, keys)
    wanted = k
    if exclude_ids is not None:  # as many more rows as one owner can have
        wanted += 1 if views is None or not len(views) else 1 + int(views.max())
    found, length = None, length_above(keys) if screen is None else screen.length
    # On other devices partial sums of products in bfloat16 may be rounded to bfloat16.
    if screen is not None and keys.device.type == "cpu":
        found = screened(queries, screen, wanted)
    if found is None:
        found = plain(queries, keys, length, wanted)
    if len(found) <= _PAIRS or len(queries) == 1:
        pairs = found.pairs()
        candidates = torch.bincount(pairs[0], minlength=len(queries))
        pairs = _narrowed(queries, keys, length, candidates, wanted, pairs)
        return _ranked(queries, keys, ids, views, k, exclude_ids, candidates, pairs)
    # Too many pairs to score at once, as for many equal keys.
    own = [None, None] if exclude_ids is None else exclude_ids.chunk(2)
    halves = [
        nearest(part, keys, ids, k, views=views, screen=screen, exclude_ids=mine)
        for part, mine in zip(queries.chunk(2), own, strict=True)
    ]
    return Neighbours(*(torch.cat([getattr(half, field.name) for half in halves]) for field in fields(Neighbours)))


@torch.no_grad()
def at_least(queries: Tensor, keys: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, rows and float64 scores `(n,)` of all pairs with a dot product of at least `least`.

    The pairs are sorted by query and row.

    Args:
        queries: `(B, D)`.
        keys: `(R, D)`, of the same dtype.
        least: the least score.

    Raises:
        ValueError: as for `nearest`.
    """
    check_queries(queries, keys)
    wide, found = queries.double(), []
    longest = [float(length_above(rows).amax()) if len(rows) else 0.0 for rows in (queries, keys)]
    room = 2.0**-40 * longest[0] * longest[1]
    step = max(1, _ROWS_AT_ONCE // max(1, len(queries)))
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        row, query = (product(part, wide) >= least - room).nonzero(as_tuple=True)
        found.append(torch.stack([query, row + start]))
    query, row = torch.cat(found, 1) if found else torch.zeros(2, 0, dtype=torch.int64, device=keys.device)
    wide.zero_()  # a copy of queries, which may be keys
    scores = pair_scores(queries, keys, query, row)
    order = (scores >= least).nonzero().squeeze(1)
    order = order[(query * len(keys) + row)[order].argsort()]
    return query[order], row[order], scores[order]


def _narrowed(queries: Tensor, keys: Tensor, length: Tensor, candidates: Tensor, k: int, found: Pairs) -> Pairs:
    """Return pairs that float32 does not rule out; all pairs if they are few, or unevenly distributed over queries."""
    (query, row), most = found, int(candidates.max()) if len(candidates) else 0
    if most <= 4 * k or most * len(queries) > 4 * len(query):
        return found
    order = query.argsort(stable=True)
    query, row = query[order], row[order]
    place = torch.arange(len(query), device=query.device) - (candidates.cumsum(0) - candidates)[query]
    if may_overflow(queries, length[row]):
        return query, row
    wide = torch.promote_types(keys.dtype, torch.float32)
    scores = torch.full((len(queries), most), -torch.inf, dtype=wide, device=keys.device)
    scores[query, place] = pair_scores(queries, keys, query, row, wide)
    longest = length.new_zeros(len(queries)).scatter_reduce_(0, query, length[row], "amax")
    slack = 2.0**-22 * keys.shape[1] * length_above(queries) * longest
    least = scores.topk(k, 1).values[:, -1] - 2 * slack - 8 * keys.shape[1] * torch.finfo(torch.float32).tiny
    # Not `>=`, so that NaN after an overflow remains.
    kept = ~(scores[query, place] < least[query])
    return query[kept], row[kept]


# --- second pass ----------------------------------------------------------------------------------------------


def _ranked(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    views: Tensor | None,
    k: int,
    exclude_ids: Tensor | None,
    candidates: Tensor,
    found: Pairs,
) -> Neighbours:
    """Return the best `k` of the pairs of each query, by a score in float64."""
    query, row = found
    scores = pair_scores(queries, keys, query, row)
    if exclude_ids is not None:
        kept = ids[row] != exclude_ids[query]
        query, row, scores = query[kept], row[kept], scores[kept]
    order = torch.arange(len(row), device=row.device)
    # Sorts are stable, so that the last sort counts most.
    for column, descending in ((None if views is None else views[row], False), (ids[row], False), (scores, True)):
        if column is not None:
            order = order[column[order].argsort(stable=True, descending=descending)]
    order = order[query[order].argsort(stable=True)]
    query, row, scores = query[order], row[order], scores[order]
    starts = torch.searchsorted(query, torch.arange(len(queries), device=query.device))
    place = torch.arange(len(query), device=query.device) - starts[query]
    first = place < k
    query, row, scores, place = query[first], row[first], scores[first], place[first]
    none = ids.new_full((len(queries), k), -1)
    best = Neighbours(none, none.clone(), torch.full_like(none, -torch.inf, dtype=torch.float64), candidates)
    best.ids[query, place], best.rows[query, place], best.scores[query, place] = ids[row], row, scores
    return best


def check_queries(queries: Tensor, keys: Tensor) -> None:
    """Raise ValueError unless queries can be compared with keys."""
    if queries.ndim != 2 or queries.shape[1] != keys.shape[1] or queries.dtype != keys.dtype:
        raise ValueError(
            f"expected queries of shape (B, {keys.shape[1]}) and dtype {keys.dtype}, found {tuple(queries.shape)} and "
            f"{queries.dtype}"
        )
    if not queries.isfinite().all():
        raise ValueError("queries must be finite, found NaN or infinity")

"""Nearest keys, exactly: a fast screen in low precision, then float64 for the few rows that may be among the nearest.

A product in bfloat16 is several times faster than in float32, and wrong by a known amount at most. With rounded vectors
`q'` and `k'` (Cauchy and Schwarz),

    |q k - q' k'| <= |q'| |k - k'| + |q - q'| |k|,

to which come the roundings of the sum and of its result. So a row whose upper bound lies below the lower bounds of `k`
other rows is no neighbour. Where all scores are near 1 the last rounding would be the greatest, so the product is taken
of `(q', -o)` and `(k', 1)`: near the offset `o` little is rounded. Of a group of rows only the best score is kept; rows
of groups that may hold a neighbour are looked at in float32, and the few that are left are scored in float64, each on
its own, so that the result depends neither on the batch nor on where a row stands. Ties go to the smaller id, and to
its first view.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours, `G` groups of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.checks import check_width

__all__ = ["Neighbours", "Screen", "at_least", "nearest", "pair_scores"]

_BLOCK = 1 << 19  # scores at a time, which a processor's cache holds
_GROUP = 2048  # numbers of rows of which only the best score is kept, 4 to 16 rows
_GROUPS = 32  # groups of which one counts for the bound on the k-th best
_TOO_MANY = 0.01  # share of all pairs beyond which a look in full precision is cheaper than scoring them again
_PAIRS = 1 << 24  # pairs of a query and a row at a time
_SCORED = 1 << 22  # numbers at a time that are scored again

Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest rows of each query, the nearest first.

    Args:
        ids: `(B, k)` int64 owners; -1 where there were fewer than `k` rows.
        rows: `(B, k)` int64 row numbers; -1 likewise.
        scores: `(B, k)` in float64; `-inf` likewise.
        candidates: `(B,)` int64, how many rows were scored again.
    """

    ids: Tensor
    rows: Tensor
    scores: Tensor
    candidates: Tensor


@dataclass(frozen=True, eq=False)
class Screen:
    """Keys as the first look sees them, and what is needed to bound its error; each row of its own key alone.

    Args:
        keys: `(R, D + 1)` bfloat16, the rounded keys with a one behind.
        rounding: `(R,)` float32, at least the length of what rounding took from each key.
        length: `(R,)` float32, at least the length of each key.
    """

    keys: Tensor
    rounding: Tensor
    length: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Screen:
        """The screen of some keys."""
        rounded = keys.to(torch.bfloat16)
        return cls(F.pad(rounded, (0, 1), value=1.0), _length(keys - rounded.to(keys.dtype)), _length(keys))


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
    """The `k` rows with the greatest dot product, exactly; of equal ones those with the smaller ids.

    Args:
        queries: `(B, D)`.
        keys: `(R, D)`, of the same dtype, finite.
        ids: `(R,)` int64, the owner of each row.
        k: how many.
        views: `(R,)` int64, the number of each row among those of its owner; needed where an owner has several.
        screen: that of the keys, if it is at hand; otherwise the first look is at the keys themselves.
        exclude_ids: `(B,)` int64, for each query an owner whose rows are not to be found.

    Raises:
        TypeError: if `k` is not whole.
        ValueError: if it is below 1, or the queries are not `(B, D)`, of the dtype of the keys, and finite.

    Examples:
        >>> nearest(torch.tensor([[1.0, 0.2]]), torch.eye(2), torch.tensor([7, 8]), k=1).ids
        tensor([[7]])
    """
    check_width(k=k)
    _check_queries(queries, keys)
    wanted = k
    if exclude_ids is not None:  # as many more as one owner can take
        wanted += 1 if views is None or not len(views) else 1 + int(views.max())
    found = None
    # Elsewhere sums of products in bfloat16 may be rounded to bfloat16 half way.
    if screen is not None and keys.device.type == "cpu":
        found = _screened(queries, screen, wanted)
    if found is None:
        found = _plain(queries, keys, wanted)
    if len(found[0]) <= _PAIRS or len(queries) == 1:
        candidates = torch.bincount(found[0], minlength=len(queries))
        found = _narrowed(queries, keys, candidates, wanted, found)
        return _ranked(queries, keys, ids, views, k, exclude_ids, candidates, found)
    # Too many to look at together, as of many equal keys.
    own = [None, None] if exclude_ids is None else exclude_ids.chunk(2)
    halves = [
        nearest(part, keys, ids, k, views=views, screen=screen, exclude_ids=mine)
        for part, mine in zip(queries.chunk(2), own, strict=True)
    ]
    return Neighbours(*(torch.cat([getattr(half, field.name) for half in halves]) for field in fields(Neighbours)))


@torch.no_grad()
def at_least(queries: Tensor, keys: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs with a dot product of at least `least`: queries, rows, and float64 scores `(n,)`, by query and row.

    Args:
        queries: `(B, D)`.
        keys: `(R, D)`, of the same dtype.
        least: the least score.

    Raises:
        ValueError: as for `nearest`.
    """
    _check_queries(queries, keys)
    wide, found = queries.double(), []
    room = (
        2.0**-40 * float(_length(queries).amax()) * float(_length(keys).amax()) if len(queries) and len(keys) else 0.0
    )
    step = max(1, _BLOCK // max(1, len(queries)))
    for start, part in zip(range(0, len(keys), step), keys.split(step), strict=True):
        row, query = (_product(part, wide) >= least - room).nonzero(as_tuple=True)
        found.append(torch.stack([query, row + start]))
    query, row = torch.cat(found, 1) if found else torch.zeros(2, 0, dtype=torch.int64)
    wide.zero_()  # a copy of queries, which may be keys
    scores = pair_scores(queries, keys, query, row)
    order = (scores >= least).nonzero().squeeze(1)
    order = order[(query * len(keys) + row)[order].argsort()]
    return query[order], row[order], scores[order]


# --- the first look -------------------------------------------------------------------------------------------


def _screened(queries: Tensor, screen: Screen, k: int) -> Pairs | None:
    """Pairs of a query and a row that may be among its nearest; None if there are too many to score again."""
    rounded = queries.to(torch.bfloat16)
    look = F.pad(rounded, (0, 1))
    sample = screen.keys[:: max(1, len(screen.keys) // 512)] @ look.T
    offset = sample.topk(min(k, len(sample)), 0).values[-1] if len(sample) else rounded.new_zeros(len(queries))
    lost = _length(queries - rounded.to(queries.dtype))
    error = _Error(_length(rounded), lost, offset.abs().float(), torch.bfloat16)
    look[:, -1] = -offset
    place, query, group = _candidates(look, screen.keys, screen.rounding, screen.length, error, k)
    if len(place) * group > _TOO_MANY * len(screen.keys) * len(queries) + 16 * k * len(queries):
        return None
    return _rows_of(place, query, group, len(screen.keys))


def _plain(queries: Tensor, keys: Tensor, k: int) -> Pairs:
    """The same by a look at the keys themselves, however many there are, in float64, which no setting makes coarser."""
    none = torch.zeros(len(queries), device=keys.device)
    error = _Error(_length(queries), none, none, torch.float64)
    found = _candidates(queries.double(), keys, torch.zeros(len(keys), device=keys.device), _length(keys), error, k)
    return _rows_of(*found, len(keys))


def _rows_of(place: Tensor, query: Tensor, group: int, count: int) -> Pairs:
    """All rows of some groups."""
    row = (place[:, None] * group + torch.arange(group, device=place.device)).flatten()
    inside = row < count
    return query.repeat_interleave(group)[inside], row[inside]


@dataclass(frozen=True, eq=False)
class _Error:
    """What bounds the error of a look: lengths `(B,)` of queries and of what rounding took from them, and offsets."""

    length: Tensor
    rounding: Tensor
    offset: Tensor
    dtype: torch.dtype

    def bound(self, scores: Tensor, width: int, rounding: Tensor, length: Tensor) -> Tensor:
        """`(G, B)` for some scores, and the greatest roundings and lengths `(G,)` of keys in each group."""
        # Of the sum: a rounding of each number, with room for more, and what is too small to be held at all.
        own = width * (2.0**-50 if self.dtype == torch.float64 else 2.0**-22)
        off = torch.outer(rounding, self.length) + torch.outer(length, self.rounding)
        off.add_(torch.outer(length + rounding, self.length), alpha=own).add_(self.offset, alpha=own)
        off.add_(width * torch.finfo(torch.float32).tiny)
        return off.add_(scores.abs(), alpha=torch.finfo(self.dtype).eps)  # of the result


def _candidates(
    queries: Tensor, keys: Tensor, rounding: Tensor, length: Tensor, error: _Error, k: int
) -> tuple[Tensor, Tensor, int]:
    """Groups of rows that may hold a neighbour, `(n,)`, of which query, and how many rows a group has."""
    group = max(1, min(16, max(4, _GROUP // keys.shape[1]), len(keys) // (4 * k)))
    best = _best_of_groups(queries, keys, group)
    slack = error.bound(best, queries.shape[1], *(_greatest(column, group) for column in (rounding, length)))
    least = _kth_best(best - slack, k)
    # Not `>=`, so that what overflowed, and is no number, passes.
    place, query = (~(best.add_(slack) < least)).nonzero(as_tuple=True)
    return place, query, group


def _kth_best(lower: Tensor, k: int) -> Tensor:
    """`(B,)` a bound that at least `k` rows reach, from lower bounds `(G, B)` of groups."""
    lower = _greatest(lower, max(1, min(_GROUPS, len(lower) // (4 * k))))
    return lower.topk(k, 0).values[-1] if len(lower) >= k else lower.new_full((lower.shape[1],), -torch.inf)


def _greatest(rows: Tensor, group: int) -> Tensor:
    """`(ceil(n / group), ...)` the greatest of each group of rows."""
    whole = len(rows) // group * group
    best = rows[:whole].unflatten(0, (whole // group, group)).amax(1)
    return torch.cat([best, rows[whole:].amax(0, keepdim=True)]) if whole < len(rows) else best


def _best_of_groups(queries: Tensor, keys: Tensor, group: int) -> Tensor:
    """`(G, B)` best score of each group of rows, in float32 at least; some at a time, so that a cache holds them."""
    step = max(1, _BLOCK // max(1, len(queries)) // group) * group
    wide = torch.promote_types(queries.dtype, torch.float32)
    return torch.cat([_greatest(_product(part, queries), group).to(wide) for part in keys.split(step)])


def _product(keys: Tensor, queries: Tensor) -> Tensor:
    if keys.dtype == queries.dtype:
        return keys @ queries.T
    wide = keys.to(queries.dtype)
    scores = wide @ queries.T
    wide.zero_()  # a copy of rows that may be forgotten later
    return scores


def _narrowed(queries: Tensor, keys: Tensor, candidates: Tensor, k: int, found: Pairs) -> Pairs:
    """Those of the pairs that float32 does not rule out, where all queries have about as many."""
    (query, row), most = found, int(candidates.max()) if len(candidates) else 0
    if most <= 4 * k or most * len(queries) > 4 * len(query):
        return found
    order = query.argsort(stable=True)
    query, row = query[order], row[order]
    place = torch.arange(len(query), device=query.device) - (candidates.cumsum(0) - candidates)[query]
    wide = torch.promote_types(keys.dtype, torch.float32)
    scores = torch.full((len(queries), most), -torch.inf, dtype=wide, device=keys.device)
    longest = torch.zeros(len(queries), device=keys.device)
    rows = row.new_zeros(len(queries), most)
    rows[query, place] = row
    for part in torch.arange(len(queries), device=keys.device).split(max(1, _SCORED // (most * keys.shape[1]))):
        copies = keys[rows[part]].to(wide)
        longest[part] = _length(copies.flatten(0, 1)).view(len(part), most).amax(1)
        scores[part] = copies.mul_(queries[part, None]).sum(2)
        copies.zero_()  # made of rows that may be forgotten later
    there = torch.zeros_like(scores, dtype=torch.bool)
    there[query, place] = True
    scores.masked_fill_(~there, -torch.inf)
    slack = 2.0**-22 * keys.shape[1] * _length(queries) * longest
    least = scores.topk(k, 1).values[:, -1] - 2 * slack - torch.finfo(torch.float32).tiny
    # Not `>=`, so that what overflowed, and is no number, passes.
    kept = ~(scores[query, place] < least[query])
    return query[kept], row[kept]


# --- the second -----------------------------------------------------------------------------------------------


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
    """The best `k` of some pairs, by a score in float64."""
    query, row = found
    size = max(1, _SCORED // keys.shape[1])
    parts = zip(query.split(size), row.split(size), strict=True)
    scores = torch.cat([pair_scores(queries, keys, *part) for part in parts])
    if exclude_ids is not None:
        kept = ids[row] != exclude_ids[query]
        query, row, scores = query[kept], row[kept], scores[kept]
    order = torch.arange(len(row), device=row.device)
    # The last that is sorted by counts most.
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


def pair_scores(queries: Tensor, keys: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """`(n,)` float64 dot products, each summed in the same order whatever else is in the batch."""
    copies = [queries[query], keys[row]]
    copies += [copy.double() for copy in copies]
    scores = (copies[2] * copies[3]).sum(1)
    for copy in copies:  # of rows that may be forgotten later
        copy.zero_()
    return scores


def _length(x: Tensor) -> Tensor:
    """`(n,)` float32 numbers a little above the lengths of rows `(n, D)`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=exact).float()
    return length * (1 + 2.0**-10)


def _check_queries(queries: Tensor, keys: Tensor) -> None:
    if queries.ndim != 2 or queries.shape[1] != keys.shape[1] or queries.dtype != keys.dtype:
        raise ValueError(
            f"expected queries of shape (B, {keys.shape[1]}) and dtype {keys.dtype}, found {tuple(queries.shape)} and "
            f"{queries.dtype}"
        )
    if not queries.isfinite().all():
        raise ValueError("queries must be finite, found NaN or infinity")

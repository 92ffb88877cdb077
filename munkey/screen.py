"""A first look at all keys in low precision, which rules out rows that cannot be among the nearest.

A product in bfloat16 is several times faster than in float32 where the processor has it, and wrong by a known amount.
With rounded vectors `q'` and `k'` (Cauchy and Schwarz),

    |q k - q' k'| <= |q'| |k - k'| + |q - q'| |k|,

to which come the roundings of the sum and of its result. So a row whose upper bound lies below the lower bounds of `k`
other rows is no neighbour. Where all scores are near 1 the last rounding would be the greatest, so the product is taken
of `(q', -o)` and `(k', 1)`: near the offset `o` little is rounded. Of a group of rows only the best score is kept.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours, `G` groups of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups", "Pairs", "Screen", "length_above", "may_overflow", "plain", "product", "screened"]

_BLOCK = 1 << 19  # scores at a time, which a processor's cache holds
_GROUP = 2048  # numbers of rows of which only the best score is kept, 4 to 16 rows
_GROUPS = 32  # groups of which one counts for the bound on the k-th best
_ROWS = 4096  # at a time, in float64
_TOO_MANY = 0.01  # share of all pairs beyond which a look in full precision is cheaper than scoring them again

Pairs = tuple[Tensor, Tensor]


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
        count, width = keys.shape
        empty = torch.empty(2, count, dtype=torch.float32, device=keys.device)
        screen = cls(keys.new_empty(count, width + 1, dtype=torch.bfloat16), *empty)
        screen.write(keys)
        return screen

    def write(self, keys: Tensor) -> None:
        """Be the screen of some keys, as many as there are rows."""
        self.keys[:, :-1] = keys
        self.keys[:, -1] = 1
        lost = self.keys[:, :-1].to(keys.dtype, copy=True).sub_(keys)
        self.rounding.copy_(length_above(lost))
        self.length.copy_(length_above(keys))


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of rows that may hold a neighbour: their number, and of which query `(n,)` each.

    Args:
        place: `(n,)`.
        query: `(n,)`.
        size: rows of a group.
        count: rows in all.
    """

    place: Tensor
    query: Tensor
    size: int
    count: int

    def __len__(self) -> int:
        """Pairs of a query and a row."""
        return len(self.place) * self.size

    def pairs(self) -> Pairs:
        """All rows of all groups."""
        row = (self.place[:, None] * self.size + torch.arange(self.size, device=self.place.device)).flatten()
        inside = row < self.count
        return self.query.repeat_interleave(self.size)[inside], row[inside]


def may_overflow(queries: Tensor, length: Tensor) -> bool:
    """Whether a sum of products with keys of such lengths may leave the range of float32."""
    return bool(len(queries) and len(length) and not float(length_above(queries).amax() * length.amax()) < 2.0**126)


def screened(queries: Tensor, screen: Screen, k: int) -> Groups | None:
    """Groups that may hold a neighbour; None if there are too many to score again, or numbers are too great."""
    if may_overflow(queries, screen.length):
        return None
    look = queries.new_zeros(len(queries), queries.shape[1] + 1, dtype=torch.bfloat16)
    rounded = look[:, :-1].copy_(queries)
    sample = screen.keys[:: max(1, len(screen.keys) // 512)] @ look.T
    offset = sample.topk(min(k, len(sample)), 0).values[-1] if len(sample) else look.new_zeros(len(queries))
    lost = rounded.to(queries.dtype, copy=True).sub_(queries)
    error = _Error(length_above(rounded), length_above(lost), offset.abs().float(), torch.bfloat16)
    look[:, -1] = -offset
    found = _candidates(look, screen.keys, screen.rounding, screen.length, error, k)
    look.zero_()  # queries may be keys
    return None if len(found) > _TOO_MANY * len(screen.keys) * len(queries) + 16 * k * len(queries) else found


def plain(queries: Tensor, keys: Tensor, k: int) -> Groups:
    """The same by a look at the keys themselves, however many there are, in float64, which no setting makes coarser."""
    none = torch.zeros(len(queries), device=keys.device)
    error = _Error(length_above(queries), none, none, torch.float64)
    lost, wide = torch.zeros(len(keys), device=keys.device), queries.to(torch.float64, copy=True)
    found = _candidates(wide, keys, lost, length_above(keys), error, k)
    wide.zero_()  # queries may be keys
    return found


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
        off.add_(4 * width * torch.finfo(torch.float32).tiny)
        return off.add_(scores.abs(), alpha=torch.finfo(self.dtype).eps)  # of the result


def _candidates(queries: Tensor, keys: Tensor, rounding: Tensor, length: Tensor, error: _Error, k: int) -> Groups:
    group = max(1, min(16, max(4, _GROUP // keys.shape[1]), len(keys) // (4 * k)))
    best = _best_of_groups(queries, keys, group)
    slack = error.bound(best, queries.shape[1], *(_greatest(column, group) for column in (rounding, length)))
    least = _kth_best(best - slack, k)
    # Not `>=`, so that what overflowed, and is no number, passes.
    place, query = (~(best.add_(slack) < least)).nonzero(as_tuple=True)
    return Groups(place, query, group, len(keys))


def _kth_best(lower: Tensor, k: int) -> Tensor:
    """`(B,)` a bound that at least `k` rows reach, from lower bounds `(G, B)` of groups."""
    lower = lower.masked_fill(lower.isnan(), -torch.inf)  # what overflowed says nothing
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
    return torch.cat([_greatest(product(part, queries), group).to(wide) for part in keys.split(step)])


def product(keys: Tensor, queries: Tensor) -> Tensor:
    """`(R, B)` dot products in the dtype of the queries."""
    if keys.dtype == queries.dtype:
        return keys @ queries.T
    wide = keys.to(queries.dtype)
    scores = wide @ queries.T
    wide.zero_()  # a copy of rows that may be forgotten later
    return scores


def length_above(x: Tensor) -> Tensor:
    """`(n,)` float32 numbers a little above the lengths of rows `(n, D)`."""
    found = torch.empty(len(x), device=x.device)
    for part, lengths in zip(x.split(_ROWS), found.split(_ROWS), strict=True):
        wide = part.to(torch.float64, copy=True)  # whose squares are neither too great nor too small
        lengths.copy_(torch.linalg.vector_norm(wide, dim=1))
        wide.zero_()  # a copy of rows that may be forgotten later
    # Room for what is rounded, and for numbers that products in low precision take for 0.
    above: Tensor = found * (1 + 2.0**-10) + x.shape[1] ** 0.5 * torch.finfo(torch.float32).tiny
    return above

"""A first look at all keys in low precision, which rules out rows that cannot be among the nearest.

A product in bfloat16 is several times faster than in float32 where the processor has it, and wrong by a known amount.
With rounded vectors `q'` and `k'` (Cauchy and Schwarz),

    |q k - q' k'| <= |q'| |k - k'| + |q - q'| |k|,

to which come the roundings of the sum and of its result. So a row whose upper bound lies below the lower bounds of `k`
other rows is no neighbour. Where all scores are near 1 the last rounding would be the greatest, so the product is taken
of `(q', -o)` and `(k', 1)`: near the offset `o` little is rounded. Of a group of rows only the best score is kept.

A few queries are no work for a processor, which waits for the keys. So they look at keys of one byte per number, in a
unit of each key's own. The same bound holds, is looser, and rows that pass are cheap to score again for a few.

A processor that has neither looks at the keys themselves, in float32.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours, `G` groups of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from treediff.cpu import has_fast

__all__ = ["Groups", "Pairs", "Screen", "length_above", "may_overflow", "plain", "product", "screened"]

_BLOCK = 1 << 19  # scores at a time, which a processor's cache holds
_GROUP = 2048  # numbers of rows of which only the best score is kept, 4 to 16 rows
_GROUPS = 32  # groups of which one counts for the bound on the k-th best
_ROWS = 4096  # at a time, in float64
_TOO_MANY = 0.01  # share of all pairs beyond which a look in full precision is cheaper than scoring them again
_FEW = 16  # queries that look at bytes first
_WIDEST = 2**17  # key whose products of bytes, of up to 2 ** 14, a sum of 32 bits holds
_TINY = torch.finfo(torch.float32).tiny

Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Screen:
    """Keys as the first look sees them, and what is needed to bound its error; each row of its own key alone.

    Args:
        rounded: `(R, D + 1)` bfloat16, the rounded keys with a one behind.
        rounding: `(R,)` float32, at least the length of what rounding took from each key.
        length: `(R,)` float32, at least the length of each key.
        small: `(R, D)` int8, the keys in units of their own.
        unit: `(R,)` float32, that unit, a 127th of the largest number, or 0.
        small_rounding: `(R,)` float32, at least the length of what was lost there.
    """

    rounded: Tensor
    rounding: Tensor
    length: Tensor
    small: Tensor
    unit: Tensor
    small_rounding: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Screen:
        """The screen of some keys."""
        count, width = keys.shape
        rounding, length, unit, small_rounding = torch.empty(4, count, dtype=torch.float32, device=keys.device)
        rounded = keys.new_empty(count, width + 1, dtype=torch.bfloat16)
        small = keys.new_empty(count, width, dtype=torch.int8)
        screen = cls(rounded, rounding, length, small, unit, small_rounding)
        screen.write(keys)
        return screen

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All of it."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def write(self, keys: Tensor) -> None:
        """Be the screen of some keys, as many as there are rows."""
        self.rounded[:, -1] = 1
        self.length.copy_(length_above(keys))
        for start in range(0, len(keys), _ROWS):
            rows, part = slice(start, start + _ROWS), keys[start : start + _ROWS]
            self.rounded[rows, :-1] = part
            lost = self.rounded[rows, :-1].to(keys.dtype, copy=True).sub_(part)
            self.rounding[rows] = length_above(lost)
            for column, new in zip((self.small, self.unit, self.small_rounding), _bytes_of(part), strict=True):
                column[rows] = new
                new.zero_()  # made of rows that may be forgotten later
            lost.zero_()


@cache
def _bytes_are_exact() -> bool:
    """Whether PyTorch sums products of bytes exactly here; processors without an instruction for it may saturate."""
    most = torch.full((64, 256), 127, dtype=torch.int8)
    most[::2] = -127
    wide = most.double()
    return all(torch.equal(torch._int_mm(most[:n], most.T).double(), wide[:n] @ wide.T) for n in (1, _FEW))


def _bytes_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `(n, D)` in bytes, their units, and at least the lengths of what was lost."""
    wide = x.to(torch.float64, copy=True)
    unit = (wide.abs().amax(1) / 127).to(torch.float32)
    unit.masked_fill_(unit < _TINY, 0.0)  # which some processors take for 0
    steps = torch.where(unit > 0, unit, torch.inf).double()[:, None]
    small = torch.empty(x.shape, dtype=torch.int8, device=x.device)  # laid out as products need it
    held = (wide / steps).round_().clamp_(-127, 127)
    small.copy_(held)
    rounding = length_above(wide.sub_(held.mul_(unit.double()[:, None])))
    for copy in (wide, held):  # of rows that may be forgotten later
        copy.zero_()
    return small, unit, rounding


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of rows that may hold a neighbour: which, and of which query `(n,)` each.

    There are `G = ceil(R / size)` groups; the first has rows 0, G, 2 G and so on.

    Args:
        place: `(n,)`.
        query: `(n,)`.
        size: rows of a group.
        count: rows in all, `R`.
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
        apart = -(-self.count // self.size)
        row = (self.place[:, None] + apart * torch.arange(self.size, device=self.place.device)).flatten()
        inside = row < self.count
        return self.query.repeat_interleave(self.size)[inside], row[inside]


def may_overflow(queries: Tensor, length: Tensor) -> bool:
    """Whether a sum of products with keys of such lengths may leave the range of float32."""
    return bool(len(queries) and len(length) and not float(length_above(queries).amax() * length.amax()) < 2.0**126)


def screened(queries: Tensor, screen: Screen, k: int) -> Groups | None:
    """Groups that may hold a neighbour; None if no look is faster, too many pass, or numbers are too great."""
    if may_overflow(queries, screen.length):
        return None
    most = _TOO_MANY * len(screen.rounded) * len(queries) + 16 * k * len(queries)
    few = len(queries) <= _FEW and 1 < queries.shape[1] < _WIDEST
    looks = [_in_bytes] if few and has_fast(torch.int8) and _bytes_are_exact() else []
    for look in [*looks, _in_bfloat16] if has_fast(torch.bfloat16) else looks:
        found = look(queries, screen, k)
        if len(found) <= most:
            return found
    return None


def _in_bytes(queries: Tensor, screen: Screen, k: int) -> Groups:
    """A look at bytes; scores are in units of their query."""
    small, unit, rounding = _bytes_of(queries)
    own = torch.where(unit > 0, unit, 1.0)
    error = _Error(length_above(small), rounding / own, torch.zeros_like(own), torch.float32)
    found = _candidates(small, screen.small, screen.small_rounding, screen.length, error, k, screen.unit)
    small.zero_()  # queries may be keys
    return found


def _in_bfloat16(queries: Tensor, screen: Screen, k: int) -> Groups:
    """A look at rounded keys."""
    look = queries.new_zeros(len(queries), queries.shape[1] + 1, dtype=torch.bfloat16)
    rounded = look[:, :-1].copy_(queries)
    sample = screen.rounded[:: max(1, len(screen.rounded) // 512)] @ look.T
    offset = sample.topk(min(k, len(sample)), 0).values[-1] if len(sample) else look.new_zeros(len(queries))
    lost = rounded.to(queries.dtype, copy=True).sub_(queries)
    error = _Error(length_above(rounded), length_above(lost), offset.abs().float(), torch.bfloat16)
    look[:, -1] = -offset
    found = _candidates(look, screen.rounded, screen.rounding, screen.length, error, k)
    look.zero_()  # queries may be keys
    return found


def plain(queries: Tensor, keys: Tensor, length: Tensor, k: int) -> Groups:
    """The same by a look at keys of some lengths, however many pass: in float32, or else in float64."""
    narrow = _float32_is_whole(keys.device) and not may_overflow(queries, length)
    dtype = torch.float32 if narrow else torch.float64
    wide = queries.to(dtype, copy=True)
    # Numbers that a product in float32 takes for 0; that others are rounded to it, the bound on a sum has room for.
    tiny = keys.shape[1] ** 0.5 * _TINY if narrow else 0.0
    lost, of_query = (torch.full((len(x),), tiny, device=keys.device) for x in (keys, queries))
    error = _Error(length_above(queries), of_query, torch.zeros_like(of_query), dtype)
    found = _candidates(wide, keys, lost, length, error, k)
    wide.zero_()  # queries may be keys
    return found


def _float32_is_whole(device: torch.device) -> bool:
    """Whether products in float32 are no coarser than that, which is a setting, and known for a CPU only."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and products.fp32_precision in ("none", "ieee")


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
        off.add_(4 * width * _TINY)
        return off.add_(scores.abs(), alpha=torch.finfo(self.dtype).eps)  # of the result


def _candidates(
    queries: Tensor,
    keys: Tensor,
    rounding: Tensor,
    length: Tensor,
    error: _Error,
    k: int,
    unit: Tensor | None = None,
) -> Groups:
    group = max(1, min(16, max(4, _GROUP // keys.shape[1]), len(keys) // (4 * k)))
    best = _best_of_groups(queries, keys, group, unit)
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
    """`(G, ...)` the greatest of each group of rows `(n, ...)`; see `Groups`."""
    count = -(-len(rows) // group)
    best = rows[:count].clone()
    for part in rows[count:].split(max(1, count)):
        torch.maximum(best[: len(part)], part, out=best[: len(part)])
    return best


def _best_of_groups(queries: Tensor, keys: Tensor, group: int, unit: Tensor | None = None) -> Tensor:
    """`(G, B)` best score of each group of rows, in float32 at least; some at a time, so that a cache holds them."""
    count = -(-len(keys) // group)
    step = max(1, _BLOCK // max(1, len(queries)))
    best = torch.empty(count, len(queries), dtype=torch.promote_types(queries.dtype, torch.float32), device=keys.device)
    for start in range(0, count, step):
        here = best[start : start + step]
        for first in range(start, len(keys), count):
            rows = slice(first, first + len(here))
            scores = _scores(queries, keys[rows], unit if unit is None else unit[rows])
            if first == start:
                found = scores
            else:  # the last rows may be fewer
                torch.maximum(found[: len(scores)], scores, out=found[: len(scores)])
        here[:] = found
    return best


def _scores(queries: Tensor, keys: Tensor, unit: Tensor | None) -> Tensor:
    """`(R, B)` of some rows, of bytes in units of the queries."""
    if unit is None:
        return product(keys, queries)
    # Sums of products of bytes are whole numbers, and exact.
    return torch._int_mm(queries, keys.T).T * unit[:, None]


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
    above: Tensor = found * (1 + 2.0**-10) + x.shape[1] ** 0.5 * _TINY
    return above

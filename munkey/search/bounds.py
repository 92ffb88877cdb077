"""A first look at all keys in low precision, which rules out rows that cannot be among the nearest.

A product in bfloat16 is several times faster than in float32 where the processor has it, and wrong by a known amount.
With rounded vectors `q'` and `k'` (Cauchy and Schwarz),

    |q k - q' k'| <= |q'| |k - k'| + |q - q'| |k|,

to which come the roundings of the sum and of its result. So a row whose upper bound lies below the lower bounds of `k`
other rows is no neighbour. Where all scores are near 1 the last rounding would be the greatest, so the product is taken
of `(q', -o)` and `(k', 1)`: near the offset `o` little is rounded. Of a group of rows only the best score is kept.

A few queries are no work for a processor, which waits for the keys. So they look at keys of one byte per number, in a
unit of each key's own. The same bound holds, is looser, and rows that pass are cheap to score again for a few.

A processor that has neither looks at the keys themselves, in float32; one query it compares with rounded keys all the
same, since it waits for them and not for the sums.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours, `G` groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from munkey.search.codes import TINY, Screen, bytes_of, length_above
from treediff.core.cpu import has_fast

__all__ = ["Groups", "Pairs", "may_overflow", "plain", "product", "screened"]

_BLOCK = 1 << 19  # scores at a time, which a processor's cache holds
_GROUP = 2048  # numbers of rows of which only the best score is kept, 4 to 16 rows
_GROUPS = 32  # groups of which one counts for the bound on the k-th best
_TOO_MANY = 0.01  # share of all pairs beyond which a look in full precision is cheaper than scoring them again
_ONE_TOO_MANY = 0.1  # the same for one query, whose look in full precision waits for the keys
_FEW = 16  # queries that look at bytes first
_WIDEST = 2**17  # key whose products of bytes, of up to 2 ** 14, a sum of 32 bits holds

Pairs = tuple[Tensor, Tensor]


@cache
def _bytes_are_exact() -> bool:
    """Whether PyTorch sums products of bytes exactly here; processors without an instruction for it may saturate."""
    most = torch.full((64, 256), 127, dtype=torch.int8)
    most[::2] = -127
    wide = most.double()
    return all(torch.equal(torch._int_mm(most[:n], most.T).double(), wide[:n] @ wide.T) for n in (1, _FEW))


@cache
def _one_sum_is_whole() -> bool:
    """Whether PyTorch sums products in bfloat16 with one query in float32 and rounds once, without instructions too."""
    whole = torch.arange(64 * 1037).mul_(7919).remainder_(31).sub_(15).view(64, 1037).bfloat16()
    query = torch.arange(1037).mul_(104_729).remainder_(31).sub_(15)[:, None].bfloat16()
    return torch.equal(whole @ query, (whole.double() @ query.double()).bfloat16())


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
    share = _ONE_TOO_MANY if len(queries) == 1 else _TOO_MANY
    most = share * len(screen.rounded) * len(queries) + 16 * k * len(queries)
    few = len(queries) <= _FEW and 1 < queries.shape[1] < _WIDEST
    looks = [_in_bytes] if few and has_fast(torch.int8) and _bytes_are_exact() else []
    # One query is a pass over the keys, which takes half as long where they are half as wide.
    if has_fast(torch.bfloat16) or (len(queries) == 1 and _one_sum_is_whole()):
        looks.append(_in_bfloat16)
    for look in looks:
        found = look(queries, screen, k)
        if len(found) <= most:
            return found
    return None


def _in_bytes(queries: Tensor, screen: Screen, k: int) -> Groups:
    """A look at bytes; scores are in units of their query."""
    small, unit, rounding = bytes_of(queries)
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
    tiny = keys.shape[1] ** 0.5 * TINY if narrow else 0.0
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

    def factors(self, width: int, rounding: Tensor, length: Tensor) -> Pairs:
        """`(G, 3)` and `(3, B)` whose product bounds the error, from the greatest roundings and lengths of groups."""
        # Of the sum: a rounding of each number, with room for more, and what is too small to be held at all.
        own = width * (2.0**-50 if self.dtype == torch.float64 else 2.0**-22)
        of_keys = torch.stack([rounding + own * (length + rounding), length, torch.ones_like(length)], 1)
        return of_keys, torch.stack([self.length, self.rounding, own * self.offset + 4 * width * TINY])

    def shift(self, scores: Tensor, of_keys: Tensor, of_queries: Tensor, sign: int) -> Tensor:
        """Add the bound to scores `(G, B)`, or take it away, in place."""
        if self.dtype == torch.bfloat16:  # a rounding of the result; in others there is room for it in that of the sum
            scores.add_(scores.abs(), alpha=sign * torch.finfo(self.dtype).eps)
        return scores.addmm_(of_keys.to(scores), of_queries.to(scores), alpha=sign)


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
    factors = error.factors(queries.shape[1], *(_greatest(column, group) for column in (rounding, length)))
    step = max(1, -(-len(best) // max(1, min(_GROUPS, len(best) // (4 * k)))))
    least = _kth_best(best, error, factors, step, k)
    found = [torch.zeros(2, 0, dtype=torch.int64, device=keys.device)]
    for start, upper in _shifted(best, error, factors, step, 1):
        # Not `>=`, so that what overflowed, and is no number, passes.
        found.append(torch.stack((upper < least).logical_not_().nonzero(as_tuple=True)))
        found[-1][0] += start
    place, query = torch.cat(found, 1)
    return Groups(place, query, group, len(keys))


def _kth_best(best: Tensor, error: _Error, factors: Pairs, step: int, k: int) -> Tensor:
    """`(B,)` a bound that at least `k` rows reach; of groups that are `step` apart one counts."""
    lower = best.new_full((min(step, len(best)), best.shape[1]), -torch.inf)
    for _, some in _shifted(best, error, factors, step, -1):
        some.nan_to_num_(-torch.inf, torch.inf, -torch.inf)  # what overflowed says nothing
        for part in some.split(step):
            torch.maximum(lower[: len(part)], part, out=lower[: len(part)])
    return lower.topk(k, 0).values[-1] if len(lower) >= k else lower.new_full((best.shape[1],), -torch.inf)


def _shifted(best: Tensor, error: _Error, factors: Pairs, step: int, sign: int) -> Iterator[tuple[int, Tensor]]:
    """Bounds of scores, whole steps at a time, in one piece of memory, so that a cache holds them."""
    size = step * max(1, _BLOCK // (step * max(1, best.shape[1])))
    room = best.new_empty(min(size, len(best)), best.shape[1])
    for start in range(0, len(best), size):
        scores, of_keys = (rows[start : start + size] for rows in (best, factors[0]))
        yield start, error.shift(room[: len(scores)].copy_(scores), of_keys, factors[1], sign)


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
    room = queries.new_empty(min(step, count), len(queries))
    for start in range(0, count, step):
        here = best[start : start + step]
        for first in range(start, len(keys), count):
            rows = slice(first, first + len(here))
            scores = _scores(queries, keys[rows], unit if unit is None else unit[rows], room)
            if first == start:
                here.copy_(scores)
            else:  # the last rows may be fewer
                torch.maximum(here[: len(scores)], scores, out=here[: len(scores)])
    return best


def _scores(queries: Tensor, keys: Tensor, unit: Tensor | None, room: Tensor) -> Tensor:
    """`(R, B)` of some rows, of bytes in units of the queries."""
    if unit is None:
        return product(keys, queries, room[: len(keys)])
    # Sums of products of bytes are whole numbers, and exact.
    return torch._int_mm(queries, keys.T).T * unit[:, None]


def product(keys: Tensor, queries: Tensor, out: Tensor | None = None) -> Tensor:
    """`(R, B)` dot products in the dtype of the queries."""
    if keys.dtype == queries.dtype:
        return torch.mm(keys, queries.T, out=out)
    wide = keys.to(queries.dtype)
    scores = torch.mm(wide, queries.T, out=out)
    wide.zero_()  # a copy of rows that may be forgotten later
    return scores

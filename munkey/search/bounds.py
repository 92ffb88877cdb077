"""First pass over all keys in low precision, which rules out rows that cannot be among the nearest.

A matmul in bfloat16 is several times faster than in float32 if the processor supports bfloat16, and its error has a
known bound. With rounded vectors `q'` and `k'` (Cauchy and Schwarz),

    |q k - q' k'| <= |q'| |k - k'| + |q - q'| |k|,

plus the rounding errors of the sum and of its result. So a row whose upper bound lies below the lower bounds of `k`
other rows is no neighbour. If all scores are near 1, the last rounding has the greatest error. So the dot product is
taken of `(q', -o)` and `(k', 1)`: near the offset `o` the rounding error is small. Only the best score of each group of
rows is kept.

With few queries the time goes into reading keys from memory. So few queries are compared with keys of one byte per
dimension, in a unit of each key. The same kind of bound holds and is looser, but the remaining rows are cheap to score
again for few queries.

Without support for either dtype, queries are compared with the keys themselves, in float32. A single query is compared
with rounded keys all the same, since the time goes into reading keys and not into sums.

Letters: `B` queries, `R` rows, `D` width of a key, `k` neighbours, `G` groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from munkey.search.screen import TINY, Screen, bytes_of, length_above
from treediff.core.cpu import has_fast

__all__ = ["Groups", "Pairs", "may_overflow", "plain", "product", "screened"]

_BLOCK = 1 << 19  # scores at a time, which fit into a processor's cache
_GROUP = 2048  # numbers in a group of 4 to 16 rows, of which only the best score is kept
_GROUPS = 32  # groups of which one counts for the bound on the k-th best score
_TOO_MANY = 0.01  # share of all pairs beyond which a pass in full precision is cheaper than scoring the pairs again
_ONE_TOO_MANY = 0.1  # share for one query, for which a pass in full precision has to wait for the keys
_FEW = 16  # number of queries up to which the first pass is over bytes
_WIDEST = 2**17  # width of a key up to which 32 bits hold the sum of products of bytes, each up to 2 ** 14

Pairs = tuple[Tensor, Tensor]


@cache
def _bytes_are_exact() -> bool:
    """Return whether PyTorch sums products of bytes exactly; processors without an instruction for it may saturate."""
    most = torch.full((64, 256), 127, dtype=torch.int8)
    most[::2] = -127
    wide = most.double()
    return all(torch.equal(torch._int_mm(most[:n], most.T).double(), wide[:n] @ wide.T) for n in (1, _FEW))


@cache
def _one_sum_is_whole() -> bool:
    """Return whether PyTorch sums bfloat16 products with one query in float32 and rounds once, on any processor."""
    whole = torch.arange(64 * 1037).mul_(7919).remainder_(31).sub_(15).view(64, 1037).bfloat16()
    query = torch.arange(1037).mul_(104_729).remainder_(31).sub_(15)[:, None].bfloat16()
    return torch.equal(whole @ query, (whole.double() @ query.double()).bfloat16())


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of rows that may hold a neighbour, each with its query.

    There are `G = ceil(R / size)` groups; the first has rows 0, G, 2 G and so on.

    Args:
        place: `(n,)` numbers of groups.
        query: `(n,)` the query of each group.
        size: number of rows of a group.
        count: number of all rows, `R`.
    """

    place: Tensor
    query: Tensor
    size: int
    count: int

    def __len__(self) -> int:
        """Return the number of pairs of a query and a row."""
        return len(self.place) * self.size

    def pairs(self) -> Pairs:
        """Return the pairs of a query and a row for all rows of all groups."""
        apart = -(-self.count // self.size)
        row = (self.place[:, None] + apart * torch.arange(self.size, device=self.place.device)).flatten()
        inside = row < self.count
        return self.query.repeat_interleave(self.size)[inside], row[inside]


def may_overflow(queries: Tensor, length: Tensor) -> bool:
    """Return whether a sum of products with keys of given lengths may leave the range of float32."""
    return bool(len(queries) and len(length) and not float(length_above(queries).amax() * length.amax()) < 2.0**126)


def screened(queries: Tensor, screen: Screen, k: int) -> Groups | None:
    """Return groups that may hold a neighbour; None if no pass is faster, too many remain, or numbers are too great."""
    if may_overflow(queries, screen.length):
        return None
    share = _ONE_TOO_MANY if len(queries) == 1 else _TOO_MANY
    most = share * len(screen.rounded) * len(queries) + 16 * k * len(queries)
    few = len(queries) <= _FEW and 1 < queries.shape[1] < _WIDEST
    looks = [_in_bytes] if few and has_fast(torch.int8) and _bytes_are_exact() else []
    # The time of one query goes into reading the keys, which takes half as long for keys of half the bytes.
    if has_fast(torch.bfloat16) or (len(queries) == 1 and _one_sum_is_whole()):
        looks.append(_in_bfloat16)
    for look in looks:
        found = look(queries, screen, k)
        if len(found) <= most:
            return found
    return None


def _in_bytes(queries: Tensor, screen: Screen, k: int) -> Groups:
    """Return the groups that remain after a pass over bytes; scores are in units of their query."""
    small, unit, rounding = bytes_of(queries)
    own = torch.where(unit > 0, unit, 1.0)
    error = _Error(length_above(small), rounding / own, torch.zeros_like(own), torch.float32)
    found = _candidates(small, screen.small, screen.small_rounding, screen.length, error, k, screen.unit)
    small.zero_()  # queries may be keys
    return found


def _in_bfloat16(queries: Tensor, screen: Screen, k: int) -> Groups:
    """Return the groups that remain after a pass over rounded keys."""
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
    """Return all groups that remain after a pass over keys of given lengths, in float32 or, if needed, in float64."""
    narrow = _float32_is_whole(keys.device) and not may_overflow(queries, length)
    dtype = torch.float32 if narrow else torch.float64
    wide = queries.to(dtype, copy=True)
    # Length of numbers that a matmul in float32 takes for 0. The bound on a sum covers results that are rounded to 0.
    tiny = keys.shape[1] ** 0.5 * TINY if narrow else 0.0
    lost, of_query = (torch.full((len(x),), tiny, device=keys.device) for x in (keys, queries))
    error = _Error(length_above(queries), of_query, torch.zeros_like(of_query), dtype)
    found = _candidates(wide, keys, lost, length, error, k)
    wide.zero_()  # queries may be keys
    return found


def _float32_is_whole(device: torch.device) -> bool:
    """Return whether matmuls in float32 are not computed in lower precision: a setting, known for a CPU only."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return device.type == "cpu" and products.fp32_precision in ("none", "ieee")


@dataclass(frozen=True, eq=False)
class _Error:
    """Terms that bound the error of a pass: lengths `(B,)` of queries and of their rounding errors, and offsets."""

    length: Tensor
    rounding: Tensor
    offset: Tensor
    dtype: torch.dtype

    def factors(self, width: int, rounding: Tensor, length: Tensor) -> Pairs:
        """Return `(G, 3)` and `(3, B)` whose matmul bounds the error, given the greatest terms of groups of keys."""
        # Error of the sum: one rounding of each number, with a margin, and numbers too small for the dtype.
        own = width * (2.0**-50 if self.dtype == torch.float64 else 2.0**-22)
        of_keys = torch.stack([rounding + own * (length + rounding), length, torch.ones_like(length)], 1)
        return of_keys, torch.stack([self.length, self.rounding, own * self.offset + 4 * width * TINY])

    def shift(self, scores: Tensor, of_keys: Tensor, of_queries: Tensor, sign: int) -> Tensor:
        """Add `sign` times the bound to scores `(G, B)`, in place."""
        if self.dtype == torch.bfloat16:  # rounding of the result, which the margin of the sum covers in other dtypes
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
        # Not `>=`, so that NaN after an overflow remains.
        found.append(torch.stack((upper < least).logical_not_().nonzero(as_tuple=True)))
        found[-1][0] += start
    place, query = torch.cat(found, 1)
    return Groups(place, query, group, len(keys))


def _kth_best(best: Tensor, error: _Error, factors: Pairs, step: int, k: int) -> Tensor:
    """Return a bound `(B,)` that at least `k` rows reach; of groups that are `step` apart, one counts."""
    lower = best.new_full((min(step, len(best)), best.shape[1]), -torch.inf)
    for _, some in _shifted(best, error, factors, step, -1):
        some.nan_to_num_(-torch.inf, torch.inf, -torch.inf)  # an overflow gives no bound
        for part in some.split(step):
            torch.maximum(lower[: len(part)], part, out=lower[: len(part)])
    return lower.topk(k, 0).values[-1] if len(lower) >= k else lower.new_full((best.shape[1],), -torch.inf)


def _shifted(best: Tensor, error: _Error, factors: Pairs, step: int, sign: int) -> Iterator[tuple[int, Tensor]]:
    """Yield bounds of scores, whole steps at a time, in reused memory that fits into a cache."""
    size = step * max(1, _BLOCK // (step * max(1, best.shape[1])))
    room = best.new_empty(min(size, len(best)), best.shape[1])
    for start in range(0, len(best), size):
        scores, of_keys = (rows[start : start + size] for rows in (best, factors[0]))
        yield start, error.shift(room[: len(scores)].copy_(scores), of_keys, factors[1], sign)


def _greatest(rows: Tensor, group: int) -> Tensor:
    """Return the greatest numbers `(G, ...)` of each group of rows `(n, ...)`; see `Groups`."""
    count = -(-len(rows) // group)
    best = rows[:count].clone()
    for part in rows[count:].split(max(1, count)):
        torch.maximum(best[: len(part)], part, out=best[: len(part)])
    return best


def _best_of_groups(queries: Tensor, keys: Tensor, group: int, unit: Tensor | None = None) -> Tensor:
    """Return the best score `(G, B)` of each group, at least in float32, from chunks that fit into a cache."""
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
    """Return the scores `(R, B)` of some rows, for bytes in units of the queries."""
    if unit is None:
        return product(keys, queries, room[: len(keys)])
    # Sums of products of bytes are integers, and exact.
    return torch._int_mm(queries, keys.T).T * unit[:, None]


def product(keys: Tensor, queries: Tensor, out: Tensor | None = None) -> Tensor:
    """Return dot products `(R, B)` in the dtype of the queries."""
    if keys.dtype == queries.dtype:
        return torch.mm(keys, queries.T, out=out)
    wide = keys.to(queries.dtype)
    scores = torch.mm(wide, queries.T, out=out)
    wide.zero_()  # a copy of rows that may be forgotten later
    return scores

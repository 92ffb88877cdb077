"""Scores of single pairs of a query and a row, which do not depend on the other pairs of a batch.

Letters: `B` queries, `R` rows, `D` width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pair_scores"]

_SCORED = 1 << 18  # numbers at a time, which fit into a cache


def pair_scores(
    queries: Tensor, keys: Tensor, query: Tensor, row: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return dot products `(n,)`, each summed in the same order in any batch."""
    size = max(2, _SCORED // max(1, keys.shape[1]))
    own = keys.new_empty(max(2, min(size, len(row))), keys.shape[1])
    wide = [own, torch.empty_like(own)] if dtype == own.dtype else [own.to(dtype) for _ in range(2)]
    scores = torch.empty(len(row), dtype=dtype, device=keys.device)
    for found, *pair in zip(scores.split(size), query.split(size), row.split(size), strict=True):
        if len(found) == 1:  # a single sum would be divided among threads
            pair = [numbers.expand(2) for numbers in pair]
        parts = [room[: len(pair[0])] for room in (own, *wide)]
        for source, numbers, part in zip((queries, keys), pair, parts[1:], strict=True):
            if dtype == own.dtype:
                torch.index_select(source, 0, numbers, out=part)
            else:
                part.copy_(torch.index_select(source, 0, numbers, out=parts[0]))
        found.copy_(parts[1].mul_(parts[2]).sum(1)[: len(found)])
    for room in (own, *wide):  # copies of rows that may be forgotten later
        room.zero_()
    return scores

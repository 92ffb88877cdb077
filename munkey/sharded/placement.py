"""Placement of rows on ranks: a function of the id alone, so that no table of places is needed.

Ids are hashed to numbers in [0, 1), and this interval is cut into one equal range for each rank. With another number of
ranks a range overlaps few other ranges, so that a rank reads few files when it loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from munkey.store.checks import some
from treediff.core.noise import counter_uniform

__all__ = ["check_place", "may_share", "owners"]


def owners(ids: Tensor, ranks: int) -> Tensor:
    """Return the rank of each id `(n,)`, `(n,)` int64, from 0 to `ranks - 1`.

    Examples:
        >>> owners(torch.arange(8), 2).unique().tolist()
        [0, 1]
    """
    return (counter_uniform(0, ids, dtype=torch.float64) * ranks).to(torch.int64)


def check_place(ids: Tensor, rank: int, ranks: int) -> None:
    """Raise ValueError if a row belongs to another rank.

    Examples:
        >>> check_place(torch.arange(8), 0, 1)
    """
    elsewhere = ids[owners(ids, ranks) != rank].tolist()
    if elsewhere:
        raise ValueError(
            f"ids {some(elsewhere)} do not belong to rank {rank} of {ranks}; spread them by ShardedKeyStore.of, or "
            "load what save wrote"
        )


def may_share(rank: int, ranks: int, other: int, others: int) -> bool:
    """Return whether an id of rank `rank` of `ranks` may belong to rank `other` of `others`.

    Examples:
        >>> [other for other in range(4) if may_share(1, 2, other, 4)]
        [2, 3]
    """
    return rank * others < (other + 1) * ranks and other * ranks < (rank + 1) * others

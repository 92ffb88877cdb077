"""Sums over the rows of all ranks; see `munkey.store.sums`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from munkey.sharded.ranks import Ranks
from munkey.store.erase import Scratch
from munkey.store.sums import RowSums, products

__all__ = ["SharedSums"]

T = TypeVar("T", bound=tuple[Tensor, ...])


class SharedSums:
    """The sum of the sums of all ranks, as exact as each of them; every call is made by all ranks.

    Args:
        local: sums of the rows of this rank.
        ranks: the ranks.
        described: function from row numbers to ids, keys and labels of rows on any rank.
    """

    def __init__(
        self, local: RowSums, ranks: Ranks, described: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        self.local, self.ranks, self._described = local, ranks, described

    def get(self) -> Tensor:
        """Return a copy of the sums `(Z, Z)` float64 of the rows of all ranks."""
        sums = self.local.get()
        if self.ranks.size > 1:
            dist.all_reduce(sums, group=self.ranks.group)
        return sums

    def derived(self, name: Hashable, make: Callable[[Tensor], T]) -> T:
        """Return the result of `make` for the sums, kept until rows change on any rank; see `RowSums.derived`."""
        return self.local.derived(name, lambda _: make(self.get()))

    def of(self, rows: Tensor) -> Tensor:
        """Return the sums `(Z, Z)` of some rows `(n,)`, which may be others on each rank."""
        _, keys, labels = self._described(rows)
        with Scratch() as scratch:
            return products(self.local.summand, scratch(keys), labels).dense()

"""What a store finds by similarity: rows that are nearest to a query, or to one another.

Letters: `B` queries or rows of a call, `D` width of a key, `k` neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from munkey.neighbour_table import NeighbourTable
from munkey.retrieval import Neighbours, at_least, nearest, pair_scores
from munkey.stored import StoredRows

if TYPE_CHECKING:
    from munkey.store import KeyStore

__all__ = ["Search", "SearchedRows", "exact"]


class Search(Protocol):
    """Anything that finds nearest rows of a store."""

    def __call__(self, store: KeyStore, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """The `k` nearest rows of each query `(B, D)`, without those of the owner `(B,)` that is not to be found."""


def exact(store: KeyStore, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
    """All rows are compared; see `munkey.retrieval`."""
    return store.nearest(queries, k, exclude_ids=exclude_ids)


class SearchedRows(StoredRows):
    """`StoredRows` that are found by their keys; arguments and errors as there."""

    def nearest(self, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """The rows with the greatest dot product, exactly; arguments and errors as for `munkey.retrieval.nearest`."""
        keys, ids, views = (column[: self.used] for column in (self.keys, self.ids, self.views))
        return nearest(queries, keys, ids, k, views=views, screen=self.screen, exclude_ids=exclude_ids)

    def nearest_to_rows(self, rows: Tensor, k: int, search: Search) -> tuple[Tensor, Tensor]:
        """Row numbers and scores `(B, k)` of what is nearest to rows `(B,)`, those of the same id left out.

        They are looked up once, and again where rows came or went since.
        """

        def find(asked: Tensor) -> Neighbours:
            queries = self.keys[asked]
            found = search(self, queries, k, exclude_ids=self.ids[asked])  # type: ignore[arg-type]
            queries.zero_()  # a copy of rows that may be forgotten later
            return found

        found = self._table(k).get(rows, self.used, find)
        scores = pair_scores(self.keys, self.keys, rows.repeat_interleave(k), found.clamp(min=0).flatten())
        return found, scores.view_as(found).masked_fill(found < 0, -torch.inf)

    def _table(self, k: int) -> NeighbourTable:
        tables = self.holders.tables
        for table in tables:
            if table.k == k:
                return table
        tables.append(NeighbourTable(k))
        return tables[-1]

    def at_least(self, queries: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs with a dot product of at least `threshold`: numbers of queries, ids, and float64 scores `(n,)`."""
        query, row, scores = at_least(queries, self.keys[: self.used], threshold)
        return query, self.ids[row], scores

    def described(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of ids `(B,)`, keys `(B, D)` and labels `(B,)` of rows."""
        return self.ids[rows], self.keys[rows], self.labels[rows]

"""Search with an index of faiss, for memories that are only read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from munkey.search.exact import Neighbours, Searchable
from munkey.store.change import Change, Removed, Replaced
from munkey.store.follower import Follower
from treediff.core.checks import check_positive

if TYPE_CHECKING:  # the store imports the exact search
    from munkey.store.store import KeyStore

__all__ = ["FaissSearch"]


class FaissSearch(Follower):
    """Search with a flat index of faiss, `KeyValueMemory(store, search=FaissSearch(store))`.

    The index holds a copy of all keys in memory that this library cannot overwrite. So the store refuses to forget
    until `close` drops the index. Scores are computed by faiss, in float32, and ties are broken by faiss. The index is
    made again after rows were added or moved.

    Args:
        store: store of the keys.

    Raises:
        ImportError: if faiss is missing.
    """

    def __init__(self, store: KeyStore) -> None:
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{error}; FaissSearch needs it: pip install faiss-cpu") from None
        self.store, self.closed = store, False
        self._index: Any = None
        self._changes = -1
        store.follow(self)

    def check(self, change: Change) -> None:
        """Raise ValueError if rows are to be removed or replaced."""
        if isinstance(change, Removed | Replaced):
            raise ValueError(
                "a FaissSearch holds copies of all keys and cannot erase them; close() it first, then forget"
            )

    def __call__(self, store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        """Return the `k` nearest rows of each query; arguments as for `munkey.search.exact.Search`.

        Raises:
            TypeError: if `k` is not an integer.
            ValueError: if `k` is below 1, the index is of another store, or the index was closed.
        """
        check_positive(k=k)
        if store is not self.store or self.closed:
            raise ValueError("this index is of another store, or was closed; make one with FaissSearch(store)")
        with store.lock:
            return self._search(store, queries, k, exclude_ids)

    def _search(self, store: Searchable, queries: Tensor, k: int, exclude_ids: Tensor | None) -> Neighbours:
        if self._changes != store.changes:
            self._changes = store.changes
            import faiss

            self._index = faiss.IndexFlatIP(store.keys.shape[1])
            self._index.add(store.keys[: store.used].float().numpy())
        spare = 0 if exclude_ids is None or not store.used else 1 + int(store.views[: store.used].max())
        scores, rows = (torch.from_numpy(found) for found in self._index.search(queries.float().numpy(), k + spare))
        ids = torch.where(rows >= 0, store.ids[rows.clamp(min=0)], -1) if store.used else rows
        kept = rows >= 0 if exclude_ids is None else (rows >= 0) & (ids != exclude_ids[:, None])
        order = (~kept).long().argsort(dim=1, stable=True)[:, :k]
        kept = kept.gather(1, order)
        ids, rows = (torch.where(kept, found.gather(1, order), -1) for found in (ids, rows))
        found = torch.where(kept, scores.double().gather(1, order), -torch.inf)
        return Neighbours(ids, rows, found, torch.full((len(queries),), store.used))

    def close(self) -> None:
        """Drop the index, so that the store can forget again; keys of the index stay in freed memory for a while."""
        self._index, self._changes, self.closed = None, -1, True
        self.store.unfollow(self)

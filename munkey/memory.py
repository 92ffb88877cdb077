"""Memory of keys and values: search for nearest keys, reading of their values, and a null token for missing rows.

Letters: `B` queries, `D` width of a key, `V` width of a value, `k` neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from munkey.readout.aggregate import Retrieved
from munkey.readout.writer import ValueWriter
from munkey.search import Neighbours, Search, exact
from munkey.sharded.store import ShardedKeyStore
from munkey.store.checks import ordered_ids
from munkey.store.receipts import Receipt
from munkey.store.schema import label_column, missing_label
from munkey.store.store import KeyStore

__all__ = ["KeyValueMemory", "Search"]


class KeyValueMemory(nn.Module):
    """A store of keys and values that is queried by similarity and read differentiably.

    Similarity is the cosine of the angle between query and key, or their dot product. For the cosine, keys are scaled
    to length 1 when they are stored. The search is exact, and its result does not depend on the order of rows.

    Args:
        store: keys and values.
        metric: 'cosine' or 'dot'.
        writer: if given, adds to each value a function of key and label; see `munkey.ValueWriter`.
        search: finds the nearest rows; exact if not given.

    Raises:
        ValueError: if there is no such metric.

    Examples:
        >>> memory = KeyValueMemory(KeyStore(key_width=3, value_width=2))
        >>> memory.remember([7, 8], torch.eye(3)[:2])
        >>> memory(torch.tensor([[0.1, 2.0, 0.0]]), 3).ids
        tensor([[ 8,  7, -1]])
    """

    def __init__(
        self,
        store: KeyStore | ShardedKeyStore,
        *,
        metric: str = "cosine",
        writer: ValueWriter | None = None,
        search: Search = exact,
    ) -> None:
        super().__init__()
        if metric not in ("cosine", "dot"):
            raise ValueError(f"metric must be 'cosine' or 'dot', found {metric!r}")
        self.store = cast("KeyStore", store)  # both stores have the same methods
        self.metric, self.writer, self.search = metric, writer, search
        self.null = nn.Parameter(torch.zeros(store.widths[1], device=store.values.device, dtype=store.values.dtype))

    def remember(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> None:
        """Store new instances; arguments and errors as for `KeyStore.add`.

        Raises:
            ValueError: also if a key has length 0, or a label does not fit the writer's task.
        """
        scaled = self._together(lambda: self._to_store(keys, labels))
        try:
            self.store.add(ids, scaled, labels, values, permanent=permanent)
        finally:
            if scaled is not keys:
                scaled.zero_()  # a copy of rows that may be forgotten later

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Erase instances; see `KeyStore.forget`."""
        return self.store.forget(ids, missing=missing)

    def _to_store(self, keys: Tensor, labels: Tensor | None) -> Tensor:
        if self.writer is not None:
            self.writer.check(labels, len(keys))
        return self.scaled(keys, "keys")

    def scaled(self, x: Tensor, name: str) -> Tensor:
        """Return keys or queries in the scale of the store.

        Raises:
            ValueError: if a row has length 0, which has no angle.
        """
        if self.metric == "dot" or not x.is_floating_point() or not x.isfinite().all():
            return x  # the store raises the error
        wide = x.to(torch.float64, copy=True)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        if not (length > 0).all():
            raise ValueError(f"{name} must have a length above 0, or there is no angle; use metric='dot'")
        unit = wide.div_(length).to(x.dtype, copy=True)
        wide.zero_()  # a copy of rows that may be forgotten later
        return unit

    def _together(self, act: Callable[[], Tensor]) -> Tensor:
        """Return the result of `act`; on a sharded store, an error of one rank is raised on all ranks."""
        return self.store.ranks.agree(act) if isinstance(self.store, ShardedKeyStore) else act()

    def shard(self, group: dist.ProcessGroup | None = None) -> None:
        """Spread the rows over the ranks of a group, all of which have them; see `munkey.ShardedKeyStore`.

        From then on every call is made by all ranks. Optimisers and averages are attached afterwards.

        Args:
            group: of `torch.distributed`; the default one if not given.

        Raises:
            ValueError: if the ranks do not have the same rows and settings, or the store has a file, a log or an index,
                or an optimiser or an average follows its values.
        """
        if isinstance(self.store, ShardedKeyStore):
            raise ValueError(
                "the memory is spread over ranks already; save it, and load it with another number of ranks"
            )
        self.store.check_replaceable()
        self.store = cast("KeyStore", ShardedKeyStore.of(self.store, group))

    # --- finding ------------------------------------------------------------------------------------------

    def neighbours(self, queries: Tensor, k: int, *, exclude_ids: Iterable[int] | Tensor | None = None) -> Neighbours:
        """Return the nearest rows of each query.

        Args:
            queries: `(B, D)`.
            k: number of rows for each query.
            exclude_ids: `(B,)` one id for each query, whose rows are excluded, such as its own id; an id that is not in
                the store excludes nothing.

        Raises:
            TypeError: if `k` is not whole.
            ValueError: if `k` is below 1, or queries or ids do not fit.
        """
        own = None if exclude_ids is None else torch.tensor(ordered_ids(exclude_ids), device=queries.device)
        if own is not None and len(own) != len(queries):
            raise ValueError(f"expected one id to exclude for each of {len(queries)} queries, found {len(own)}")
        scaled = self._together(lambda: self.scaled(queries, "queries"))
        return self.search(self.store, scaled, k, exclude_ids=own)

    def neighbours_of_rows(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return row numbers and scores `(B, k)` of the rows nearest to rows `(B,)`, without rows of the same id.

        Results are kept, and searched again where rows were added or removed since.
        """
        return self.store.nearest_to_rows(rows, k, self.search)

    def find_near_duplicates(
        self, ids: Iterable[int] | Tensor, threshold: float = 0.99
    ) -> dict[int, list[tuple[int, float]]]:
        """Find other instances that are similar enough to be retrieved in place of forgotten instances.

        Args:
            ids: instances to find duplicates of.
            threshold: least similarity.

        Returns:
            for each id with duplicates, the ids of these and their greatest similarity, the most similar first.

        Raises:
            KeyError: if an id is not in the memory.
        """
        rows = self.store.rows_of(ids)
        owners, queries, _ = self.store.described(rows)
        query, others, scores = self.store.at_least(queries, threshold)
        queries.zero_()  # a copy of rows that are likely to be forgotten
        best: dict[int, dict[int, float]] = {}
        for own, other, score in zip(owners[query].tolist(), others.tolist(), scores.tolist(), strict=True):
            if own != other:
                twins = best.setdefault(own, {})
                twins[other] = max(score, twins.get(other, score))
        return {own: sorted(twins.items(), key=lambda twin: (-twin[1], twin[0])) for own, twins in best.items()}

    # --- reading ------------------------------------------------------------------------------------------

    def labels(self, rows: Tensor) -> Tensor:
        """Return the labels `(..., *)` of rows `(...)`; -1 or NaN for row -1."""
        flat = rows.flatten()
        there = (flat >= 0).nonzero().squeeze(1)
        found = self.store.labels_of(flat[there])
        missing = missing_label(label_column(found.shape[1:], found.dtype))
        every = found.new_full((len(flat), *found.shape[1:]), missing)
        labels: Tensor = every.index_copy(0, there, found).unflatten(0, rows.shape)
        return labels

    def read(self, rows: Tensor, *, sparse: bool = False, frozen: bool = False) -> Tensor:
        """Return the values `(..., V)` of rows `(...)`; the null token for row -1.

        Args:
            rows: `(...)` int64 row numbers.
            sparse: see `KeyStore.read`.
            frozen: whether no gradient reaches the values of the store; the null token and the writer get theirs.
        """
        flat = rows.flatten()
        there = (flat >= 0).nonzero().squeeze(1)
        values = self.null.repeat(len(flat), 1)
        if len(there) or isinstance(self.store, ShardedKeyStore):  # all ranks read together
            found = self.store.read(flat[there], sparse=sparse)
            found = found.detach() if frozen else found
            if self.writer is not None:
                _, keys, labels = self.store.described(flat[there])
                found = found + self.writer(keys, labels)
            values = values.index_copy(0, there, found.to(values.dtype))
        read: Tensor = values.unflatten(0, rows.shape)
        return read

    def forward(
        self,
        queries: Tensor,
        k: int,
        *,
        exclude_ids: Iterable[int] | Tensor | None = None,
        sparse: bool = False,
    ) -> Retrieved:
        """Return the nearest rows of each query with their values; arguments and errors as for `neighbours`."""
        with self.store.lock:  # no row may move between search and reading
            found = self.neighbours(queries, k, exclude_ids=exclude_ids)
            return Retrieved(self.read(found.rows, sparse=sparse), found.scores, found.ids)

"""Rows that come to a store on several ranks, and travel to where they belong.

Letters: `B` instances of a call on this rank, `D` width of a key, `V` width of a value, `P` keys of an instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from munkey.checks import as_ids, some
from munkey.receipt_log import ReceiptLog
from munkey.rows import Removal
from munkey.sharded.packing import pack, unpack
from munkey.sharded.placement import owners
from munkey.sharded.ranks import Ranks, Route
from munkey.sharded.rows import ShardedRows
from munkey.store import KeyStore
from munkey.stored import not_there

__all__ = ["WritableRows"]


class WritableRows(ShardedRows):
    """`ShardedRows` to which rows come; see `ShardedKeyStore`.

    Args:
        local: the rows that belong to this rank.
        ranks: of the group.
    """

    def __init__(self, local: KeyStore, ranks: Ranks) -> None:
        super().__init__(local, ranks)
        self.log: ReceiptLog | None = None
        self.logged = False  # whether rank 0 keeps one

    def add(
        self,
        ids: Iterable[int] | Tensor,
        keys: Tensor,
        labels: Tensor | None = None,
        values: Tensor | None = None,
        *,
        permanent: bool = False,
    ) -> None:
        """Store new instances; see `KeyStore.add`. Each rank gives instances of its own, or none.

        Raises:
            ValueError: as for `KeyStore.add`, and if two ranks give the same id.
        """
        columns = self.ranks.agree(lambda: self.local.new_rows(as_ids(ids), keys, labels, values, permanent))
        route, own = self._sent(columns)
        self.ranks.agree(lambda: self._check_new(own, route, there=False))
        self._append(own)

    def _sent(self, columns: Sequence[Tensor]) -> tuple[Route, list[Tensor]]:
        """The rows that belong to this rank, of all that ranks give."""
        route = Route(self.ranks, owners(columns[0], self.ranks.size))
        packed = pack([column.to(like) for column, like in zip(columns, self.local.columns, strict=True)])
        own = unpack(route.there(packed), self.local.columns)
        packed.zero_()  # a copy of rows that may be forgotten later
        return route, own

    def _check_new(self, own: list[Tensor], route: Route, *, there: bool) -> None:
        ids = [part.unique() for part in own[0].split(route.take)]
        found, counts = torch.cat(ids).unique(return_counts=True)
        twice = found[counts > 1].tolist()
        if twice:
            raise ValueError(f"ids {some(twice)} come from two ranks; give each instance to one of them")
        known = [instance for instance in found.tolist() if (instance in self.local.index) != there]
        if known and there:
            raise not_there(known)
        if known:
            raise ValueError(f"ids {some(known)} are in the store already; use replace to change them")

    def _append(self, own: Sequence[Tensor]) -> None:
        """Write rows, and tell the log who is there again; if a rank cannot, nobody is."""
        local, rows = self.local, torch.zeros(0, dtype=torch.int64)

        def write() -> None:
            nonlocal rows
            rows = local.append(*own)

        try:
            self.ranks.agree(write)
            if self.logged:
                tokens = self._all_tokens(rows)
                self.ranks.agree(lambda: self.log.returned(tokens) if self.log else None)
        except Exception:
            local.erase(local.ids[rows].unique().tolist(), Removal.of(rows.tolist(), local.used, local.ids.device))
            local.forget_total()
            raise
        finally:
            for column in own:
                column.zero_()  # a copy of rows that may be forgotten later
        self._recount()

    def _all_tokens(self, rows: Tensor) -> list[str]:
        return [token for part in self.ranks.gather(self.local.tokens(rows)) for token in part]

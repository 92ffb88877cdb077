"""Index of a store: from ids to row numbers.

Letters: `M` rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Step
from munkey.store.erase import Scratch
from munkey.store.follower import Follower
from munkey.store.schema import COLUMNS
from munkey.store.table import Table

__all__ = ["Index"]


class Index(Follower):
    """The rows of each id, in the order of its views.

    Args:
        table: table of the rows, which the index follows.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._first: dict[int, int] = {}
        # Separate, because most instances have one row, and a list for each instance would double the memory.
        self._more: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, instance: object) -> bool:
        return instance in self._first

    def __iter__(self) -> Iterator[int]:
        return iter(self._first)

    def missing(self, ids: Iterable[int]) -> list[int]:
        """Return the ids that have no rows."""
        wanted = list(ids)
        unknown = set(wanted).difference(self._first)
        return [instance for instance in wanted if instance in unknown] if unknown else []

    def known(self, ids: Iterable[int]) -> list[int]:
        """Return the ids that have rows."""
        wanted = list(ids)
        known = set(wanted).intersection(self._first)
        return [instance for instance in wanted if instance in known] if known else []

    def of(self, instance: int) -> list[int]:
        """Return the rows of one id."""
        return [self._first[instance], *self._more.get(instance, ())]

    def of_all(self, ids: Iterable[int]) -> list[int]:
        """Return the rows of several ids, one id after another."""
        if not self._more:
            return list(map(self._first.__getitem__, ids))
        return [row for instance in ids for row in self.of(instance)]

    def one_of_each(self, ids: Iterable[int], uniform: Iterable[float]) -> list[int]:
        """Return one row of each id, chosen by uniform numbers in [0, 1)."""
        rows = []
        for instance, number in zip(ids, uniform, strict=True):
            more = self._more.get(instance)
            place = int(number * (1 + len(more))) if more else 0
            rows.append(more[place - 1] if more and place else self._first[instance])
        return rows

    # --- changes ------------------------------------------------------------------------------------------

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that update the index; all row numbers are read before anything moves."""
        table = self._table
        if isinstance(change, Added):
            first, more = _places(table["ids"][change.rows], table["views"][change.rows], change.start)
            return [partial(self._first.update, first), partial(self._more.update, more)]
        if isinstance(change, Removed):
            return self._removing(change)
        if isinstance(change, Moved) and change.order is None:
            return []
        if isinstance(change, Moved):
            ids, views = (table[name][change.order] for name in ("ids", "views"))
        else:
            found = dict(zip(COLUMNS, change.columns, strict=True))
            ids, views = found["ids"], found["views"]
        first, more = _places(ids, views, 0)

        def put() -> None:
            self._first, self._more = first, more

        return [put]

    def _removing(self, change: Removed) -> list[Step]:
        table = self._table
        ids, views = (table[name][change.movers].tolist() for name in ("ids", "views"))
        moved = list(zip(ids, views, change.holes.tolist(), strict=True))
        first = {instance: row for instance, view, row in moved if not view}
        more = [(self._more[instance], view - 1, row) for instance, view, row in moved if view]

        def remove() -> None:
            for instance in change.ids:
                self._first.pop(instance, None)
            if self._more:
                for instance in change.ids:
                    self._more.pop(instance, None)

        def move() -> None:
            self._first.update(first)
            for rows, place, row in more:
                rows[place] = row

        return [remove, move]


def _places(ids: Tensor, views: Tensor, start: int) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return the first row of each id, and the further rows of ids with several rows; rows count from `start`."""
    rows = range(start, start + len(ids))
    if not views.any():
        return dict(zip(ids.tolist(), rows, strict=True)), {}
    first: dict[int, int] = {}
    more: dict[int, list[int]] = {}
    for instance, view, row in sorted(zip(ids.tolist(), views.tolist(), rows, strict=True)):
        if view:
            more.setdefault(instance, []).append(row)
        else:
            first[instance] = row
    return first, more

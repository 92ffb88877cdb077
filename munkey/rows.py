"""Where each instance lives in a store: from ids to row numbers, and what has to move when rows go.

A store keeps its rows together at the front of its tensors. When rows are removed, the last rows move into the holes
and the freed tail is set to zero, so the work is proportional to what goes, not to what stays.

Letters: `M` rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Removal", "RowIndex"]


class RowIndex:
    """The rows of each id, the first view first.

    Args:
        ids: `(M,)` int64, the owner of each row.
        views: `(M,)` int64, 0 for an owner's first row, and so on.
    """

    def __init__(self, ids: Tensor, views: Tensor) -> None:
        self._first: dict[int, int] = {}
        # Apart, because most instances have one row, and a list for each would double the memory.
        self._more: dict[int, list[int]] = {}
        self.add(ids, views, 0)

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, instance: object) -> bool:
        return instance in self._first

    def __iter__(self) -> Iterator[int]:
        return iter(self._first)

    def missing(self, ids: Iterable[int]) -> list[int]:
        """Those of some ids that have no rows."""
        there = self._first
        return [instance for instance in ids if instance not in there]

    def of(self, instance: int) -> list[int]:
        """The rows of one id."""
        return [self._first[instance], *self._more.get(instance, ())]

    def of_all(self, ids: Iterable[int]) -> list[int]:
        """The rows of several ids, one id after the other."""
        if not self._more:
            return list(map(self._first.__getitem__, ids))
        return [row for instance in ids for row in self.of(instance)]

    def one_of_each(self, ids: Iterable[int], uniform: Iterable[float]) -> list[int]:
        """One row of each id; numbers in [0, 1) decide which."""
        rows = []
        for instance, number in zip(ids, uniform, strict=True):
            more = self._more.get(instance)
            place = int(number * (1 + len(more))) if more else 0
            rows.append(more[place - 1] if more and place else self._first[instance])
        return rows

    def add(self, ids: Tensor, views: Tensor, start: int) -> None:
        """Take in rows from number `start` on; those of one id in the order of its views."""
        rows = range(start, start + len(ids))
        if not views.any():
            self._first.update(zip(ids.tolist(), rows, strict=True))
            return
        for instance, view, row in sorted(zip(ids.tolist(), views.tolist(), rows, strict=True)):
            if view:
                self._more.setdefault(instance, []).append(row)
            else:
                self._first[instance] = row

    def remove(self, ids: Sequence[int]) -> None:
        """Forget ids."""
        for instance in ids:
            del self._first[instance]
        if self._more:
            for instance in ids:
                self._more.pop(instance, None)

    def move(self, ids: Tensor, views: Tensor, rows: Tensor) -> None:
        """Note where rows are now."""
        if not self._more:
            self._first.update(zip(ids.tolist(), rows.tolist(), strict=True))
            return
        for instance, view, row in zip(ids.tolist(), views.tolist(), rows.tolist(), strict=True):
            if view:
                self._more[instance][view - 1] = row
            else:
                self._first[instance] = row


@dataclass(frozen=True)
class Removal:
    """What happens to rows when some of the first `before` go.

    Args:
        before: number of rows until now.
        after: number of rows from then on.
        holes: `(n,)` rows below `after` that go.
        movers: `(n,)` rows from `after` on that stay, and move there.
        gone: all rows that go, in ascending order.
    """

    before: int
    after: int
    holes: Tensor
    movers: Tensor
    gone: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], before: int, device: torch.device | None = None) -> Removal:
        """The removal of rows, without repetition, from the first `before`."""
        gone = torch.tensor(rows, dtype=torch.int64).sort().values
        after = before - len(gone)
        split = int(torch.searchsorted(gone, after))
        stays = torch.ones(before - after, dtype=torch.bool)
        stays[gone[split:] - after] = False
        movers = after + stays.nonzero().squeeze(1)
        return cls(before, after, gone[:split].to(device), movers.to(device), gone.to(device))

    @torch.no_grad()
    def erase(self, rows: Tensor) -> None:
        """Overwrite what goes in a tensor of one row per instance, with what moves or with zero."""
        moving = rows[self.movers]
        rows[self.holes] = moving
        rows[self.after : self.before] = 0
        moving.zero_()  # a copy of rows that may be forgotten later

    def renumber(self, rows: Tensor) -> Tensor:
        """Where rows are afterwards; -1 for those that went."""
        moved = rows.clone()
        moved[torch.isin(rows, self.gone)] = -1
        if len(self.movers):
            place = torch.searchsorted(self.movers, rows).clamp_max(len(self.movers) - 1)
            found = self.movers[place] == rows
            moved[found] = self.holes[place[found]]
        return moved

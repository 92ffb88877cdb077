"""Sums over rows in whole numbers, which follow changes to the bit: a sum without a row is that of a table without it.

`S = sum_i z_i z_i'`, where `z_i` is a vector of whole numbers for row `i`. All products and partial sums are whole
numbers below 2^53, which float64 adds without rounding. So adding a row and subtracting it leaves the same bits, in any
order of rows, in any blocks, on any device. Least squares and linear discriminants are functions of such sums: a linear
head on frozen features forgets a row by one subtraction.

Letters: `M` rows, `D` width of a key, `Z` dimensions of a summand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Replaced, Step, long_lived
from munkey.store.erase import Scratch, wipe
from munkey.store.follower import Follower
from munkey.store.table import Table

__all__ = ["RowSums", "Summand", "products"]

_LIMIT = 2**53  # whole numbers up to here are exact in float64
_ROWS = 4096  # in one product
_FEW = 8  # rows that are added in place; more are multiplied first, which takes another matrix
T = TypeVar("T", bound=tuple[Tensor, ...])


class Summand(Protocol):
    """Interface of a function from rows to whole numbers; equal functions have the same hash."""

    @property
    def width(self) -> int:
        """Dimensions of a summand, `Z`."""

    @property
    def greatest(self) -> int:
        """The greatest absolute number of a summand."""

    def __call__(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return whole numbers `(M, Z)` as float64, for keys `(M, D)` and labels `(M, ...)`.

        Each row is a function of its own key and label, to the bit. The last number is 1, or the whole row is 0 if the
        row does not count, as without a label.

        Raises:
            ValueError: if a row has no summand.
        """


class RowSums(Follower):
    """Sums of a table, computed when they are first needed, and updated with every later change.

    Everything that was derived from the sums is overwritten with each change: it is a function of rows that may be
    gone.

    Args:
        table: table of the rows.
        summand: function from rows to whole numbers.
    """

    def __init__(self, table: Table, summand: Summand) -> None:
        self._table, self.summand = table, summand
        self._sums: Tensor | None = None
        self._derived: dict[Hashable, tuple[Tensor, ...]] = {}

    def clear(self) -> None:
        """Wipe and drop the sums, and everything derived from them."""
        self.forget_derived()
        if self._sums is not None:
            wipe(self._sums)
            self._sums = None

    def get(self) -> Tensor:
        """Return the sums `(Z, Z)` float64 of all rows; not a copy."""
        if self._sums is None:
            with long_lived():
                self._check_count(self._table.used)
                self._sums = self.of(slice(0, self._table.used))
        return self._sums

    def derived(self, name: Hashable, make: Callable[[Tensor], T]) -> T:
        """Return what `make` computes from the sums; kept under a name until rows change, and then overwritten."""
        if name not in self._derived:
            with long_lived():
                self._derived[name] = make(self.get())
        return self._derived[name]  # type: ignore[return-value]

    def of(self, rows: Tensor | slice) -> Tensor:
        """Return the sums `(Z, Z)` of some rows, a part that can be subtracted from the sums of all rows."""
        with Scratch() as scratch:
            keys, labels = self._table["keys"][rows], self._table["labels"][rows]
            return products(self.summand, keys if isinstance(rows, slice) else scratch(keys), labels)

    def forget_derived(self) -> None:
        """Overwrite and drop everything derived from the sums."""
        for tensors in self._derived.values():
            for tensor in tensors:
                wipe(tensor)
        self._derived.clear()

    # --- changes ------------------------------------------------------------------------------------------

    def check(self, change: Change) -> None:
        """Raise ValueError if sums of all rows would not be exact."""
        if isinstance(change, Added) and self._sums is not None:
            self._check_count(change.stop)

    def _check_count(self, rows: int) -> None:
        most = _LIMIT // self.summand.greatest**2
        if rows > most:
            raise ValueError(
                f"sums of whole numbers up to {self.summand.greatest} are exact for at most {most:,} rows, found "
                f"{rows:,}; use fewer bits"
            )

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that adds or subtracts rows, if the sums are known."""
        if isinstance(change, Replaced):
            return [self.clear]
        if self._sums is None or isinstance(change, Moved):
            return []
        rows = change.rows if isinstance(change, Added) else change.gone
        keys, labels = self._table["keys"][rows], self._table["labels"][rows]
        if isinstance(change, Removed):
            scratch(keys)
        z = scratch(self.summand(keys, labels))
        return [self.forget_derived, *self._step(z, 1 if isinstance(change, Added) else -1, scratch)]

    def _step(self, z: Tensor, sign: int, scratch: Scratch) -> list[Step]:
        """Return the step that adds `sign` times `z'z` in place, once, however often the step is run.

        The last diagonal number counts the rows, and changes in the same call as all others: it tells whether the step
        was run.
        """
        sums: Tensor = self._sums  # type: ignore[assignment]
        before, count = float(sums[-1, -1]), float(z[:, -1].sum())
        if not count:
            return []
        part = scratch(z.T @ z) if len(z) > _FEW else None

        def add() -> None:
            if float(sums[-1, -1]) != before:
                return
            if part is not None:
                sums.add_(part, alpha=sign)
            elif len(z) == 1:  # twice as fast as a product
                sums.addr_(z[0], z[0], alpha=sign)
            else:
                sums.addmm_(z.T, z, alpha=sign)

        return [add]


def products(summand: Summand, keys: Tensor, labels: Tensor) -> Tensor:
    """Return `sum z z'` of rows, `(Z, Z)`, in blocks, whose copies are wiped."""
    total = torch.zeros(summand.width, summand.width, dtype=torch.float64, device=keys.device)
    for start in range(0, len(keys), _ROWS):
        part = slice(start, start + _ROWS)
        with Scratch() as scratch:
            z = scratch(summand(keys[part], labels[part]))
            total.addmm_(z.T, z)
    return total

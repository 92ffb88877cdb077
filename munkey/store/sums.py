"""Sums over rows in whole numbers, which follow changes to the bit: a sum without a row is that of a table without it.

`S = sum_i z_i z_i'`, whose upper half is kept, where `z_i` is a vector of whole numbers for row `i`. All products and
partial sums are whole numbers below 2^53, which float64 adds without rounding. So adding a row and subtracting it
leaves the same bits, in any order of rows, in any blocks, on any device. Least squares and linear discriminants are
functions of such sums: a linear head on frozen features forgets a row by one subtraction.

Letters: `M` rows, `D` width of a key, `Z` dimensions of a summand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Replaced, Step, long_lived
from munkey.store.erase import Scratch, wipe
from munkey.store.follower import Follower
from munkey.store.table import Table

__all__ = ["RowSums", "Summand", "products"]

_LIMIT = 2**53  # whole numbers up to here are exact in float64
_ROWS = 4096  # in one product
_FEW = 8  # rows that are added in place; more are multiplied first, which takes another matrix
_BANDS = 4  # of the upper half; more would be smaller, but need more calls
_HEIGHT = 256  # of a band at least
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


class Bands:
    """The upper half of `sum_i z_i z_i'` in horizontal bands, `Z` numbers wide at the top and a few at the bottom.

    A band begins with a row and a column of `sum_i z_i`. So its first number counts the rows that were added, and
    changes in the same call as all others.

    Args:
        width: `Z`.
        device: of the sums.
    """

    def __init__(self, width: int, device: torch.device | str | None = None) -> None:
        self.width, self.height = width, max(_HEIGHT, -(-width // _BANDS))
        places: list[int] = []  # of summands with the last number, 1, before each band
        for start in range(0, width, self.height):
            places += [width - 1, *range(start, min(start + self.height, width))]
        self._places = torch.tensor(places, device=device)
        self._starts = range(0, len(places), 1 + self.height)
        shapes = [(min(1 + self.height, len(places) - start), len(places) - start) for start in self._starts]
        self.parts = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def spread(self, z: Tensor) -> Tensor:
        """Return a copy of summands `(m, Z)` with a 1 before each band, or 0 in a row that does not count."""
        return z.index_select(1, self._places)

    def factors(self, spread: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each band with its left and right factor for summands of `spread`."""
        for start, part in zip(self._starts, self.parts, strict=True):
            yield part, spread[:, start : start + len(part)], spread[:, start:]

    def add(self, z: Tensor) -> None:
        """Add summands `(m, Z)`."""
        with Scratch() as scratch:
            for part, left, right in self.factors(scratch(self.spread(z))):
                part.addmm_(left.T, right)

    def dense(self) -> Tensor:
        """Return a new matrix, `(Z, Z)`."""
        whole, height = self.parts[0].new_empty(self.width, self.width), self.height
        for band, part in enumerate(self.parts):
            rows = slice(band * height, band * height + len(part) - 1)
            for place in range(len(self.parts) - band):
                first = 1 + place * (1 + height)
                block = part[1:, first : first + height]
                columns = slice((band + place) * height, (band + place) * height + block.shape[1])
                whole[rows, columns], whole[columns, rows] = block, block.T
        return whole

    def wipe(self) -> None:
        """Overwrite the sums."""
        for part in self.parts:
            wipe(part)


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
        self._sums: Bands | None = None
        self._derived: dict[Hashable, tuple[Tensor, ...]] = {}

    def clear(self) -> None:
        """Wipe and drop the sums, and everything derived from them."""
        self.forget_derived()
        if self._sums is not None:
            self._sums.wipe()
            self._sums = None

    def get(self) -> Tensor:
        """Return the sums `(Z, Z)` float64 of all rows, a copy."""
        if self._sums is None:
            with long_lived():
                self._check_count(self._table.used)
                keys, labels = (self._table[name][: self._table.used] for name in ("keys", "labels"))
                self._sums = products(self.summand, keys, labels)
        return self._sums.dense()

    def derived(self, name: Hashable, make: Callable[[Tensor], T]) -> T:
        """Return what `make` computes from the sums; kept under a name until rows change, and then overwritten."""
        if name not in self._derived:
            with long_lived():
                self._derived[name] = make(self.get())
        return self._derived[name]  # type: ignore[return-value]

    def of(self, rows: Tensor) -> Tensor:
        """Return the sums `(Z, Z)` of some rows, a part that can be subtracted from the sums of all rows."""
        with Scratch() as scratch:
            keys, labels = self._table["keys"][rows], self._table["labels"][rows]
            return products(self.summand, scratch(keys), labels).dense()

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
        keys, labels = self._table["keys"], self._table["labels"]
        if isinstance(change, Added):
            keys, labels = keys[change.rows], labels[change.rows]
        else:
            keys, labels = scratch(keys.index_select(0, change.gone)), labels.index_select(0, change.gone)
        z = scratch(self.summand(keys, labels))
        return [self.forget_derived, *self._steps(z, 1 if isinstance(change, Added) else -1, scratch)]

    def _steps(self, z: Tensor, sign: int, scratch: Scratch) -> list[Step]:
        """Return the steps that add `sign` times `z'z` to each band in place, once, however often a step is run."""
        bands: Bands = self._sums  # type: ignore[assignment]
        spread = scratch(bands.spread(z))
        if not bool(spread[:, 0].any()):
            return []
        return [_adding(*factors, sign, scratch) for factors in bands.factors(spread)]


def _adding(part: Tensor, left: Tensor, right: Tensor, sign: int, scratch: Scratch) -> Step:
    """Return the step for one band, whose count of rows tells whether the step was run."""
    count = part[0, 0]  # a view
    before = float(count)
    product = scratch(left.T @ right) if len(left) > _FEW else None

    def add() -> None:
        if float(count) != before:
            return
        if product is None:
            part.addmm_(left.T, right, alpha=sign)
        else:
            part.add_(product, alpha=sign)

    return add


def products(summand: Summand, keys: Tensor, labels: Tensor) -> Bands:
    """Return `sum z z'` of rows, in blocks, whose copies are wiped."""
    total = Bands(summand.width, keys.device)
    for start in range(0, len(keys), _ROWS):
        part = slice(start, start + _ROWS)
        with Scratch() as scratch:
            total.add(scratch(summand(keys[part], labels[part])))
    return total

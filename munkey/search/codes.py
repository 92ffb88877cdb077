"""Keys in low precision beside keys: what a first look at all of them reads; see `munkey.search.bounds`.

Letters: `R` rows, `D` width of a key.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["TINY", "Screen", "bytes_of", "length_above"]

_ROWS = 4096  # at a time, in float64
#: The least number in float32 that products in low precision do not take for 0.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Screen:
    """Keys as the first look sees them, and what is needed to bound its error; each row of its own key alone.

    Args:
        rounded: `(R, D + 1)` bfloat16, the rounded keys with a one behind.
        rounding: `(R,)` float32, at least the length of what rounding took from each key.
        length: `(R,)` float32, at least the length of each key.
        small: `(R, D)` int8, the keys in units of their own.
        unit: `(R,)` float32, that unit, a 127th of the largest number, or 0.
        small_rounding: `(R,)` float32, at least the length of what was lost there.
    """

    rounded: Tensor
    rounding: Tensor
    length: Tensor
    small: Tensor
    unit: Tensor
    small_rounding: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Screen:
        """The screen of some keys."""
        count, width = keys.shape
        rounding, length, unit, small_rounding = torch.empty(4, count, dtype=torch.float32, device=keys.device)
        rounded = keys.new_empty(count, width + 1, dtype=torch.bfloat16)
        small = keys.new_empty(count, width, dtype=torch.int8)
        screen = cls(rounded, rounding, length, small, unit, small_rounding)
        screen.write(keys)
        return screen

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All of it."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def write(self, keys: Tensor) -> None:
        """Be the screen of some keys, as many as there are rows."""
        self.rounded[:, -1] = 1
        self.length.copy_(length_above(keys))
        for start in range(0, len(keys), _ROWS):
            rows, part = slice(start, start + _ROWS), keys[start : start + _ROWS]
            self.rounded[rows, :-1] = part
            lost = self.rounded[rows, :-1].to(keys.dtype, copy=True).sub_(part)
            self.rounding[rows] = length_above(lost)
            for column, new in zip((self.small, self.unit, self.small_rounding), bytes_of(part), strict=True):
                column[rows] = new
                new.zero_()  # made of rows that may be forgotten later
            lost.zero_()


def bytes_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `(n, D)` in bytes, their units, and at least the lengths of what was lost."""
    wide = x.to(torch.float64, copy=True)
    unit = (wide.abs().amax(1) / 127).to(torch.float32)
    unit.masked_fill_(unit < TINY, 0.0)  # which some processors take for 0
    steps = torch.where(unit > 0, unit, torch.inf).double()[:, None]
    small = torch.empty(x.shape, dtype=torch.int8, device=x.device)  # laid out as products need it
    held = (wide / steps).round_().clamp_(-127, 127)
    small.copy_(held)
    rounding = length_above(wide.sub_(held.mul_(unit.double()[:, None])))
    for copy in (wide, held):  # of rows that may be forgotten later
        copy.zero_()
    return small, unit, rounding


def length_above(x: Tensor) -> Tensor:
    """`(n,)` float32 numbers a little above the lengths of rows `(n, D)`."""
    found = torch.empty(len(x), device=x.device)
    for part, lengths in zip(x.split(_ROWS), found.split(_ROWS), strict=True):
        wide = part.to(torch.float64, copy=True)  # whose squares are neither too great nor too small
        lengths.copy_(torch.linalg.vector_norm(wide, dim=1))
        wide.zero_()  # a copy of rows that may be forgotten later
    # Room for what is rounded, and for numbers that products in low precision take for 0.
    above: Tensor = found * (1 + 2.0**-10) + x.shape[1] ** 0.5 * TINY
    return above

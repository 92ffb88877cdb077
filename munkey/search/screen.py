"""Keys in low precision beside the keys, for the first pass over all keys; see `munkey.search.bounds`.

Letters: `R` rows, `D` width of a key.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from treediff.core.modes import lasting
from treediff.core.threads import in_threads

__all__ = ["TINY", "Screen", "bytes_of", "length_above"]

_ROWS = 4096  # at a time, in float64
_NUMBERS = 1 << 15  # at a time for one thread; several times as many fit into a cache
_WIDTH = 2**13  # width up to which the margin covers the error of sums of squares in float32, in any order
_DIVIDED = 2.0**-16  # greatest error of a quotient of up to 127
_VANISHED = 2.0**-62  # greatest number whose square may vanish in float32
#: The least number in float32 that matmuls in low precision do not take for 0.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Screen:
    """Keys in the precision of the first pass, with terms that bound its error; each row depends on its key alone.

    Args:
        rounded: `(R, D + 1)` bfloat16, the rounded keys, each followed by a one.
        rounding: `(R,)` float32, at least the length of the rounding error of each key.
        length: `(R,)` float32, at least the length of each key.
        small: `(R, D)` int8, the keys, each in its own unit.
        unit: `(R,)` float32, the unit of each key, a 127th of its largest number, or 0.
        small_rounding: `(R,)` float32, at least the length of the rounding error in `small`.
    """

    rounded: Tensor
    rounding: Tensor
    length: Tensor
    small: Tensor
    unit: Tensor
    small_rounding: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> Screen:
        """Return the screen of keys."""
        count, width = keys.shape
        with lasting():  # threads do not inherit inference mode
            rounding, length, unit, small_rounding = torch.empty(4, count, dtype=torch.float32, device=keys.device)
            rounded = keys.new_empty(count, width + 1, dtype=torch.bfloat16)
            small = keys.new_empty(count, width, dtype=torch.int8)
        screen = cls(rounded, rounding, length, small, unit, small_rounding)
        screen.write(keys)
        return screen

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All columns of the screen."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def write(self, keys: Tensor) -> None:
        """Write the screen of keys, as many keys as the screen has rows."""
        count, width = keys.shape
        self.rounded[:, -1] = 1
        size = max(1, _NUMBERS // max(1, width)) if keys.device.type == "cpu" else max(1, count)
        # Sums of more numbers than this are too coarse in float32.
        dtype = torch.promote_types(keys.dtype, torch.float32 if width <= _WIDTH else torch.float64)

        def write(start: int) -> None:
            part = keys[start : start + size]
            screen = Screen(*(column[start : start + size] for column in self.columns))
            room = torch.empty(2, *part.shape, dtype=dtype, device=keys.device)
            screen._write_some(part, *room)
            room.zero_()  # copies of rows that may be forgotten later

        in_threads(write, range(0, count, size))

    def _write_some(self, keys: Tensor, scaled: Tensor, lost: Tensor) -> None:
        """Write the screen of few keys, with two buffers of the shape of the keys.

        Lengths are computed in the unit of each key, so that no square overflows; a key is at least 127 units long.
        """
        unit = torch.maximum(keys.amax(1), -keys.amin(1)).float() / 127
        unit.masked_fill_(unit < TINY, 0.0)  # some processors take such units for 0
        steps = torch.where(unit > 0, unit, torch.inf)[:, None]
        torch.div(keys, steps, out=scaled)
        # Beyond the range of float32 there is no length, and no matmul in low precision.
        self.length.copy_(_in_units(scaled, unit, 0.0).masked_fill_(unit.isinf(), torch.inf))
        self.small.copy_(torch.round(scaled, out=lost))
        self.small_rounding.copy_(_in_units(scaled.sub_(lost), unit, _DIVIDED))
        self.rounded[:, :-1] = keys
        lost.copy_(self.rounded[:, :-1]).sub_(keys).div_(steps)
        self.rounding.copy_(_in_units(lost, unit, _VANISHED))
        self.unit.copy_(unit)


def _in_units(x: Tensor, unit: Tensor, room: float) -> Tensor:
    """Return float32 upper bounds `(n,)` on the lengths of rows `(n, D)` in units, each number off by up to `room`."""
    side: float = x.shape[1] ** 0.5
    found = (torch.linalg.vector_norm(x, dim=1) * (1 + 2.0**-10) + side * room) * unit
    # Numbers of a row without a unit are below 127 times `TINY`, and as much may be lost.
    above: Tensor = found.float() + torch.where(unit > 0, 1.0, 128.0) * (side * TINY)
    return above


def bytes_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows `(n, D)` in bytes, their units, and upper bounds on the lengths of their rounding errors."""
    screen = Screen.of(x)
    screen.rounded.zero_()  # a copy of queries, which may be keys
    return screen.small, screen.unit, screen.small_rounding


def length_above(x: Tensor) -> Tensor:
    """Return float32 numbers `(n,)` slightly above the lengths of rows `(n, D)`."""
    found = torch.empty(len(x), device=x.device)
    for part, lengths in zip(x.split(_ROWS), found.split(_ROWS), strict=True):
        wide = part.to(torch.float64, copy=True)  # squares in float64 neither overflow nor vanish
        lengths.copy_(torch.linalg.vector_norm(wide, dim=1))
        wide.zero_()  # a copy of rows that may be forgotten later
    # Margin for rounding, and for numbers that matmuls in low precision take for 0.
    above: Tensor = found * (1 + 2.0**-10) + x.shape[1] ** 0.5 * TINY
    return above

"""A note about a change of a file that is under way, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from munkey.store.digest import MODULUS, checksum
from munkey.store.file.disk import Disk
from munkey.store.file.layout import BLOCK, State

__all__ = ["Note", "clear", "read_note", "write_note"]


@dataclass(frozen=True)
class Note:
    """A change: its rows by number, and nothing of what is in them.

    Args:
        change: 'append' or 'erase'.
        before: state until now.
        after: state from then on, but for places that are still to be overwritten.
        holes: rows that go, and that `movers` take the places of.
        movers: rows that move.
    """

    change: str
    before: State
    after: State
    holes: Sequence[int] = ()
    movers: Sequence[int] = ()

    def fits(self, room: int) -> bool:
        """Return whether this can be the note of a change of a file with room for so many rows."""
        numbers = [n for state in (self.before, self.after) for n in (state.count, state.total, state.tail)]
        if not all(type(n) is int and 0 <= n < MODULUS for n in (*numbers, *self.holes, *self.movers)):
            return False
        before, after = self.before.count, self.after.count
        if max(before, after, self.before.tail, self.after.tail) > room:
            return False
        if self.change == "append":
            return before <= after and not self.holes and not self.movers
        places = len(self.holes) == len(self.movers) and all(
            _ascending([first - 1, *rows, stop])
            for first, rows, stop in ((0, self.holes, after), (after, self.movers, before))
        )
        return self.change == "erase" and after < before and places

    def to_json(self) -> bytes:
        """Return a line of JSON."""
        states = {"before": vars(self.before), "after": vars(self.after)}
        return json.dumps({**vars(self), **states}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Return what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        states = {name: State(**fields[name]) for name in ("before", "after")}
        rows = {name: list(fields[name]) for name in ("holes", "movers")}
        return cls(**{**fields, **states, **rows})


def _ascending(numbers: Sequence[int]) -> bool:
    return all(one < other for one, other in pairwise(numbers))


def write_note(disk: Disk, file: int, place: int, note: Note) -> None:
    """Write a note behind the records, over the last one, and wait until it is on the medium."""
    text = note.to_json()
    length = len(text).to_bytes(8, "little")
    data = length + checksum(length + text) + text
    # Whole blocks, so that the file seldom gets another size, which a disk would have to write down, too.
    disk.write(file, place, data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))
    disk.sync(file)


def read_note(disk: Disk, file: int, place: int) -> Note | None:
    """Return the note behind the records; None if there is none, or not all of it was written."""
    left = disk.size(file) - place
    head = disk.read(file, place, 40)
    length = int.from_bytes(head[:8], "little")
    if len(head) < 40 or length > left - 40:
        return None
    text = disk.read(file, place + 40, length)
    return Note.from_json(text) if checksum(head[:8] + text) == head[8:] else None


def clear(disk: Disk, file: int, place: int) -> None:
    """Cut off what is behind the records."""
    if disk.size(file) > place:
        disk.resize(file, place)

"""Note about a change of a file that is under way; the note is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from munkey.store.digest import MODULUS, checksum
from munkey.store.file.disk import Disk
from munkey.store.file.layout import BLOCK, State

__all__ = ["Note", "clear", "note_bytes", "read_note", "write_note"]

_SUM = 32  # bytes of a checksum


@dataclass(frozen=True)
class Note:
    """A change of a file: the numbers of its rows, and nothing of their content.

    Args:
        change: 'append' or 'erase'.
        before: state before the change.
        after: state after the change, except for places that are still to be overwritten.
        holes: removed rows whose places `movers` take.
        movers: rows that move.
    """

    change: str
    before: State
    after: State
    holes: Sequence[int] = ()
    movers: Sequence[int] = ()

    def fits(self, room: int) -> bool:
        """Return whether the note fits a file with room for `room` rows."""
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
        """Return the note that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        states = {name: State(**fields[name]) for name in ("before", "after")}
        rows = {name: list(fields[name]) for name in ("holes", "movers")}
        return cls(**{**fields, **states, **rows})


def _ascending(numbers: Sequence[int]) -> bool:
    return all(one < other for one, other in pairwise(numbers))


def write_note(disk: Disk, file: int, place: int, note: Note) -> None:
    """Write a note behind the records, over the last note, and wait until it is on the medium.

    A note is its length (8 bytes), its text, zeros, and a checksum (32 bytes), in whole blocks. So the size of the file
    seldom changes, which would need a further write to the disk.
    """
    disk.write(file, place, note_bytes(note.to_json()))
    disk.sync(file)


def note_bytes(text: bytes) -> bytes:
    """Return the bytes of a note with a text."""
    data = len(text).to_bytes(8, "little") + text
    return data.ljust(_size(len(text)) - _SUM, b"\0") + checksum(data)


def read_note(disk: Disk, file: int, place: int) -> Note | None:
    """Return the note behind the records; None if there is no note, or only a part was written."""
    length = int.from_bytes(disk.read(file, place, 8), "little")
    if not length or place + _size(length) > disk.size(file):
        return None
    data = disk.read(file, place, _size(length))
    return Note.from_json(data[8 : 8 + length]) if checksum(data[: 8 + length]) == data[-_SUM:] else None


def _size(length: int) -> int:
    """Return the size in bytes of a note with a text of some length."""
    return -(-(8 + length + _SUM) // BLOCK) * BLOCK


def clear(disk: Disk, file: int, place: int) -> None:
    """Cut off everything behind the records."""
    if disk.size(file) > place:
        disk.resize(file, place)

"""A file of notes about a change that is under way, each whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from munkey.digest import checksum
from munkey.disk import Disk

__all__ = ["Journal"]


class Journal:
    """Notes in plain JSON, a line each, with a checksum that shows a line whose writing was interrupted.

    Args:
        path: of the file; it is made if it is not there.
        disk: what reads and writes.

    Attributes:
        broken: whether it may hold a part of a note.

    Raises:
        OSError: if it cannot be opened or made.
    """

    def __init__(self, path: str, disk: Disk) -> None:
        self.disk, self.broken = disk, False
        there = disk.exists(path)
        self._file = disk.open(path, create=not there)
        try:
            if not there:
                disk.sync_folder(path)  # or the power could take the journal, and leave what it announced
        except BaseException:
            self.close()
            raise

    def write(self, note: Mapping[str, Any]) -> None:
        """Add a note, and wait until it is on the medium.

        Raises:
            OSError: if it cannot be written; unless `broken`, the journal is then as before.
        """
        start = self.disk.size(self._file)
        text = json.dumps(note).encode()
        self.broken = True
        try:
            self.disk.write(self._file, start, text + b" " + checksum(text) + b"\n")
            self.disk.sync(self._file)
        except OSError:
            self.disk.resize(self._file, start)
            self.broken = False
            raise
        self.broken = False

    def notes(self) -> list[dict[str, Any]]:
        """What it says, once a line that was interrupted while it was written is cut off."""
        notes, whole = [], 0
        for line in self.disk.read(self._file, 0, self.disk.size(self._file)).splitlines(keepends=True):
            text, _, found = line.removesuffix(b"\n").rpartition(b" ")
            if not line.endswith(b"\n") or checksum(text) != found:
                break
            notes.append(json.loads(text))
            whole += len(line)
        self.disk.resize(self._file, whole)
        return notes

    def clear(self) -> None:
        """Empty it, and wait until it is empty on the medium."""
        self.disk.resize(self._file, 0)
        self.disk.sync(self._file)

    def close(self) -> None:
        """Give the file back."""
        if self._file >= 0:
            self.disk.close(self._file)
            self._file = -1

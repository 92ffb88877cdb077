"""Checkpoints of a run with a memory: one more place where instances are, until the run has finished.

A checkpoint of a `KeyMemoryTransformer` holds keys, values and their moments. `forget` does not reach it. So what it
takes the place of is overwritten, and so is the last one when the run has finished.
"""

from __future__ import annotations

import os

from munkey.store.file.disk import Disk, wipe, wipe_leftovers, write_whole
from treediff.core.checkpoint import CheckpointFiles

__all__ = ["WipedCheckpoints"]


class WipedCheckpoints(CheckpointFiles):
    """Checkpoints that are overwritten before they go; for `treediff.core.long_run.LongRun(..., files=WipedCheckpoints())`.

    An interrupted run leaves its checkpoint: go on with it, or let `remove` take it away. Rows are saved by id and
    view, moments of an optimiser as they are: call `model.memory.store.compact()` whenever rows came or went, so that
    they are in the same order.

    Args:
        disk: what reads and writes.

    Examples:
        >>> import tempfile
        >>> files, path = WipedCheckpoints(), tempfile.mkdtemp() + "/checkpoint.safetensors"
        >>> files.write(path, b"rows of instances")
        >>> files.remove(path)
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()

    def write(self, path: str, data: bytes) -> None:
        """Put a new file in the place of an old one, at once, and overwrite the old one."""
        write_whole(self.disk, path, data)

    def tidy(self, path: str) -> None:
        """Overwrite and remove what a process that was killed left beside a file."""
        wipe_leftovers(self.disk, path)

    def remove(self, path: str) -> None:
        """Overwrite and remove a file, and what was left beside it."""
        self.tidy(path)
        if os.path.exists(path):
            wipe(self.disk, path)
            self.disk.sync_folder(path)

"""What tests run on ranks of which one is killed between two of its steps: calls to the disk, and to other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from disks import FailingDisk
from rank_cases import filled, queries

from munkey import DurableStore, ShardedKeyStore
from munkey.store.file.disk import Disk

GONE = [3, 5, 8, 21]


class EndingDisk(FailingDisk):
    """A disk whose process ends, at once and without a word, before a step; calls to other ranks are steps, too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("all_gather", "all_to_all_single"):
            setattr(dist, name, self.counted(getattr(dist, name)))

    def step(self) -> bool:
        if super().step():
            os._exit(1)
        return False

    def from_now(self, at: int) -> None:
        """Count from here, and end before step number `at`."""
        self.steps, self.at = 0, at

    def counted(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:  # noqa: ANN401
            self.step()
            return act(*args, **settings)

        return call


def opened(folder: str, disk: Disk | None = None) -> ShardedKeyStore:
    """A store in files, one for each rank, and the log of rank 0."""
    rank = dist.get_rank()
    path = f"{folder}/rows-{rank}"
    if not os.path.exists(path):
        part = ShardedKeyStore.of(filled()).local
        DurableStore.copy_of(part, path).close()
    store = ShardedKeyStore.around(DurableStore.open(path, disk=disk))
    store.keep_receipts(folder + "/log", disk=disk, new=True)
    return store


def closed(store: ShardedKeyStore) -> tuple[str, list[int]]:
    said = store.digest(), list(store)
    store.close()
    if isinstance(store.local, DurableStore):
        store.local.close()
    return said


def prepared(folder: str) -> tuple[str, list[int]]:
    ShardedKeyStore.of(filled()).save(folder + "/saved")
    return closed(opened(folder))


def act(what: str, folder: str, victim: int, at: int) -> int:
    """Do something; how many steps the victim took, which is killed before step number `at`."""
    disk = EndingDisk() if dist.get_rank() == victim else Disk()
    store = ShardedKeyStore.load(folder + "/saved") if what == "save" else opened(folder, disk)
    if what == "save":
        store.forget(GONE, missing="ignore")
    if isinstance(disk, EndingDisk):
        disk.from_now(at)
    if what == "save":
        store.save(folder + "/saved", disk=disk)
    elif what == "search":
        store.nearest(queries(), 3)
    else:
        store.forget(GONE, missing="ignore")
    steps = getattr(disk, "steps", 0)
    closed(store)
    return steps


def found(what: str, folder: str) -> tuple[str, list[int]]:
    """The state after a restart."""
    return closed(ShardedKeyStore.load(folder + "/saved") if what == "save" else opened(folder))

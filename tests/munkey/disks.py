"""Disks on which things go wrong."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from itertools import pairwise

from munkey.store.file.disk import Disk

SECTOR = 512


class Killed(BaseException):
    """The process is gone; nobody catches that."""


class FailingDisk(Disk):
    """A disk of the system that counts steps, and stops or fails before one of them.

    Args:
        at: number of the step.
        error: what the step raises; the process is killed if not given, in the middle of the step if it is a write.
    """

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.at, self.error, self.steps, self.dead = at, error, 0, False
        self.files: list[int] = []

    def step(self) -> bool:
        """Whether this is the step."""
        if self.dead:
            raise Killed
        self.steps += 1
        if self.steps - 1 != self.at:
            return False
        if self.error is not None:
            raise self.error
        self.dead = True
        return True

    def die(self) -> None:
        """Close what the process had open, as a system does."""
        self.dead = True
        for file in self.files:
            super().close(file)
        self.files = []

    def open(self, path: str, *, create: bool = False) -> int:
        if self.dead:
            raise Killed
        self.files.append(super().open(path, create=create))
        return self.files[-1]

    def create(self, path: str) -> int:
        if self.dead:
            raise Killed
        self.files.append(super().create(path))
        return self.files[-1]

    def open_to_read(self, path: str) -> int:
        self.files.append(super().open_to_read(path))
        return self.files[-1]

    def open_folder(self, path: str) -> int:
        if self.dead:
            raise Killed
        self.files.append(super().open_folder(path))
        return self.files[-1]

    def unlock(self, file: int) -> None:
        if not self.dead:
            super().unlock(file)

    def close(self, file: int) -> None:
        if self.dead:
            return
        self.files.remove(file)
        super().close(file)

    def allocate(self, file: int, size: int) -> None:
        self._or_die()
        super().allocate(file, size)

    def write(self, file: int, start: int, data: bytes | memoryview) -> None:
        if self.step():
            whole = (start + len(data) // 2) // SECTOR * SECTOR  # a sector is written whole or not
            super().write(file, start, memoryview(data)[: max(0, whole - start)])
            raise Killed
        super().write(file, start, data)

    def resize(self, file: int, size: int) -> None:
        self._or_die()
        super().resize(file, size)

    def sync(self, file: int) -> None:
        self._or_die()
        super().sync(file)

    def link(self, path: str, other: str) -> bool:
        self._or_die()
        return super().link(path, other)

    def replace(self, source: str, target: str) -> None:
        self._or_die()
        super().replace(source, target)

    def remove(self, path: str) -> None:
        self._or_die()
        super().remove(path)

    def sync_folder(self, path: str) -> None:
        self._or_die()
        super().sync_folder(path)

    def _or_die(self) -> None:
        if self.step():
            raise Killed


@dataclass
class Inode:
    """A file: as the system shows it, as it is on the medium, and what is on its way."""

    data: bytearray = field(default_factory=bytearray)
    medium: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    locked: bool = False


def apply(data: bytearray, start: int, new: bytes | None) -> None:
    """Write, or cut or fill to a size."""
    if new is None:
        del data[start:]
        data.extend(bytes(start - len(data)))
    else:
        data.extend(bytes(max(0, start + len(new) - len(data))))
        data[start : start + len(new)] = new


class MemoryDisk(Disk):
    """A disk in memory whose power can go: what was not synced is then on the medium, or not, sector by sector."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.steps = at, 0
        self.names: dict[str, Inode] = {}
        self.medium_names: dict[str, Inode] = {}
        self.pending_names: list[dict[str, Inode]] = []
        self.opened: dict[int, Inode] = {}
        self.inodes: list[Inode] = []
        self.locks: set[int] = set()

    def after_power_loss(self, luck: random.Random) -> MemoryDisk:
        """What is there when the power is back."""
        other = MemoryDisk()
        names = luck.choice([self.medium_names, *self.pending_names])
        for inode in self.inodes:
            found = bytearray(inode.medium)
            for start, new in inode.pending:
                if new is None:
                    if luck.random() < 0.5:
                        apply(found, start, None)
                    continue
                edges = [start, *range(start - start % SECTOR + SECTOR, start + len(new), SECTOR), start + len(new)]
                for first, stop in pairwise(edges):
                    if luck.random() < 0.5:
                        apply(found, first, new[first - start : stop - start])
            inode.medium = found
        for path, inode in names.items():
            other.inodes.append(Inode(bytearray(inode.medium), bytearray(inode.medium)))
            other.names[path] = other.inodes[-1]
        # Two names of one file stay names of one file.
        for path, inode in names.items():
            first = next(name for name, same in names.items() if same is inode)
            other.names[path] = other.names[first]
        other.medium_names = dict(other.names)
        return other

    def _step(self) -> None:
        self.steps += 1
        if self.steps - 1 >= self.at >= 0:
            raise Killed

    def open(self, path: str, *, create: bool = False) -> int:
        if path not in self.names:
            if not create:
                raise FileNotFoundError(errno.ENOENT, path)
            self.inodes.append(Inode())
            self._rename({**self.names, path: self.inodes[-1]})
        file = len(self.opened) + 100  # never given twice
        self.opened[file] = self.names[path]
        return file

    def create(self, path: str) -> int:
        if path in self.names:
            raise FileExistsError(errno.EEXIST, path)
        return self.open(path, create=True)

    def open_to_read(self, path: str) -> int:
        return self.open(path)

    def open_folder(self, path: str) -> int:
        return -1

    def allocate(self, file: int, size: int) -> None:
        self.resize(file, size)

    def lock(self, file: int, *, shared: bool = False, wait: bool = False) -> bool:
        if file < 0 or file in self.locks:
            return True
        if self.opened[file].locked:
            assert not wait, "it would wait for ever"
            return False
        self.opened[file].locked = True
        self.locks.add(file)
        return True

    def unlock(self, file: int) -> None:
        if file in self.locks:
            self.locks.remove(file)
            self.opened[file].locked = False

    def size(self, file: int) -> int:
        return len(self.opened[file].data)

    def read(self, file: int, start: int, count: int) -> bytes:
        return bytes(self.opened[file].data[start : start + count])

    def fill(self, file: int, start: int, buffer: memoryview) -> None:
        data = self.read(file, start, len(buffer))
        if len(data) < len(buffer):
            raise EOFError
        buffer[:] = data

    def write(self, file: int, start: int, data: bytes | memoryview) -> None:
        self._step()
        self._change(file, start, bytes(data))

    def resize(self, file: int, size: int) -> None:
        self._step()
        self._change(file, size, None)

    def _change(self, file: int, start: int, new: bytes | None) -> None:
        inode = self.opened[file]
        apply(inode.data, start, new)
        inode.pending.append((start, new))

    def sync(self, file: int) -> None:
        self._step()
        inode = self.opened[file]
        inode.medium, inode.pending = bytearray(inode.data), []

    def resolve(self, path: str) -> str:
        return path

    def exists(self, path: str) -> bool:
        return path in self.names

    def beside(self, path: str) -> list[str]:
        return sorted(name for name in self.names if name.startswith(path))

    def links(self, file: int) -> int:
        return sum(inode is self.opened[file] for inode in self.names.values())

    def is_of(self, file: int, path: str) -> bool:
        return self.names.get(path) is self.opened[file]

    def same(self, first: str, second: str) -> bool:
        return first in self.names and self.names.get(first) is self.names.get(second)

    def _rename(self, names: dict[str, Inode]) -> None:
        self.names = names
        self.pending_names.append(dict(names))

    def link(self, path: str, other: str) -> bool:
        self._step()
        self._rename({**self.names, other: self.names[path]})
        return True

    def replace(self, source: str, target: str) -> None:
        self._step()
        names = {**self.names, target: self.names[source]}
        del names[source]
        self._rename(names)

    def remove(self, path: str) -> None:
        self._step()
        self._rename({name: inode for name, inode in self.names.items() if name != path})

    def sync_folder(self, path: str) -> None:
        self._step()
        self.medium_names, self.pending_names = dict(self.names), []

    def close(self, file: int) -> None:
        self.unlock(file)


class QuickDisk(Disk):
    """A disk of the system that does not wait for the medium."""

    def sync(self, file: int) -> None:
        pass

    def sync_folder(self, path: str) -> None:
        pass

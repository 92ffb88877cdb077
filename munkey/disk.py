"""The few things a durable store does to a disk, one method each, so that tests can stop between any two of them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["Disk", "replacing", "wipe", "wipe_leftovers", "write_whole"]

_ZEROS = 1 << 20


class Disk:
    """Files of the operating system."""

    def open_to_read(self, path: str) -> int:
        """A descriptor to read only."""
        return os.open(path, os.O_RDONLY)

    def open(self, path: str, *, create: bool = False) -> int:
        """A descriptor to read and write."""
        return os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)

    def lock(self, file: int) -> bool:
        """Whether no other process holds the file; it is held until it is closed."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def size(self, file: int) -> int:
        """In bytes."""
        return os.fstat(file).st_size

    def read(self, file: int, start: int, count: int) -> bytes:
        """Bytes from a place on, fewer at the end of the file."""
        parts = []
        while count and (part := os.pread(file, min(count, 1 << 30), start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts)

    def fill(self, file: int, start: int, buffer: memoryview) -> None:
        """Read bytes from a place on into a buffer, which leaves no copy elsewhere.

        Raises:
            EOFError: if the file ends before.
        """
        while len(buffer):
            count = os.preadv(file, [buffer[: 1 << 30]], start)
            if not count:
                raise EOFError("the file ends before what is to be read")
            start, buffer = start + count, buffer[count:]

    def write(self, file: int, start: int, data: bytes | memoryview) -> None:
        """Bytes to a place."""
        left = memoryview(data)
        while left:
            written = os.pwrite(file, left[: 1 << 30], start)
            start, left = start + written, left[written:]

    def zero(self, file: int, start: int, count: int) -> None:
        """Overwrite a stretch with zeros."""
        for at in range(start, start + count, _ZEROS):
            self.write(file, at, bytes(min(_ZEROS, start + count - at)))

    def resize(self, file: int, size: int) -> None:
        """Cut, or add zeros."""
        os.ftruncate(file, size)

    def allocate(self, file: int, size: int) -> None:
        """Make an empty file so long, with blocks of its own, so that no write to it fails for want of room."""
        try:
            os.posix_fallocate(file, 0, size)
        except (AttributeError, OSError) as error:  # not on every system, and not on every file system
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self.zero(file, 0, size)

    def sync(self, file: int) -> None:
        """Wait until all that was written is on the medium."""
        os.fsync(file)

    def resolve(self, path: str) -> str:
        """The name that leads to the same file wherever the process goes, without links."""
        return os.path.realpath(path)

    def exists(self, path: str) -> bool:
        """Whether there is a file of that name."""
        return os.path.exists(path)

    def same(self, first: str, second: str) -> bool:
        """Whether two names are of one file."""
        return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)

    def link(self, path: str, other: str) -> None:
        """Give a file a second name."""
        os.link(path, other)

    def replace(self, source: str, target: str) -> None:
        """Put a file in the place of another one, at once."""
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Take away a name."""
        os.remove(path)

    def sync_folder(self, path: str) -> None:
        """Wait until the names in a file's folder are on the medium."""
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self, file: int) -> None:
        """Give a descriptor back."""
        os.close(file)


#: No file of anybody else ends like this: what does is wiped.
_PARTIAL, _OLD = ".munkey-partial", ".munkey-old"


@contextmanager
def replacing(disk: Disk, path: str) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `path`, at once, when the context is left.

    What was there before is overwritten, and so is the new file if there is an error before. An interruption leaves the
    old file or the new one; what it may leave beside it, `wipe_leftovers` finds. The descriptor stays open, unless
    there is an error.
    """
    wipe_leftovers(disk, path)
    file = disk.open(path + _PARTIAL, create=True)
    try:
        yield file
        disk.sync(file)
        if disk.exists(path):
            disk.link(path, path + _OLD)  # a name by which it is found once the other one is gone
        disk.replace(path + _PARTIAL, path)
        disk.sync_folder(path)
        wipe_leftovers(disk, path)
    except BaseException:
        disk.close(file)
        with suppress(OSError):
            wipe_leftovers(disk, path)
        raise


def wipe_leftovers(disk: Disk, path: str) -> None:
    """Overwrite and remove what an interruption left beside a file."""
    for name in (path + _PARTIAL, path + _OLD):
        if not disk.exists(name):
            continue
        if disk.same(name, path):
            disk.remove(name)
        else:
            wipe(disk, name)
        disk.sync_folder(path)


def wipe(disk: Disk, path: str) -> None:
    """Overwrite and remove a file."""
    file = disk.open(path)
    try:
        disk.zero(file, 0, disk.size(file))
        disk.sync(file)
    finally:
        disk.close(file)
    disk.remove(path)


def write_whole(disk: Disk, path: str, data: bytes) -> None:
    """Put a file with these bytes in the place of `path`, as `replacing` does."""
    with replacing(disk, path) as file:
        disk.write(file, 0, data)
    disk.close(file)

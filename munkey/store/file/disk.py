"""The operations of a durable store on a disk, one method each, so that tests can stop between any two of them."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

__all__ = [
    "Disk",
    "Owner",
    "check_name",
    "give_back",
    "read_whole",
    "replacing",
    "while_whole",
    "wipe",
    "wipe_leftovers",
    "write_whole",
]

# Bytes that are written at once. The cache of the system keeps what is written and read at once as one piece, and
# changing any of it costs as much as the piece is large: a hundred scattered rows of a file that was written 4 MiB at a
# time take five times as long as of one that was written 64 KiB at a time (ext4, Linux 6.18).
_PIECE = 1 << 16
T = TypeVar("T")


class Owner:
    """The process that opened something, which a process that was forked from it must not change."""

    def __init__(self) -> None:
        self.process = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is the process."""
        return os.getpid() == self.process

    def check(self, what: str) -> None:
        """Raise RuntimeError in another process."""
        if not self.here:
            raise RuntimeError(
                f"{what} was opened by process {self.process}, and this is process {os.getpid()}, forked from it; two "
                "would write over each other's changes. Change it in the process that opened it, or close it there and "
                "open it here"
            )


class Disk:
    """Files of the operating system."""

    def open_to_read(self, path: str) -> int:
        """Return a descriptor to read only."""
        return _scattered(os.open(path, os.O_RDONLY))

    def open(self, path: str, *, create: bool = False) -> int:
        """Return a descriptor to read and write."""
        return _scattered(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600))

    def create(self, path: str) -> int:
        """Return a descriptor of a new file, to read and write.

        Raises:
            FileExistsError: if there is anything of that name, a link included.
        """
        return _scattered(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def lock(self, file: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Lock a file until it is unlocked or closed; return False if another process has it.

        Args:
            file: its descriptor.
            shared: whether others may have it, too.
            wait: whether to wait for others.
        """
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            return False
        return True

    def unlock(self, file: int) -> None:
        """Give a lock back, for all processes that share the descriptor."""
        fcntl.flock(file, fcntl.LOCK_UN)

    def size(self, file: int) -> int:
        """Return the size in bytes."""
        return os.fstat(file).st_size

    def read(self, file: int, start: int, count: int) -> bytes:
        """Read bytes from a place on, fewer at the end of the file."""
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
        """Write bytes to a place."""
        written = os.pwrite(file, data[:_PIECE], start)
        while written < len(data):
            start, data = start + written, memoryview(data)[written:]
            written = os.pwrite(file, data[:_PIECE], start)

    def zero(self, file: int, start: int, count: int) -> None:
        """Overwrite a stretch with zeros."""
        for at in range(start, start + count, _PIECE):
            self.write(file, at, bytes(min(_PIECE, start + count - at)))

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
        getattr(os, "fdatasync", os.fsync)(file)

    def resolve(self, path: str) -> str:
        """Return the name that leads to the same file wherever the process goes, without links."""
        return os.path.realpath(path)

    def exists(self, path: str) -> bool:
        """Return whether there is a file of that name."""
        return os.path.exists(path)

    def is_of(self, file: int, path: str) -> bool:
        """Return whether an open file is the one that has a name."""
        try:
            there, own = os.stat(path), os.fstat(file)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def same(self, first: str, second: str) -> bool:
        """Return whether two names are of one file."""
        return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)

    def beside(self, path: str) -> list[str]:
        """Return the names of plain files whose names begin as that of a file, links left out."""
        folder, name = os.path.split(path)
        with os.scandir(folder or ".") as entries:
            found = [e.name for e in entries if e.name.startswith(name) and e.is_file(follow_symlinks=False)]
        return sorted(os.path.join(folder, other) for other in found)

    def links(self, file: int) -> int:
        """Return how many names a file has."""
        return os.fstat(file).st_nlink

    def link(self, path: str, other: str) -> bool:
        """Give a file a second name; return False if the file system knows no second names."""
        try:
            os.link(path, other)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV):
                return False
            raise
        return True

    def replace(self, source: str, target: str) -> None:
        """Put a file in the place of another one, at once."""
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Take away a name."""
        os.remove(path)

    def open_folder(self, path: str) -> int:
        """Return a descriptor of the folder that a file is in, to lock."""
        return os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)

    def sync_folder(self, path: str) -> None:
        """Wait until the names in a file's folder are on the medium."""
        folder = self.open_folder(path)
        try:
            os.fsync(folder)
        finally:
            self.close(folder)

    def close(self, file: int) -> None:
        """Give a descriptor back."""
        os.close(file)


def _scattered(file: int) -> int:
    """Let the system read no further than it has to, in pages, as rows are changed one here and one there."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # as of a pipe
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def give_back(disk: Disk, file: int) -> None:
    """Unlock and close: a process that was forked meanwhile has the descriptor, too, and would keep the lock."""
    try:
        disk.unlock(file)
    finally:
        disk.close(file)


#: How the names end of a file that is being written, and of one that was replaced: the name of the file it is for, a
#: number of its own, and this.
_PARTIAL, _OLD = ".munkey-partial", ".munkey-old"
_NUMBER = 16  # hexadecimal digits


class replacing:
    """Context that gives a descriptor of a new file, which takes the place of `path`, at once, when it is left.

    The new file has a name of its own and is locked, so that several processes can save to one name: each save is
    whole, and the last one wins. What was there before is overwritten, once nobody reads it any more (see
    `read_whole`), and so is the new file if there is an error before. An interruption leaves the old file or the new
    one; what it may leave beside it, `wipe_leftovers` finds. A link stays a link: the file that it leads to is
    replaced. The descriptor stays open and locked, unless there is an error.

    Where the file system knows no second names, an interruption between replacing and overwriting leaves the bytes of
    the old file in free blocks of the disk.

    Args:
        disk: what reads and writes.
        path: the name.
        held: descriptor of the old file, if the caller has it open and locked; the caller closes it afterwards.
        new: whether there is to be no file of that name yet.

    Raises:
        FileExistsError: if there is one all the same.
        FileNotFoundError: if the name no longer leads to the file that is held.

    Attributes:
        file: the descriptor; -1 once it was closed after an error.
    """

    file = -1

    def __init__(self, disk: Disk, path: str, held: int = -1, *, new: bool = False) -> None:
        self.disk, self.path, self.held, self.new, self._before = disk, disk.resolve(path), held, new, held
        self._name()

    def _name(self) -> None:
        number = secrets.token_hex(_NUMBER // 2)
        self._partial, self._old = f"{self.path}.{number}{_PARTIAL}", f"{self.path}.{number}{_OLD}"

    def __enter__(self) -> int:
        try:
            self.file = self.disk.create(self._partial)
            # Before it was locked, another save may have taken it for what an interruption left.
            while not (self.disk.lock(self.file) and self.disk.is_of(self.file, self._partial)):
                self.release()
                self._name()
                self.file = self.disk.create(self._partial)
        except BaseException:
            self._give_up()
            raise
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            self._put()
        except BaseException:
            self._give_up()
            raise
        self._close_before()

    def _put(self) -> None:
        disk, path = self.disk, self.path
        disk.sync(self.file)
        with _locked_folder(disk, path):
            if self.held >= 0:
                check_name(disk, self.held, path)
            elif self.new and disk.exists(path):
                raise FileExistsError(f"there is a file {path!r} already; open it, or remove it")
            elif disk.exists(path):
                self._before = disk.open(path)
            if self._before >= 0:
                disk.link(path, self._old)  # a name by which it is found once the other one is gone
            disk.replace(self._partial, path)
            disk.sync_folder(path)
        if self._before >= 0:
            _retire(disk, self._before, self._old, path, wait=self._before != self.held)
            disk.unlock(self._before)  # or its other names could not be taken away
        wipe_leftovers(disk, path)

    def _give_up(self) -> None:
        if self.file >= 0:
            with suppress(OSError):
                _discard(self.disk, self.file, self._before, self.path, (self._partial, self._old))
            self.release()
        self._close_before()

    def release(self) -> None:
        """Close the new file."""
        file, self.file = self.file, -1
        if file >= 0:
            give_back(self.disk, file)

    def _close_before(self) -> None:
        before, self._before = self._before, self.held
        if before != self.held:
            give_back(self.disk, before)


def check_name(disk: Disk, file: int, path: str) -> None:
    """Raise FileNotFoundError if a name no longer leads to an open file: another one may be there."""
    if not disk.is_of(file, path):
        raise FileNotFoundError(
            f"the file that was opened as {path!r} was renamed, removed or replaced since, and cannot be written anew "
            "under that name; close it, and open it by the name it has now"
        )


def _retire(disk: Disk, before: int, old: str, path: str, *, wait: bool) -> None:
    """Overwrite the file that was replaced, once nobody reads it, and take away its second name."""
    if wait:
        disk.lock(before, wait=True)
    disk.zero(before, 0, disk.size(before))
    disk.sync(before)
    if disk.exists(old):
        disk.remove(old)
        disk.sync_folder(path)


def _discard(disk: Disk, file: int, before: int, path: str, names: tuple[str, str]) -> None:
    """After an error: overwrite the new file, or the old one if it was replaced, and take away their own names."""
    partial, old = names
    if disk.exists(partial) and disk.is_of(file, partial):
        disk.zero(file, 0, disk.size(file))
        disk.sync(file)
        disk.remove(partial)
    disk.sync_folder(path)  # before the old file is overwritten, if it was replaced
    if disk.exists(old):
        if not disk.same(old, path):
            disk.zero(before, 0, disk.size(before))
            disk.sync(before)
        disk.remove(old)
        disk.sync_folder(path)


@contextmanager
def _locked_folder(disk: Disk, path: str) -> Iterator[None]:
    """Let one process at a time replace files of a folder, or two could lose sight of a file between them."""
    folder = disk.open_folder(path)
    try:
        with suppress(OSError):  # not on every file system
            disk.lock(folder, wait=True)
        yield
    finally:
        with suppress(OSError):
            disk.unlock(folder)
        disk.close(folder)


def wipe_leftovers(disk: Disk, path: str) -> None:
    """Overwrite and remove what an interrupted `replacing` left beside a file; links are left alone."""
    if not any(_is_leftover(name[len(path) :]) for name in disk.beside(path)):
        return
    with _locked_folder(disk, path):
        for name in disk.beside(path):
            if _is_leftover(name[len(path) :]):
                _wipe_leftover(disk, name, path)
        disk.sync_folder(path)


def _wipe_leftover(disk: Disk, name: str, path: str) -> None:
    if disk.same(name, path):  # as between the two names of a file that was about to be replaced
        disk.remove(name)
        return
    file = disk.open(name)
    try:
        if not disk.lock(file):
            return  # it is being written, or overwritten
        if disk.links(file) == 1:  # another name of a file of somebody else is only a name
            disk.zero(file, 0, disk.size(file))
            disk.sync(file)
        disk.remove(name)
    finally:
        give_back(disk, file)


def _is_leftover(end: str) -> bool:
    """Return whether a name ends as `replacing` lets names end, in this release or the first one."""
    for suffix in (_PARTIAL, _OLD):
        if end == suffix:
            return True
        number = end.removesuffix(suffix)
        if number != end and len(number) == _NUMBER + 1 and number[0] == "." and _is_hex(number[1:]):
            return True
    return False


def _is_hex(text: str) -> bool:
    return all(letter in "0123456789abcdef" for letter in text)


def wipe(disk: Disk, path: str) -> None:
    """Overwrite and remove a file."""
    file = disk.open(path)
    try:
        disk.lock(file, wait=True)
        disk.zero(file, 0, disk.size(file))
        disk.sync(file)
        disk.remove(path)  # while it is locked, so that nobody reads zeros
    finally:
        give_back(disk, file)


def write_whole(disk: Disk, path: str, data: bytes) -> None:
    """Put a file with these bytes in the place of `path`, as `replacing` does."""
    with replacing(disk, path) as file:
        disk.write(file, 0, data)
    give_back(disk, file)


def read_whole(disk: Disk, path: str) -> bytearray:
    """Read a file that others may replace at the same time: all of the old one or all of the new one.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    def read(file: int) -> bytearray:
        data = bytearray(disk.size(file))
        disk.fill(file, 0, memoryview(data))
        return data

    return while_whole(disk, path, read)


def while_whole(disk: Disk, path: str, read: Callable[[int], T]) -> T:
    """Return what `read` makes of a file that others may replace, but do not overwrite before it returns.

    Args:
        disk: what reads.
        path: the name.
        read: is given the descriptor; what it reads by the name, it reads again if that leads to another file then.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    while True:
        file = disk.open_to_read(path)
        try:
            disk.lock(file, shared=True, wait=True)
            try:
                found = read(file)
            except Exception:
                if disk.is_of(file, path):
                    raise
                continue
            if disk.is_of(file, path):
                return found
        finally:
            give_back(disk, file)

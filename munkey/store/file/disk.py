"""Operations of a durable store on a disk, one method each, so that tests can stop between any two operations."""

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

# Bytes that are written at once. The cache of the system keeps data that are written or read at once as one piece, and
# the cost of any change in a piece grows with the size of the piece. Scattered changes of a hundred rows take five
# times as long in a file written 4 MiB at a time as in a file written 64 KiB at a time (ext4, Linux 6.18).
_PIECE = 1 << 16
T = TypeVar("T")


class Owner:
    """Process that opened a file, which forked processes must not change."""

    def __init__(self) -> None:
        self.process = os.getpid()

    @property
    def here(self) -> bool:
        """True in the process that opened the file."""
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
        """Return a descriptor for reading only."""
        return _scattered(os.open(path, os.O_RDONLY))

    def open(self, path: str, *, create: bool = False) -> int:
        """Return a descriptor for reading and writing."""
        return _scattered(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600))

    def create(self, path: str) -> int:
        """Return a descriptor of a new file, for reading and writing.

        Raises:
            FileExistsError: if there is anything of that name, a link included.
        """
        return _scattered(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    def lock(self, file: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Lock a file until it is unlocked or closed; return False if another process holds the lock.

        Args:
            file: descriptor of the file.
            shared: whether other processes may hold the lock, too.
            wait: whether to wait for other processes.
        """
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            return False
        return True

    def unlock(self, file: int) -> None:
        """Release a lock, for all processes that share the descriptor."""
        fcntl.flock(file, fcntl.LOCK_UN)

    def size(self, file: int) -> int:
        """Return the size of a file in bytes."""
        return os.fstat(file).st_size

    def read(self, file: int, start: int, count: int) -> bytes:
        """Read `count` bytes from an offset on, fewer at the end of the file."""
        parts = []
        while count and (part := os.pread(file, min(count, 1 << 30), start)):
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return b"".join(parts)

    def fill(self, file: int, start: int, buffer: memoryview) -> None:
        """Read bytes from an offset on into a buffer, without a copy elsewhere.

        Raises:
            EOFError: if the file ends before the buffer is full.
        """
        while len(buffer):
            count = os.preadv(file, [buffer[: 1 << 30]], start)
            if not count:
                raise EOFError("the file ends before what is to be read")
            start, buffer = start + count, buffer[count:]

    def write(self, file: int, start: int, data: bytes | memoryview) -> None:
        """Write bytes at an offset."""
        written = os.pwrite(file, data[:_PIECE], start)
        while written < len(data):
            start, data = start + written, memoryview(data)[written:]
            written = os.pwrite(file, data[:_PIECE], start)

    def zero(self, file: int, start: int, count: int) -> None:
        """Overwrite `count` bytes from an offset on with zeros."""
        for at in range(start, start + count, _PIECE):
            self.write(file, at, bytes(min(_PIECE, start + count - at)))

    def resize(self, file: int, size: int) -> None:
        """Cut a file, or extend it with zeros."""
        os.ftruncate(file, size)

    def allocate(self, file: int, size: int) -> None:
        """Extend an empty file to a size, with allocated blocks, so that no later write fails for lack of space."""
        try:
            os.posix_fallocate(file, 0, size)
        except (AttributeError, OSError) as error:  # not supported by every system and file system
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self.zero(file, 0, size)

    def sync(self, file: int) -> None:
        """Wait until all written data are on the medium."""
        getattr(os, "fdatasync", os.fsync)(file)

    def resolve(self, path: str) -> str:
        """Return the name of the same file without links, valid in any working folder of the process."""
        return os.path.realpath(path)

    def exists(self, path: str) -> bool:
        """Return whether there is a file of that name."""
        return os.path.exists(path)

    def is_of(self, file: int, path: str) -> bool:
        """Return whether a name leads to an open file."""
        try:
            there, own = os.stat(path), os.fstat(file)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)

    def same(self, first: str, second: str) -> bool:
        """Return whether two names lead to one file."""
        return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)

    def beside(self, path: str) -> list[str]:
        """Return the names of plain files that begin with the name of a file, without links."""
        folder, name = os.path.split(path)
        with os.scandir(folder or ".") as entries:
            found = [e.name for e in entries if e.name.startswith(name) and e.is_file(follow_symlinks=False)]
        return sorted(os.path.join(folder, other) for other in found)

    def links(self, file: int) -> int:
        """Return the number of names of a file."""
        return os.fstat(file).st_nlink

    def link(self, path: str, other: str) -> bool:
        """Give a file a second name; return False if the file system has no second names."""
        try:
            os.link(path, other)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV):
                return False
            raise
        return True

    def replace(self, source: str, target: str) -> None:
        """Replace a file by another file, atomically."""
        os.replace(source, target)

    def remove(self, path: str) -> None:
        """Remove a name."""
        os.remove(path)

    def open_folder(self, path: str) -> int:
        """Return a descriptor of the folder of a file, for locking."""
        return os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)

    def sync_folder(self, path: str) -> None:
        """Wait until the names in a file's folder are on the medium."""
        folder = self.open_folder(path)
        try:
            os.fsync(folder)
        finally:
            self.close(folder)

    def close(self, file: int) -> None:
        """Close a descriptor."""
        os.close(file)


def _scattered(file: int) -> int:
    """Limit reads of the system to the pages that are needed, because changed rows are scattered."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # as for a pipe
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def give_back(disk: Disk, file: int) -> None:
    """Unlock and close a file; after closing alone, a forked process with the same descriptor would keep the lock."""
    try:
        disk.unlock(file)
    finally:
        disk.close(file)


#: Ends of the names of a file that is being written and of a file that was replaced. Such a name is the name of the
#: target file, a unique number, and one of these ends.
_PARTIAL, _OLD = ".munkey-partial", ".munkey-old"
_NUMBER = 16  # hexadecimal digits


class replacing:
    """Context that gives a descriptor of a new file, which replaces the file `path` atomically on exit.

    The new file has a unique name and is locked, so that several processes can save to one name. Each save is whole,
    and the last save wins. The old file is overwritten once no process reads it any more (see `read_whole`). After an
    error before the replacement, the new file is overwritten instead. An interruption leaves the old file or the new
    file at `path`; `wipe_leftovers` finds any other file that an interruption leaves. A link stays a link: its target
    is replaced. The descriptor stays open and locked, unless there is an error.

    Without second names in the file system, an interruption between replacing and overwriting leaves the bytes of the
    old file in free disk blocks.

    Args:
        disk: `Disk` that reads and writes.
        path: name of the file.
        held: descriptor of the old file, if the caller has it open and locked; the caller closes it afterwards.
        new: whether there must be no file of that name yet.

    Raises:
        FileExistsError: if `new`, and there is a file of that name.
        FileNotFoundError: if the name no longer leads to the file `held`.

    Attributes:
        file: descriptor of the new file; -1 once it was closed after an error.
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
            # Another save may have removed the file as a leftover before it was locked.
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
                disk.link(path, self._old)  # a name by which the old file is found after the replacement
            disk.replace(self._partial, path)
            disk.sync_folder(path)
        if self._before >= 0:
            _retire(disk, self._before, self._old, path, wait=self._before != self.held)
            disk.unlock(self._before)  # `wipe_leftovers` could not remove other names of a locked file
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
    """Raise FileNotFoundError if a name no longer leads to an open file: another file may have the name."""
    if not disk.is_of(file, path):
        raise FileNotFoundError(
            f"the file that was opened as {path!r} was renamed, removed or replaced since, and cannot be written again "
            "under that name; close it, and open it by the name it has now"
        )


def _retire(disk: Disk, before: int, old: str, path: str, *, wait: bool) -> None:
    """Overwrite the replaced file once no process reads it, and remove its second name."""
    if wait:
        disk.lock(before, wait=True)
    disk.zero(before, 0, disk.size(before))
    disk.sync(before)
    if disk.exists(old):
        disk.remove(old)
        disk.sync_folder(path)


def _discard(disk: Disk, file: int, before: int, path: str, names: tuple[str, str]) -> None:
    """Overwrite the new file after an error, or the old file if it was replaced, and remove their unique names."""
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
    """Let one process at a time replace files of a folder; two processes at once could both miss a replaced file."""
    folder = disk.open_folder(path)
    try:
        with suppress(OSError):  # not supported by every file system
            disk.lock(folder, wait=True)
        yield
    finally:
        with suppress(OSError):
            disk.unlock(folder)
        disk.close(folder)


def wipe_leftovers(disk: Disk, path: str) -> None:
    """Overwrite and remove the leftovers of an interrupted `replacing` beside a file; links are not touched."""
    if not any(_is_leftover(name[len(path) :]) for name in disk.beside(path)):
        return
    with _locked_folder(disk, path):
        for name in disk.beside(path):
            if _is_leftover(name[len(path) :]):
                _wipe_leftover(disk, name, path)
        disk.sync_folder(path)


def _wipe_leftover(disk: Disk, name: str, path: str) -> None:
    if disk.same(name, path):  # as for the two names of a file that was about to be replaced
        disk.remove(name)
        return
    file = disk.open(name)
    try:
        if not disk.lock(file):
            return  # the file is being written, or overwritten
        if disk.links(file) == 1:  # a file with further names may be in use under another name
            disk.zero(file, 0, disk.size(file))
            disk.sync(file)
        disk.remove(name)
    finally:
        give_back(disk, file)


def _is_leftover(end: str) -> bool:
    """Return whether a name has an end that `replacing` uses, in this release or the first release."""
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
        disk.remove(path)  # before unlocking, so that no process reads zeros
    finally:
        give_back(disk, file)


def write_whole(disk: Disk, path: str, data: bytes) -> None:
    """Replace the file `path` by a file with given bytes, as `replacing` does."""
    with replacing(disk, path) as file:
        disk.write(file, 0, data)
    give_back(disk, file)


def read_whole(disk: Disk, path: str) -> bytearray:
    """Read a file that other processes may replace at the same time: the whole old file or the whole new file.

    Raises:
        FileNotFoundError: if there is no such file.
    """

    def read(file: int) -> bytearray:
        data = bytearray(disk.size(file))
        disk.fill(file, 0, memoryview(data))
        return data

    return while_whole(disk, path, read)


def while_whole(disk: Disk, path: str, read: Callable[[int], T]) -> T:
    """Return the result of `read` on a file that other processes may replace, but not overwrite before `read` returns.

    Args:
        disk: `Disk` that reads.
        path: name of the file.
        read: function of the descriptor, which is called again if the name leads to another file afterwards.

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

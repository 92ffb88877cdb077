"""A store in a file, whatever happens to process, power and disk."""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from disks import FailingDisk, Killed, MemoryDisk
from durables import CHANGES, IDS, create, each_change, state, train
from stores import SECRET, WIDTHS, keys_of, seeded

from munkey import DurableStore, KeyStore


@each_change
def test_is_what_a_store_in_memory_is(filled: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    with DurableStore.open(tmp_path / "store") as store:
        plain = copy.deepcopy(store)
        assert type(plain) is KeyStore and state(plain) == state(store)
        CHANGES[name](store)
        if name == "sync":
            train(plain)
        else:
            CHANGES[name](plain)  # type: ignore[arg-type]
        assert state(store) == state(plain)
        store.add([500], keys_of([500]))
        plain.add([500], keys_of([500]))
    with DurableStore.open(tmp_path / "store") as again:
        assert state(again) == state(plain)
        ours, theirs = again.state_dict(), plain.state_dict()
        assert all(torch.equal(ours[column], theirs[column]) for column in ours)


@each_change
def test_killed_between_any_two_steps_it_is_before_or_after(filled: Path, tmp_path: Path, name: str) -> None:
    def copied(number: int) -> Path:
        folder = tmp_path / str(number)
        shutil.copytree(filled, folder)
        return folder / "store"

    disk = FailingDisk()
    with DurableStore.open(copied(0), disk=disk) as store:
        before, opening = state(store), disk.steps
        CHANGES[name](store)
        after, last = state(store), disk.steps
    assert last - opening > 4
    seen = set()
    for at in range(last):  # opening is interrupted, too
        path, disk = copied(at + 1), FailingDisk(at)
        with pytest.raises(Killed):
            CHANGES[name](DurableStore.open(path, disk=disk))
        disk.die()
        with DurableStore.open(path) as store:
            found = state(store)
            # To replace is to forget and then to add.
            half = (found[1] == tuple(i for i in before[1] if i != 4)) and name == "replace"
            assert found in (before, after) or half
            seen.add(found)
            assert store.live.state.count == store.used and os.listdir(path.parent) == ["store"]
            CHANGES[name](store) if found == before else None
            assert half or state(store) == after
        shutil.rmtree(path.parent)
    assert {before, after} <= seen | ({after} if before == after else set())


@each_change
def test_without_power_it_is_before_or_after(name: str) -> None:
    def prepared() -> tuple[MemoryDisk, DurableStore]:
        disk = MemoryDisk()
        store = create("store", disk)
        store.forget([11])
        return disk, store

    disk, store = prepared()
    before, start = state(store), disk.steps
    CHANGES[name](store)
    after, last = state(store), disk.steps
    for at in range(start, last + 1):
        for seed in range(4):
            disk, store = prepared()
            disk.at = at
            if at < last:
                with pytest.raises(Killed):
                    CHANGES[name](store)
            else:
                CHANGES[name](store)
            found = state(DurableStore.open("store", disk=disk.after_power_loss(random.Random(seed))))
            half = name == "replace" and 4 not in found[1] and at < last
            assert half or found in ((before, after) if at < last else (after,))


@pytest.mark.parametrize("act", ["create", "open"])
def test_creating_and_opening_may_be_interrupted(tmp_path: Path, act: str) -> None:
    path = tmp_path / "store"
    if act == "open":
        create(path).close()
    for at in range(40):
        disk = FailingDisk(at)
        try:
            (create if act == "create" else DurableStore.open)(path, disk=disk).close()
        except Killed:
            disk.die()
        except FileExistsError:
            break
        if path.exists():
            with DurableStore.open(path) as store:
                assert tuple(store) in ((), tuple(IDS))
            if act == "create":
                os.remove(path)
    assert at > 3


# --- erasing --------------------------------------------------------------------------------------------------


def pieces(store: KeyStore, ids: list[int]) -> list[bytes]:
    rows = store.get(ids)
    return [row.numpy().tobytes() for column in (rows.keys, rows.values) for row in column]


def test_no_byte_of_what_was_forgotten_is_on_the_medium_or_in_the_journal() -> None:
    disk = MemoryDisk()
    store = create("store", disk)
    store.add([50, 51], keys_of([50, 51]))
    train(store)
    store.sync()
    gone = pieces(store, [3, 19, 50])
    on_medium = b"".join(bytes(inode.medium) for inode in disk.inodes)
    assert all(piece in on_medium for piece in gone), "the search finds what is there"
    journal, place = b"", store.live.layout.size
    write = disk.write

    def spy(file: int, start: int, data: bytes | memoryview) -> None:
        nonlocal journal
        if start >= place:
            journal += bytes(data)
        write(file, start, data)

    disk.write = spy  # type: ignore[method-assign]
    store.forget([3, 19, 50])
    everything = b"".join(bytes(inode.data) + bytes(inode.medium) for inode in disk.inodes)
    assert not any(piece in everything for piece in gone)
    assert b"erase" in journal and not any(piece in journal for piece in gone)


def test_what_a_growing_or_compacted_file_leaves_behind_is_overwritten() -> None:
    disk = MemoryDisk()
    store = create("store", disk)
    gone = pieces(store, [3])
    store.add(range(100, 200), keys_of(list(range(100, 200))))
    store.compact()
    store.sync()
    store.forget([3])
    assert len(disk.inodes) > 4, "files were replaced"
    everything = b"".join(bytes(inode.data) + bytes(inode.medium) for inode in disk.inodes)
    assert not any(piece in everything for piece in gone)


def test_the_cost_of_forgetting_follows_what_goes() -> None:
    def written(rows: int, ids: list[int]) -> int:
        disk = MemoryDisk()
        store = DurableStore.create("store", *WIDTHS, secret=SECRET, disk=disk)
        store.add(range(rows), torch.randn(rows, 3, generator=seeded()))
        write, total = disk.write, 0

        def spy(file: int, start: int, data: bytes | memoryview) -> None:
            nonlocal total
            total += len(data)
            write(file, start, data)

        disk.write = spy  # type: ignore[method-assign]
        store.forget(ids)
        return total

    few, many = written(100, [3, 4]), written(5000, [3, 4])
    assert abs(few - many) < 100  # longer numbers in the journal
    assert written(5000, list(range(0, 4000, 2))) > 100 * few


# --- what goes wrong ------------------------------------------------------------------------------------------


@each_change
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_an_error_of_the_disk_loses_nothing(filled: Path, tmp_path: Path, name: str, code: int) -> None:
    shutil.copytree(filled, tmp_path / "after")
    with DurableStore.open(tmp_path / "after" / "store") as store:
        before = set(store)
        CHANGES[name](store)
        ends = (before, set(store), before - {4} if name == "replace" else before)
    at, done, usable = 0, False, 0
    while not done:
        folder = tmp_path / str(at)
        shutil.copytree(filled, folder)
        disk = FailingDisk()
        store = DurableStore.open(folder / "store", disk=disk)
        gone = pieces(store, [1])
        disk.at, disk.error = disk.steps + at, OSError(code, os.strerror(code))
        try:
            CHANGES[name](store)
            done = True
        except OSError as error:
            assert error.errno == code
        disk.at = -1
        if not store.live.unsure:  # whatever went wrong, it still forgets
            store.forget([1], missing="ignore")
            usable += 1
        store.close()
        with DurableStore.open(folder / "store") as again:
            assert set(again) in ends if store.live.unsure else set(again) == set(store) in [end - {1} for end in ends]
        everything = b"".join(path.read_bytes() for path in folder.iterdir())
        assert store.live.unsure or not any(piece in everything for piece in gone)
        shutil.rmtree(folder)
        at += 1
    assert at > 5 and usable > 1


@each_change
def test_an_interruption_from_the_keyboard_loses_nothing(filled: Path, tmp_path: Path, name: str) -> None:
    at, done = 0, False
    while not done:
        folder = tmp_path / str(at)
        shutil.copytree(filled, folder)
        disk = FailingDisk()
        store = DurableStore.open(folder / "store", disk=disk)
        before = set(store)
        disk.at, disk.error = disk.steps + at, KeyboardInterrupt()
        try:
            CHANGES[name](store)
            done, disk.at = True, -1
        except KeyboardInterrupt:
            disk.at = -1
            with suppress(OSError, KeyError):
                store.forget([5])
        store.close()
        with DurableStore.open(folder / "store") as again:
            assert set(again) <= before | set(range(100, 140))
        shutil.rmtree(folder)
        at += 1


def test_loading_a_state_that_cannot_be_written_changes_nothing(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    disk = FailingDisk()
    with DurableStore.open(tmp_path / "store", disk=disk) as store:
        before, other = state(store), KeyStore(*WIDTHS)
        other.add([70], keys_of([70]))
        disk.at, disk.error = disk.steps + 1, OSError(errno.ENOSPC, "full")
        with pytest.raises(OSError, match="full"):
            store.load_state_dict(other.state_dict())
        assert state(store) == before
        store.forget([1])
    with DurableStore.open(tmp_path / "store") as again:
        assert set(again) == set(before[1]) - {1}

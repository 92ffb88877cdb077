"""A file of a store: who may open it, what it depends on, and damage that is seen."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import FailingDisk
from durables import create, state, train
from stores import SECRET, WIDTHS, Holder, keys_of

from munkey import DurableStore, KeyStore
from munkey.store.digest import checksum
from munkey.store.file.disk import Disk
from munkey.store.file.layout import Layout
from munkey.store.index import Index
from treediff import EMA


def test_two_stores_cannot_follow_one_file(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    with (
        DurableStore.open(tmp_path / "store") as store,
        pytest.raises(TypeError, match="cannot be pickled, as two would"),
    ):
        pickle.dumps(store)


def test_a_store_in_memory_goes_on_in_a_file(tmp_path: Path) -> None:
    ids = list(range(30))
    store = KeyStore(*WIDTHS, seed=3, scale=0.5, secret=SECRET, dtype=torch.float64)
    store.add(ids, keys_of(ids, 2), torch.tensor(ids))
    store.add([50], keys_of([50]), permanent=True)
    store.forget([4, 9])
    train(store)
    before = state(store)
    with DurableStore.copy_of(store, tmp_path / "store") as durable:
        assert state(durable) == before and durable.keys.dtype == torch.float64
        for each in (store, durable):  # the first values of new ones are the same
            each.add([60], keys_of([60]))
            each.forget([0])
        assert state(durable) == state(store) != before
        with pytest.raises(ValueError, match="are permanent: weights were trained"):
            durable.forget([50])
    with DurableStore.open(tmp_path / "store") as again:
        assert state(again) == state(store)
    with pytest.raises(FileExistsError):
        DurableStore.copy_of(store, tmp_path / "store")


@pytest.mark.parametrize("damaged", [False, True])
def test_forgetting_while_the_file_has_other_values(filled: Path, tmp_path: Path, damaged: bool) -> None:
    """Hashes of rows that go are then those in the file, whose records are checked first."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "store"
    with DurableStore.open(path) as store:
        untrained = copy.deepcopy(store)
        train(store)
        if damaged:
            damage(path, 4096 + 20, b"x")  # of the first row, which goes
            before = state(store)
            with pytest.raises(ValueError, match="is damaged: its rows are not those that were written"):
                store.forget([0, 7])
            assert state(store) == before
            return
        store.forget([0, 7])
        store.verify()
    untrained.forget([0, 7])
    with DurableStore.open(path) as again:
        assert state(again) == state(untrained)


def test_a_copy_that_fails_is_whole_or_not_there(tmp_path: Path) -> None:
    store, at, made = KeyStore(*WIDTHS, secret=SECRET), 0, False
    store.add([1, 2], keys_of([1, 2]))
    before = state(store)
    while not made:
        disk = FailingDisk(at, OSError(errno.ENOSPC, "full"))
        try:
            DurableStore.copy_of(store, tmp_path / "store", disk).close()
            made = True
        except OSError as error:
            assert error.errno == errno.ENOSPC
            if (tmp_path / "store").exists():
                with DurableStore.open(tmp_path / "store") as whole:
                    assert state(whole) == before
                (tmp_path / "store").unlink()
        at += 1
        assert state(store) == before
    assert at > 8
    with DurableStore.open(tmp_path / "store") as again:
        assert state(again) == before


def test_a_compacted_file_depends_on_its_content_alone(tmp_path: Path) -> None:
    for name, gone in (("one", [31, 33]), ("other", [])):
        with DurableStore.create(tmp_path / name, *WIDTHS, secret=SECRET) as store:
            ids = [1, 2, 3, *gone] if gone else [3, 1, 2]
            store.add(ids, keys_of(ids))
            store.forget(gone)
            store.compact()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_store_that_failed_half_way_says_so_and_is_mended_by_opening(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    disk = FailingDisk()
    store = DurableStore.open(tmp_path / "store", disk=disk)
    disk.at, disk.error = disk.steps + 3, OSError(errno.EIO, "broken")
    with pytest.raises(OSError, match="broken"):
        store.forget([3])
    with pytest.raises(OSError, match="failed half way through a change; close the store and open it, which fixes the"):
        store.forget([3])
    store.close()
    with DurableStore.open(tmp_path / "store") as again:
        assert 3 not in again
    with pytest.raises(ValueError, match="is closed; open it again"):
        store.forget([4])


def test_only_one_store_has_a_file_open(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "store"
    with DurableStore.open(path):
        with pytest.raises(
            BlockingIOError, match="is open in another store, here or in another process; close it there"
        ):
            DurableStore.open(path)
        code = f"from munkey import DurableStore; DurableStore.open({str(path)!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "BlockingIOError" in run.stderr
    DurableStore.open(path).close()


def damage(path: Path, at: int, new: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        file.write(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 6000), "has 6000 bytes, expected"),
        (lambda path: os.truncate(path, 10), "is no store, or its first bytes are damaged; restore a backup"),
        (lambda path: path.write_bytes(b"other" * 2000), "is no store, or its first bytes are damaged"),
        (lambda path: damage(path, 3, b"x"), "is no store, or its first bytes are damaged"),
        (lambda path: damage(path, 4040, b"x"), "is damaged: it does not say how many rows it has; restore a backup"),
        (
            lambda path: damage(path, 4100, b"x"),
            "is damaged: its rows are not those that were written; restore a backup",
        ),
    ],
)
def test_damage_is_seen_and_the_file_left_alone(
    filled: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "store"
    change(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        DurableStore.open(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "has format version 3, this munkey reads versions 1 and 2; install the release that wrote it"),
        ({"columns": [["keys", "load", [2]]]}, "is no store: its description lacks something (KeyError('load'))"),
        ({"room": None}, "is no store: its description lacks something (TypeError("),
        ({"room": 10**9}, "expected"),
    ],
)
def test_a_description_by_somebody_else_is_refused(
    filled: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "store"
    text = path.read_bytes()[:4032].rstrip().rpartition(b" ")[0]
    other = json.dumps({**json.loads(text), **changes}).encode()
    damage(path, 0, (other + b" " + checksum(other)).ljust(4032))
    with pytest.raises(ValueError, match=re.escape(message)):
        DurableStore.open(path)


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at"):
        DurableStore.open(tmp_path / "store")
    with create(tmp_path / "store") as store:
        before = state(store)
        with pytest.raises(ValueError, match=r"a store in a file keeps its dtype, torch\.float32; create one with"):
            store.double()
        for call in (lambda: store.add([1], keys_of([1])), lambda: store.add([70], torch.full((1, 3), torch.nan))):
            with pytest.raises(ValueError):
                call()
        with pytest.raises(KeyError):
            store.forget([1, 99])
        assert state(store) == before
        store.load_state_dict(KeyStore(*WIDTHS).state_dict())
        assert len(store) == 0
    with pytest.raises(FileExistsError, match=r"there is a file .* already; open it, or remove it"):
        create(tmp_path / "store")
    with DurableStore.open(tmp_path / "store") as again:
        assert len(again) == 0


def test_a_file_that_is_cut_while_it_is_open_is_noticed(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    with DurableStore.open(tmp_path / "store") as store:
        before = state(store)
        os.truncate(tmp_path / "store", 4096)
        with pytest.raises(EOFError, match="the file ends before what is to be read"):
            store.forget([min(store)])
        assert state(store) == before


def test_a_description_has_room_in_the_first_block(tmp_path: Path) -> None:
    layout = Layout({"note": "x" * 4000}, ("keys",), ((3,),), (torch.float32,), 1, SECRET)
    disk = Disk()
    file = disk.open(str(tmp_path / "file"), create=True)
    with pytest.raises(ValueError, match="the description of a store must fit into 3999 bytes, found 4"):
        layout.write_header(disk, file)
    assert disk.size(file) == 0
    disk.close(file)


def test_a_relative_path_names_the_same_file_wherever_the_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with create("store") as store:
        monkeypatch.chdir(tmp_path)
        store.add(range(100, 400), keys_of(list(range(100, 400))))  # beyond the room, so that the file is replaced
        store.forget([3])
    assert not (tmp_path / "store").exists()
    with DurableStore.open(tmp_path / "here" / "store") as again:
        assert 3 not in again and 399 in again


def test_nothing_changes_in_the_file_while_the_values_are_those_of_an_average(tmp_path: Path) -> None:
    with create(tmp_path / "store") as store:
        ema = EMA(Holder(store))
        store.attach(ema)
        before, content = state(store), (tmp_path / "store").read_bytes()
        with ema.average():
            for act in (lambda: store.add([77], keys_of([77])), store.compact, store.sync):
                with pytest.raises(ValueError, match="the values are those of an EMA at present"):
                    act()
        assert (tmp_path / "store").read_bytes() == content and state(store) == before
        store.forget([1])
    with DurableStore.open(tmp_path / "store") as again:
        assert 1 not in again and 77 not in again


def full(*_: object) -> list[object]:
    raise MemoryError("full")


def test_rows_that_memory_could_not_take_are_not_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path / "store") as store:
        before = state(store)
        with monkeypatch.context() as patched:
            patched.setattr(Index, "steps", full)
            with pytest.raises(MemoryError):
                store.add([77], keys_of([77]))
        assert state(store) == before
        store.forget([1])
    with DurableStore.open(tmp_path / "store") as again:
        assert 1 not in again and 77 not in again


def test_a_store_whose_memory_fell_behind_its_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path / "store") as store:
        with monkeypatch.context() as patched:
            patched.setattr(Index, "steps", lambda *_: [full])
            with pytest.raises(MemoryError):
                store.compact()
        for act in (lambda: store.forget([1]), store.digest, lambda: list(store), store.state_dict, store.sync):
            with pytest.raises(RuntimeError, match=r"could not be finished, .* with DurableStore.open\("):
                act()
    with DurableStore.open(tmp_path / "store") as again:
        again.forget([1])
        assert 1 not in again and 2 in again

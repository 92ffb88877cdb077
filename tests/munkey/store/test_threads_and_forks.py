"""Threads take turns; a process changes only what it opened itself; no process shares the memory of another."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import torch.multiprocessing  # how a ForkingPickler treats tensors
from classifiers import filled as filled_model
from disks import QuickDisk
from durables import state
from processes import Child, forked, sleeping, together
from stores import SECRET, WIDTHS, Plain, keys_of, store
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from munkey import DurableStore, KeyStore
from munkey.store.log import verify

KINDS = ["memory", "file"]


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Threads interrupt one another as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def made(kind: str, path: Path, ids: list[int]) -> KeyStore:
    found = store() if kind == "memory" else DurableStore.create(path, *WIDTHS, secret=SECRET, disk=QuickDisk())
    found.add(ids, keys_of(ids, 2), torch.tensor(ids))
    return found


def plain(found: KeyStore, ids: list[int], views: int = 2) -> Plain:
    """What a store with these ids holds, values as they are."""
    return Plain(
        {
            i: [
                (key.tolist(), i, value.tolist())
                for key, value in zip(keys_of([i], views)[0], found.get([i]).values, strict=True)
            ]
            for i in ids
        }
    )


# --- threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_that_forget_other_ids_both_do(tmp_path: Path, kind: str, count: int) -> None:
    ids = list(range(count))
    stay = [100, 101, 102]
    for trial in range(40 if kind == "memory" else 15):
        path = tmp_path / str(trial)
        found = made(kind, path, [*ids, *stay])
        before = found.digest()
        one, other = together(lambda s=found: s.forget(ids[0::2]), lambda s=found: s.forget(ids[1::2]))  # type: ignore[misc]
        assert (one.forgotten, other.forgotten) == (tuple(ids[0::2]), tuple(ids[1::2]))
        assert one.rows == other.rows == count
        first, second = (one, other) if one.before == before else (other, one)
        assert (first.before, first.after, second.after) == (before, second.before, found.digest())
        plain(found, stay).check(found)
        if isinstance(found, DurableStore):
            found.close()
            with DurableStore.open(path) as again:
                assert state(again) == state(found)
                again.verify()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_add_forget_and_search_at_once_see_whole_rows(tmp_path: Path, kind: str) -> None:
    old, new, stay = list(range(60)), list(range(200, 260)), [500, 501]
    found = made(kind, tmp_path / "store", [*old, *stay])
    # Its own key is nearest to a key of a length of its own.
    found.replace(stay, torch.eye(3)[:2] * 1e3, torch.tensor(stay))
    rows = found.get(stay)
    going = threading.Event()
    going.set()

    def add() -> None:
        for i in new:
            found.add([i], keys_of([i], 2), torch.tensor([i]))

    def forget() -> None:
        for i in old:
            assert found.forget([i]).forgotten == (i,)

    def change() -> None:
        together(add, forget)
        going.clear()

    def search() -> int:
        seen = 0
        while going.is_set():
            with found.lock:
                near = found.nearest(torch.eye(3)[:2], 1)
                ids, keys, labels = found.described(near.rows.flatten())
            assert near.ids.flatten().tolist() == ids.tolist() == labels.tolist() == stay
            assert torch.equal(keys, rows.keys) and torch.equal(found.get(stay).values, rows.values)
            listed = list(found)
            assert len(listed) == len(set(listed)) and set(stay) <= set(listed)
            seen += 1
        return seen

    _, seen = together(change, search)
    assert seen > 3, "it searched meanwhile"
    assert list(found) == [*new, *stay]
    found.forget(stay)
    plain(found, new).check(found)
    if isinstance(found, DurableStore):
        found.close()
        with DurableStore.open(tmp_path / "store") as again:
            assert state(again) == state(found)


def test_threads_that_forget_beside_a_log_leave_a_log_that_is_whole(tmp_path: Path) -> None:
    ids = list(range(40))
    found = made("memory", tmp_path, ids)
    found.keep_receipts(tmp_path / "log", new=True, disk=QuickDisk())
    together(*(lambda part=ids[n::4]: [found.forget([i]) for i in part] for n in range(4)))  # type: ignore[misc]
    found.close()
    receipts = verify(tmp_path / "log", secret=SECRET).receipts
    assert sorted(i for receipt in receipts for i in receipt.forgotten) == ids and found.used == 0
    assert all(one.after == other.before for one, other in pairwise(receipts))


# --- forks ----------------------------------------------------------------------------------------------------


CHANGES: dict[str, Callable[[DurableStore, Path], object]] = {
    "add": lambda s, _: s.add([70], keys_of([70])),
    "forget": lambda s, _: s.forget([1]),
    "replace": lambda s, _: s.replace([1], keys_of([1])),
    "compact": lambda s, _: s.compact(),
    "sync": lambda s, _: s.sync(),
    "load": lambda s, _: s.load_state_dict(store().state_dict()),
    "log": lambda s, folder: s.keep_receipts(folder / "new", new=True),
}


def refusals(found: KeyStore, folder: Path, changes: dict[str, Callable[[DurableStore, Path], object]]) -> list[str]:
    """What a process says to each change, and what it reads."""
    said = []
    for change in changes.values():
        try:
            change(found, folder)  # type: ignore[arg-type]
            said.append("done")
        except RuntimeError as error:
            said.append(str(error))
    return [*said, str((state(found), found.nearest(keys_of([2])[0], 1).ids.tolist()))]


def test_a_forked_process_reads_and_is_refused_every_change_of_a_file(tmp_path: Path) -> None:
    with made("file", tmp_path / "store", list(range(9))) as found:  # type: ignore[attr-defined]
        content, before = (tmp_path / "store").read_bytes(), state(found)
        *said, read = forked(lambda: refusals(found, tmp_path, CHANGES))
        assert len(said) == len(CHANGES) and all("was opened by process" in one for one in said), said
        assert read == str((before, found.nearest(keys_of([2])[0], 1).ids.tolist()))
        assert (tmp_path / "store").read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["store"]
        found.forget([3])
        found.add([80], keys_of([80]))
        after = state(found)
    with DurableStore.open(tmp_path / "store") as again:
        assert state(again) == after
        again.verify()


def test_a_forked_process_does_not_write_to_a_log(tmp_path: Path) -> None:
    found = made("memory", tmp_path, list(range(9)))
    found.keep_receipts(tmp_path / "log", new=True)
    found.forget([0])
    content = (tmp_path / "log").read_bytes()
    back: dict[str, Callable[[DurableStore, Path], object]] = {"back": lambda s, _: s.add([0], keys_of([0], 2))}
    *said, _ = forked(lambda: refusals(found, tmp_path, {"forget": CHANGES["forget"], **back}))
    assert all("was opened by process" in one for one in said), said
    assert (tmp_path / "log").read_bytes() == content
    found.forget([1])
    assert len(verify(tmp_path / "log", secret=SECRET).events) == 2


def closed_in_a_child(found: KeyStore) -> str:
    found.close()
    del found
    gc.collect()
    return "closed"


def test_a_forked_process_that_closes_a_store_does_not_give_its_lock_away(tmp_path: Path) -> None:
    found = made("file", tmp_path / "store", [1, 2])
    found.keep_receipts(tmp_path / "log", new=True)
    assert forked(lambda: closed_in_a_child(found)) == "closed"
    with pytest.raises(BlockingIOError, match="is open in another store"):
        DurableStore.open(tmp_path / "store", receipts=False)
    with pytest.raises(BlockingIOError, match="another store writes to the log"):
        store().keep_receipts(tmp_path / "log")
    found.forget([1])
    found.close()
    with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log") as again:
        assert list(again) == [2]


@pytest.mark.parametrize("how", ["close", "drop"])
def test_locks_are_given_back_though_a_forked_process_lives(tmp_path: Path, how: str) -> None:
    found: KeyStore | None = made("file", tmp_path / "store", [1, 2])
    assert found is not None
    found.keep_receipts(tmp_path / "log", new=True)
    with sleeping() as child:
        if how == "close":
            found.close()
        found = None
        gc.collect()
        with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log") as again:
            again.forget([1])
            again.compact()  # the file is replaced, and the other process has the old one
        with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log") as again:
            assert list(again) == [2]
        child.go()
        child.result()


def test_a_store_to_which_nothing_refers_gives_its_locks_back(tmp_path: Path) -> None:
    found = made("file", tmp_path / "store", [1, 2])
    found.keep_receipts(tmp_path / "log", new=True)
    found.nearest(keys_of([1])[0], 1)
    found.attach(torch.optim.SGD(found.parameters(), lr=1.0, momentum=0.5))
    found.read(torch.tensor([0])).sum().backward()
    found.forget([1])
    del found
    gc.collect()
    with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log") as again:
        assert list(again) == [2]


def test_a_lock_that_another_thread_holds_does_not_stop_a_forked_process() -> None:
    found = made("memory", Path(), [1, 2])
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with found.lock:
            held.set()
            enough.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        assert forked(lambda: found.forget([1]).forgotten) == (1,)
    finally:
        enough.set()
        thread.join()
    assert list(found) == [1, 2]


def test_a_thread_that_holds_the_lock_holds_it_in_the_process_that_it_forks() -> None:
    found = made("memory", Path(), [1, 2])

    def leave() -> list[int]:
        forgotten = found.forget([1]).forgotten
        found.lock.__exit__()  # as the end of its `with` does
        with found.lock:
            return [*forgotten, *found]

    with found.lock:
        assert forked(leave) == [1, 2]
    assert together(lambda: list(found)) == [[1, 2]]


class Keys(Dataset[Tensor]):
    def __init__(self, rows: KeyStore) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, instance: int) -> Tensor:
        near = self.rows.nearest(self.rows.get([instance]).keys, 1)
        assert near.ids.shape == (2, 1)
        return self.rows.get([instance]).keys


@pytest.mark.parametrize("kind", KINDS)
def test_workers_of_a_data_loader_read_a_store(tmp_path: Path, kind: str) -> None:
    ids = list(range(10))
    found = made(kind, tmp_path / "store", ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that PyTorch may have started
        loader = DataLoader(Keys(found), batch_size=5, num_workers=2, multiprocessing_context="fork")
        keys = torch.cat(list(loader))
    assert torch.equal(keys, keys_of(ids, 2))
    found.forget([3])
    if isinstance(found, DurableStore):
        found.close()
        with DurableStore.open(tmp_path / "store") as again:
            assert state(again) == state(found)


# --- copies ---------------------------------------------------------------------------------------------------


def test_the_memory_of_a_store_is_not_shared(tmp_path: Path) -> None:
    found, model = made("memory", tmp_path, [1, 2]), filled_model()
    before = state(found), state(model.memory.store)
    for each in (found, model):
        with pytest.raises(ValueError, match=r"cannot share its memory with other processes.*copy.deepcopy, pickle"):
            each.share_memory()
    assert (state(found), state(model.memory.store)) == before
    for each in (found, model.memory.store):
        assert not any(column.is_shared() for column in each.columns)
        each.forget([1])
        assert 1 not in each


COPIES: dict[str, Callable[[KeyStore], KeyStore]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
    "multiprocessing": lambda found: pickle.loads(ForkingPickler.dumps(found)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_does_not_change_with_the_original(how: str) -> None:
    found = made("memory", Path(), list(range(6)))
    other = COPIES[how](found)
    before = state(found)
    assert state(other) == before and other.secret == found.secret
    found.forget([0, 1])
    with torch.no_grad():
        found.values.fill_(7)
    assert state(other) == before
    other.add([50], keys_of([50], 2), torch.tensor([50]))
    other.forget([2, 3])
    plain(other, [0, 1, 4, 5, 50]).check(other)
    assert list(found) == [2, 3, 4, 5] and 50 not in found
    assert all(one.data_ptr() != two.data_ptr() for one, two in zip(found.columns, other.columns, strict=True))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_does_not_change_with_the_original(how: str) -> None:
    model = filled_model()
    other = COPIES[how](model)  # type: ignore[arg-type]
    before = state(other.memory.store)  # type: ignore[union-attr]
    assert before == state(model.memory.store)
    model.forget([3])
    assert state(other.memory.store) == before  # type: ignore[union-attr]


def test_a_store_that_another_process_is_sent_is_a_copy() -> None:
    found = made("memory", Path(), list(range(6)))
    sent = bytes(ForkingPickler.dumps(found))

    def change(wait: Callable[[], None]) -> tuple[object, object]:
        other = pickle.loads(sent)
        wait()  # until the original has changed
        before = state(other)
        other.forget([4])
        return before, list(other)

    before = state(found)
    with Child(change) as child:
        found.forget([0, 1])
        child.go()
        assert child.result() == (before, [0, 1, 2, 3, 5])
    assert list(found) == [2, 3, 4, 5]

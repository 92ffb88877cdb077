"""Receipts and their log: nobody comes back from a backup, and no line can be changed unseen."""

from __future__ import annotations

import copy
import errno
import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from disks import FailingDisk, Killed, MemoryDisk
from hypothesis import HealthCheck, given, settings
from stores import SECRET, WIDTHS, keys_of, store

from munkey import DurableStore, KeyStore, Receipt
from munkey.store.log import ReceiptLog, verify


def filled(path: Path) -> KeyStore:
    found = store()
    found.add(range(6), keys_of(list(range(6)), 2))
    found.keep_receipts(path, new=True)
    return found


def test_a_receipt_is_json_and_back() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    receipt = found.forget([2, 9], missing="ignore")
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert (receipt.forgotten, receipt.absent, receipt.rows) == ((2,), (9,), 1)
    for text in ("[]", "{}", "no", '{"forgotten": 1, "absent": 2}'):
        with pytest.raises(ValueError, match="this is no receipt"):
            Receipt.from_json(text)


def test_a_log_holds_what_was_forgotten(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    receipts = [found.forget([1, 2]), found.forget([4])]
    found.forget([])
    checked = verify(tmp_path / "log", secret=SECRET)
    assert checked.receipts == receipts and found.log is not None and checked.head == found.log.head
    assert [len(event["tokens"]) for event in checked.events] == [4, 2]
    assert verify(tmp_path / "log").head == checked.head, "an auditor needs no secret"


def test_whom_a_closed_log_cannot_note_does_not_come_back(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    found.forget([3])
    before = found.digest()
    found.close()
    with pytest.raises(ValueError, match=re.escape("is closed; open it again")):
        found.add([3], keys_of([3]))
    assert 3 not in found and found.digest() == before


def test_a_store_that_was_closed_gives_its_log_to_another(tmp_path: Path) -> None:
    found, other = filled(tmp_path / "log"), store()
    found.close()
    found.close()
    other.keep_receipts(tmp_path / "log")
    other.close()
    with pytest.raises(ValueError, match=re.escape("is closed; open it again")):
        found.forget([2])
    found.keep_receipts(tmp_path / "log")
    assert found.forget([2]).forgotten == (2,)


def test_a_candidate_cannot_be_found_in_a_log_without_the_secret(tmp_path: Path) -> None:
    texts = []
    for number, secret in enumerate((b"a", b"b")):
        found = KeyStore(*WIDTHS, secret=secret)
        found.add([1], keys_of([1]))
        found.keep_receipts(tmp_path / str(number), new=True)
        found.forget([1])
        texts.append(verify(tmp_path / str(number)).events[0])
    assert texts[0]["tokens"] != texts[1]["tokens"]
    for place in ("before", "after"):
        assert texts[0]["receipt"][place] != texts[1]["receipt"][place]


STEPS = st.lists(
    st.tuples(st.sampled_from(["forget", "add", "backup"]), st.lists(st.integers(0, 7), unique=True, max_size=4)),
    max_size=9,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_a_backup_and_the_log_are_the_store_but_for_what_came_since(
    tmp_path: Path, steps: list[tuple[str, list[int]]]
) -> None:
    (tmp_path / "log").unlink(missing_ok=True)
    found = filled(tmp_path / "log")
    backups = [found.state_dict()]
    for action, ids in steps:
        if action == "forget":
            found.forget(ids, missing="ignore")
        elif action == "add":
            new = [i for i in ids if i not in found]
            found.add(new, keys_of(new, 2))
        else:
            backups.append(found.state_dict())
    assert found.log is not None
    found.log.close()
    for backup in backups:
        restored = store()
        restored.load_state_dict(backup)
        held = set(restored)
        receipt = restored.keep_receipts(tmp_path / "log")
        # With the same keys, whoever is in the backup and was added again may stay.
        assert set(restored) == held & set(found) and set(receipt.forgotten) == held - set(found)
        size = (tmp_path / "log").stat().st_size
        restored.log.close()  # type: ignore[union-attr]
        assert (tmp_path / "log").stat().st_size == size, "what is forgotten again is not logged again"


def test_another_key_under_an_old_id_is_another_instance(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    backup = found.state_dict()
    found.forget([3])
    found.add([3], keys_of([3], salt=5))
    new = found.state_dict()
    found.close()
    for state, there in ((backup, False), (new, True)):
        restored = store()
        restored.load_state_dict(state)
        restored.keep_receipts(tmp_path / "log")
        restored.close()
        assert (3 in restored) == there


def test_another_label_of_an_old_key_is_another_instance(tmp_path: Path) -> None:
    found = store()
    found.add([3], keys_of([3]), torch.tensor([1]))
    found.keep_receipts(tmp_path / "log", new=True)
    backup = found.state_dict()
    found.replace([3], keys_of([3]), torch.tensor([2]))
    found.close()
    restored = store()
    restored.load_state_dict(backup)
    restored.keep_receipts(tmp_path / "log")
    assert 3 not in restored


def test_another_dtype_does_not_bring_anyone_back(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    backup = found.state_dict()
    found.double().forget([3])
    found.close()
    restored = store()
    restored.load_state_dict(backup)
    assert restored.keep_receipts(tmp_path / "log").forgotten == (3,)


def test_a_state_that_is_loaded_beside_a_log_is_forgotten_again(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    backup = found.state_dict()
    found.forget([3])
    found.load_state_dict(backup)
    assert 3 not in found and len(found) == 5


def test_only_one_store_writes_to_a_log(tmp_path: Path) -> None:
    found = filled(tmp_path / "log")
    with pytest.raises(BlockingIOError, match=r"another store writes to the log .*; close it there first"):
        store().keep_receipts(tmp_path / "log")
    other = copy.deepcopy(found)
    assert other.log is None
    other.forget([1])
    found.forget([2])
    assert [event["receipt"]["forgotten"] for event in verify(tmp_path / "log", secret=SECRET).events] == [[2]]
    with pytest.raises(TypeError, match="an open log cannot be pickled; close it, and give the other store its path"):
        pickle.dumps(found)
    found.keep_receipts(tmp_path / "log")  # again, or another one: the first is closed
    found.keep_receipts(tmp_path / "second", new=True)
    store().keep_receipts(tmp_path / "log")


def test_who_cannot_be_logged_to_be_back_is_not(tmp_path: Path) -> None:
    disk = FailingDisk()
    found = store()
    found.add([3, 4], keys_of([3, 4]))
    found.keep_receipts(tmp_path / "log", disk=disk, new=True)
    found.forget([3])
    before = found.digest()
    disk.at, disk.error = disk.steps, OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        found.add([3], keys_of([3]))
    assert 3 not in found and found.digest() == before


def test_a_log_survives_a_loss_of_power() -> None:
    ids = list(range(28))
    for at in range(30):
        disk = MemoryDisk()
        found = store()
        found.add(ids, keys_of(ids))
        found.keep_receipts("log", disk=disk, new=True)
        found.forget([0, 1])
        disk.at = disk.steps + at
        try:
            found.forget(ids[2:])  # a line of several sectors
            done = True
        except Killed:
            done = False
        for seed in range(10):
            events = verify("log", disk=copy.deepcopy(disk).after_power_loss(random.Random(seed))).events
            assert len(events) == 2 if done else len(events) in (1, 2)
        if done:
            break
    assert at > 2


def test_a_restored_file_forgets_again_before_it_answers(tmp_path: Path) -> None:
    path, log = tmp_path / "store", tmp_path / "log"
    with DurableStore.create(path, *WIDTHS, secret=SECRET) as found:
        found.add([1, 2, 3], keys_of([1, 2, 3]))
    shutil.copy(path, tmp_path / "backup")
    with DurableStore.open(path, receipts=log, new_log=True) as found:
        found.forget([2])
    shutil.copy(tmp_path / "backup", path)
    with DurableStore.open(path, receipts=log) as found:
        assert list(found) == [1, 3]
    with DurableStore.open(path, receipts=False) as found:
        assert list(found) == [1, 3], "it is gone from the file"


def test_killed_between_any_two_steps_of_forgetting_and_logging(tmp_path: Path) -> None:
    """Whatever the moment: the instance is there and not logged, or it goes when the store is opened with its log."""
    at, done = 0, False
    while not done:
        folder = tmp_path / str(at)
        folder.mkdir()
        with DurableStore.create(folder / "store", *WIDTHS, secret=SECRET) as found:
            found.add([1, 2, 3], keys_of([1, 2, 3]))
        disk = FailingDisk()
        found = DurableStore.open(folder / "store", receipts=folder / "log", new_log=True, disk=disk)
        disk.at = disk.steps + at
        try:
            found.forget([2])
            done = True
        except Killed:
            pass
        disk.die()
        with DurableStore.open(folder / "store", receipts=folder / "log") as found:
            logged = bool(verify(folder / "log").events)
            assert (2 in found) == (not logged) and (logged or not done)
        at += 1
    assert at > 8


# --- damage ---------------------------------------------------------------------------------------------------


def changed(path: Path, number: int, change: Callable[[dict[str, object]], object]) -> None:
    lines = path.read_text().splitlines()
    entry = json.loads(lines[number])
    change(entry)
    lines[number] = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: changed(p, 1, lambda e: e["event"].update(tokens=[])),
            "line 2 of .* was changed, or lines before it are",
        ),
        (lambda p: changed(p, 0, lambda e: e.update(chain="0" * 64)), "line 1 of .* was changed"),
        (lambda p: changed(p, 1, lambda e: e.update(more=1)), "line 2 of .* was changed"),
        (
            lambda p: changed(p, 2, lambda e: e.update(seal="0" * 64)),
            "line 3 of .* was not written with the secret of this",
        ),
        (
            lambda p: p.write_text("\n".join(p.read_text().splitlines()[1:]) + "\n"),
            "line 1 of .* was changed, or lines",
        ),
        (
            lambda p: p.write_text(p.read_text() + "{}\n"),
            "line 4 of .* is no entry of a log; restore the log from a backup",
        ),
        (lambda p: p.write_bytes(b"\x00\xff\n"), "line 1 of .* is no entry of a log"),
    ],
)
def test_a_changed_line_is_named(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "log"
    found = filled(path)
    for instance in range(3):
        found.forget([instance])
    found.close()
    change(path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        verify(path, secret=SECRET)
    other = store()
    with pytest.raises(ValueError, match=message):
        other.keep_receipts(path)
    assert other.log is None and path.read_bytes() == content


def test_a_line_that_was_interrupted_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    found = filled(path)
    found.forget([1])
    found.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"chain":"12')
    assert len(verify(path).events) == 1
    log = ReceiptLog(path, SECRET)
    assert path.read_bytes() == whole and log.gone
    log.close()


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no log at"):
        verify(tmp_path / "log")
    found = filled(tmp_path / "log")
    found.forget([1])
    found.close()
    other = KeyStore(*WIDTHS, secret=b"another")
    with pytest.raises(ValueError, match=r"line 1 of .* was not written with the secret of this store"):
        other.keep_receipts(tmp_path / "log")
    with pytest.raises(ValueError, match=re.escape("is closed; open it again")):
        found.forget([2])
    assert 2 in found, "what cannot be logged is not forgotten"
    stays = store()
    stays.add([2], keys_of([2]), permanent=True)
    with ReceiptLog(tmp_path / "log", SECRET) as log:
        assert torch.tensor(len(log.gone)) == 2

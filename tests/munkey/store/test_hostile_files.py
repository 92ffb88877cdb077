"""Files that are damaged, of another kind, or written by somebody who means harm: an error, and nothing is changed."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classifiers import filled as filled_model
from disks import QuickDisk
from durables import create, state
from stores import SECRET, WIDTHS, keys_of, store
from torch import Tensor

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, ShardedKeyStore
from munkey.store.digest import checksum, hash_rows, sum_of
from munkey.store.file.journal import Note, note_bytes
from munkey.store.file.layout import BLOCK, STATE, Layout, State
from munkey.store.log import ReceiptLog, verify
from munkey.store.schema import COLUMNS


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(
    act: Callable[[], object], folder: Path, match: str | None = None, kind: type[Exception] = ValueError
) -> None:
    before = all_bytes(folder)
    with pytest.raises(kind, match=match):
        act()
    assert all_bytes(folder) == before


def flipped(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)


# --- logs -----------------------------------------------------------------------------------------------------


def logged(path: Path, count: int = 2) -> bytes:
    found = store()
    found.add(range(4), keys_of(list(range(4))))
    found.keep_receipts(path, new=True)
    for instance in range(count):
        found.forget([instance])
    found.close()
    return path.read_bytes()


def test_a_log_that_is_not_there_is_not_begun_unless_that_is_said(tmp_path: Path) -> None:
    create(tmp_path / "store").close()
    filled_model().save(tmp_path / "model")
    wrong = tmp_path / "lgo"
    for act in (
        lambda: store().keep_receipts(wrong),
        lambda: ShardedKeyStore(*WIDTHS, secret=SECRET).keep_receipts(wrong),
        lambda: DurableStore.open(tmp_path / "store", receipts=wrong),
        lambda: DurableStore.open(tmp_path / "store", receipts=""),
        lambda: KeyMemoryTransformer.load(tmp_path / "model", receipts=wrong),
        lambda: KeyMemoryTransformer.load(tmp_path / "model", receipts=""),
    ):
        refused(act, tmp_path, "no log at .*new=True", FileNotFoundError)


NO_LOGS: dict[str, bytes] = {
    "JSON": b'{"a": 1}',
    "JSON with a newline": b'{"a": 1}\n',
    "JSON that begins as a line does": b'{"chain":"abc"}',
    "JSON that goes on as a line does": b'{"chain":"' + b"0" * 64 + b'","even":1}',
    "text": b"name,value",
    "text with newlines": b"name,value\n1,2\n",
    "a CR first": b'\r{"chain":"',
    "binary": bytes(range(256)),
    "zeros and then text": bytes(2) + b"hello",
    "zeros and then text in the next sector": bytes(100) + b"x" * 1000,
    "a newline": b"\n",
}


@pytest.mark.parametrize("what", NO_LOGS)
def test_what_is_no_log_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    (tmp_path / "log").write_bytes(NO_LOGS[what])
    for act in (
        lambda: store().keep_receipts(tmp_path / "log"),
        lambda: store().keep_receipts(tmp_path / "log", new=True),
        lambda: ReceiptLog(tmp_path / "log", SECRET),
        lambda: verify(tmp_path / "log"),
    ):
        refused(act, tmp_path, "line 1 of .* is no entry of a log")


def test_a_saved_model_or_store_is_no_log(tmp_path: Path) -> None:
    filled_model().save(tmp_path / "model")
    create(tmp_path / "store").close()
    for name in ("model", "store"):
        refused(lambda name=name: store().keep_receipts(tmp_path / name), tmp_path, "is no entry of a log")  # type: ignore[misc]


def check_damaged(path: Path, data: bytes, whole: int) -> None:
    """A log with one fault: an error that names a line, here and where it is opened to be written to."""
    path.write_bytes(data)
    for act in (lambda: verify(path, secret=SECRET), lambda: ReceiptLog(path, SECRET)):
        with pytest.raises(ValueError, match=r"line \d+ of "):
            act()
    assert path.read_bytes() == data and whole


def test_a_byte_of_a_log_that_becomes_a_line_end_is_seen(tmp_path: Path) -> None:
    data = logged(tmp_path / "log")
    for end in (b"\r", b"\n", b"\0"):
        for at in range({b"\r": 0, b"\n": 1, b"\0": 2}[end], len(data), 1 if end == b"\r" else 3):
            if data[at : at + 1] != end:
                check_damaged(tmp_path / "log", data[:at] + end + data[at + 1 :], 2)


def test_a_bit_of_a_log_that_is_flipped_is_seen(tmp_path: Path) -> None:
    data = logged(tmp_path / "log", 1)
    for bit in range(8 * len(data)):
        check_damaged(tmp_path / "log", flipped(data, bit), 1)


def test_a_log_that_was_cut_is_read_up_to_there_and_changed_only_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = logged(path)
    first = data.index(b"\n") + 1
    for size in [*range(0, 100), *range(first - 20, first + 100), *range(len(data) - 20, len(data) + 1)]:
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        assert len(verify(path, secret=SECRET).events) == whole and path.read_bytes() == data[:size]
        with ReceiptLog(path, SECRET):
            pass
        assert path.read_bytes() == data[: data[:size].rfind(b"\n") + 1], "only what is no whole line is cut off"


# --- folders --------------------------------------------------------------------------------------------------


def saved(folder: Path) -> ShardedKeyStore:
    rows = ShardedKeyStore(*WIDTHS, secret=SECRET)
    rows.add(range(6), keys_of(list(range(6))))
    rows.save(folder)
    return rows


def loaded_or_refused(folder: Path, digest: str) -> bool:
    before = all_bytes(folder)
    try:
        assert ShardedKeyStore.load(folder).digest() == digest
        loaded = True
    except (ValueError, OSError):
        loaded = False
    assert all_bytes(folder) == before
    return loaded


def test_a_bit_of_a_manifest_that_is_flipped_changes_nothing(tmp_path: Path) -> None:
    rows = saved(tmp_path)
    path, digest = tmp_path / "manifest.json", rows.digest()
    rows.forget([1])
    rows.save(tmp_path)  # so that a name stands under 'replaces'
    digest, data = rows.digest(), path.read_bytes()
    loaded = 0
    for bit in random.Random(0).sample(range(8 * len(data)), 1500):
        path.write_bytes(flipped(data, bit))
        loaded += loaded_or_refused(tmp_path, digest)
    assert loaded < 20, "but for white space, it is refused"
    path.write_bytes(data)
    assert loaded_or_refused(tmp_path, digest)


@pytest.mark.parametrize("what", ["older manifest", "no rows", "no manifest", "no model"])
def test_a_folder_that_lacks_something_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    model = filled_model()
    model.memory.store = ShardedKeyStore.of(model.memory.store)  # type: ignore[assignment]
    model.save(tmp_path)
    older = (tmp_path / "manifest.json").read_bytes()
    model.forget([1])
    with torch.no_grad():
        model.memory.null.add_(1)
    model.save(tmp_path)
    if what == "older manifest":
        (tmp_path / "manifest.json").write_bytes(older)
    else:
        kind = {"no rows": "rows-*", "no manifest": "manifest.json", "no model": "model-*"}[what]
        next(iter(tmp_path.glob(kind))).unlink()
    for load in (ShardedKeyStore.load, KeyMemoryTransformer.load):
        refused(lambda load=load: load(tmp_path), tmp_path, None, FileNotFoundError)  # type: ignore[misc]


# --- live files -----------------------------------------------------------------------------------------------

Changed = Callable[[dict[str, Tensor]], object]
ABOUT = {"seed": 0, "scale": 0.02, "trained": True}


def written(
    path: Path,
    change: Changed = lambda _: None,
    *,
    count: int | None = None,
    note: bytes = b"",
    tail: int = 8,  # so that a store that opens it has something to overwrite
    **settings: object,
) -> None:
    """Write a file with right checksums, tags and hashes, whatever is in it."""
    source = store()
    source.add([3, 5, 7], keys_of([3, 5, 7], 2), torch.tensor([0, 1, 2]))
    columns = {name: column[:6].detach().clone() for name, column in zip(COLUMNS, source.columns, strict=True)}
    change(columns)
    names = tuple(columns)
    shapes, dtypes = tuple(tuple(c.shape[1:]) for c in columns.values()), tuple(c.dtype for c in columns.values())
    layout = Layout(ABOUT, names, shapes, dtypes, 8, SECRET)
    disk, hashes = QuickDisk(), hash_rows(SECRET, list(columns.values()))
    described = {
        "format": 2,
        "room": 8,
        "columns": [[n, str(d).removeprefix("torch."), list(s)] for n, d, s in zip(names, dtypes, shapes, strict=True)],
        "about": {**ABOUT, "secret": SECRET.hex()},
    }
    described["about"] = {**described["about"], **settings.pop("about", {})}  # type: ignore[dict-item]
    text = json.dumps({**described, **settings}).encode()
    file = disk.open(str(path), create=True)
    disk.resize(file, layout.size)
    disk.write(file, 0, (text + b" " + checksum(text)).ljust(STATE))
    disk.write(file, BLOCK, layout.records(list(columns.values()), hashes).tobytes())
    disk.write(file, STATE, State(6 if count is None else count, sum_of(hashes), tail).to_bytes())
    if note:
        disk.write(file, layout.size, note_bytes(note))
    disk.close(file)


def test_a_file_that_is_written_that_way_opens(tmp_path: Path) -> None:
    """Or what the next tests refuse might be refused for another reason."""
    written(tmp_path / "store")
    with DurableStore.open(tmp_path / "store") as found:
        assert list(found) == [3, 5, 7]
        found.forget([5])
        assert 5 not in found.nearest(keys_of([5])[0], 4).ids


CONTENT: dict[str, Changed] = {
    "an id twice": lambda c: c["ids"].__setitem__(2, 3),
    "a view twice": lambda c: c["views"].__setitem__(1, 0),
    "a view left out": lambda c: c["views"].__setitem__(1, 2),
    "a negative view": lambda c: c["views"].__setitem__(0, -1),
    "a NaN key": lambda c: c["keys"].__setitem__((1, 1), math.nan),
    "an infinite value": lambda c: c["values"].__setitem__((5, 0), math.inf),
    "a label below -1": lambda c: c["labels"].__setitem__(3, -2),
    "a truth value of 2": lambda c: c["permanent"].view(torch.uint8).__setitem__(3, 2),
    "a column less": lambda c: c.pop("labels"),
    "a column more": lambda c: c.update(more=torch.zeros(6)),
    "a column of another name": lambda c: c.update(other=c.pop("values")),
    "columns in another order": lambda c: c.update(ids=c.pop("ids")),
    "keys of whole numbers": lambda c: c.update(keys=c["keys"].long()),
    "keys without a width": lambda c: c.update(keys=c["keys"][:, 0]),
    "keys of width 0": lambda c: c.update(keys=c["keys"][:, :0]),
    "keys of two dimensions": lambda c: c.update(keys=c["keys"][:, None]),
    "values of another dtype": lambda c: c.update(values=c["values"].double()),
    "ids that are no whole numbers": lambda c: c.update(ids=c["ids"].double()),
}


@pytest.mark.parametrize("what", CONTENT)
@pytest.mark.parametrize("read_only", [False, True])
def test_rows_that_a_store_cannot_have_are_refused_although_their_checksums_are_right(
    tmp_path: Path, what: str, read_only: bool
) -> None:
    written(tmp_path / "store", CONTENT[what])
    refused(lambda: DurableStore.open(tmp_path / "store", read_only=read_only), tmp_path, "is no store that this lib")


SETTINGS: dict[str, dict[str, object]] = {
    "room of 2**60": {"room": 2**60},
    "room of 2**47": {"room": 2**47},
    "negative room": {"room": -1},
    "room below the rows": {"room": 5},
    "room as text": {"room": "8"},
    "negative sizes": {"columns": [[name, "int64", [-1]] for name in COLUMNS]},
    "sizes that are no numbers": {"columns": [[name, "int64", ["x"]] for name in COLUMNS]},
    "no columns": {"columns": []},
    "columns that are none": {"columns": 7},
    "an empty secret": {"about": {"secret": ""}},
    "a long secret": {"about": {"secret": "00" * 65}},
    "a secret that is none": {"about": {"secret": "xy"}},
    "a seed as text": {"about": {"seed": "0"}},
    "a scale that is NaN": {"about": {"scale": math.nan}},
    "training as a number": {"about": {"trained": 1}},
    "another format": {"format": 3},
    "a format that is true": {"format": True},
    "more rows than places": {"count": 9},
    "rows that are not there": {"count": 7},
    "rows that are left out": {"count": 5},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_a_description_that_no_store_has_is_refused_although_its_checksum_is_right(tmp_path: Path, what: str) -> None:
    written(tmp_path / "store", **SETTINGS[what])  # type: ignore[arg-type]
    refused(lambda: DurableStore.open(tmp_path / "store"), tmp_path)


def test_a_description_that_is_deeply_nested_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "store")
    text = b"[" * 3900
    with open(tmp_path / "store", "r+b") as file:
        file.write((text + b" " + checksum(text)).ljust(STATE))
    refused(lambda: DurableStore.open(tmp_path / "store"), tmp_path)


HERE = State(6, 0, 6)  # the total is put in
NOTES: dict[str, object] = {
    "no note": [1],
    "nothing in it": {},
    "a hole far away": Note("erase", HERE, replace(HERE, count=5), [10**9], [5]),
    "a negative hole": Note("erase", HERE, replace(HERE, count=5), [-1], [5]),
    "a mover that stays": Note("erase", HERE, replace(HERE, count=5), [0], [1]),
    "more holes than movers": Note("erase", HERE, replace(HERE, count=5), [0, 1], [5]),
    "a hole twice": Note("erase", HERE, replace(HERE, count=4), [0, 0], [4, 5]),
    "rows that go and are more afterwards": Note("erase", HERE, replace(HERE, count=7)),
    "rows that come and are fewer afterwards": Note("append", HERE, replace(HERE, count=2)),
    "a tail beyond the room": Note("erase", HERE, replace(HERE, count=5, tail=100)),
    "a count as text": Note("erase", HERE, replace(HERE, count="5")),  # type: ignore[arg-type]
    "holes that are a number": Note("erase", HERE, replace(HERE, count=5), 7, 7),  # type: ignore[arg-type]
    "another change": Note("zero", HERE, replace(HERE, count=5)),
}


@pytest.mark.parametrize("what", NOTES)
def test_a_note_of_a_change_that_cannot_be_is_refused_although_its_checksum_is_right(tmp_path: Path, what: str) -> None:
    written(tmp_path / "plain")
    with open(tmp_path / "plain", "rb") as file:
        total = State.from_bytes(file.read(BLOCK)[STATE:]).total  # type: ignore[union-attr]
    note = NOTES[what]
    if isinstance(note, Note):
        here = replace(note.before, total=total)
        text = replace(note, before=here, after=replace(note.after, total=total)).to_json()
    else:
        text = json.dumps(note).encode()
    written(tmp_path / "store", note=text)
    refused(lambda: DurableStore.open(tmp_path / "store"), tmp_path, "is damaged: the note of its last change")


@pytest.mark.parametrize("place", ["description", "state", "note of an erasure", "note of an addition"])
def test_a_bit_of_the_first_block_or_the_note_that_is_flipped_is_seen_or_does_no_harm(
    tmp_path: Path, place: str
) -> None:
    """As a killed process leaves the file: with the note of the last change behind the records."""
    path, quick = tmp_path / "store", QuickDisk()
    with DurableStore.create(tmp_path / "live", *WIDTHS, secret=SECRET, disk=quick) as found:
        found.add(range(20), keys_of(list(range(20))))
        if place != "note of an addition":
            found.forget([2, 19])
        data, right = (tmp_path / "live").read_bytes(), state(found)
        size = found.live.layout.size
    assert len(data) > size + 40
    text = len(data[:STATE].rstrip())
    first, stop = {"description": (0, STATE), "state": (STATE, BLOCK)}.get(place, (size, len(data)))
    bits = list(range(8 * first, 8 * stop))
    if place == "description":  # white space behind it, now and then
        bits = [bit for bit in bits if bit < 8 * text or bit % 97 == 0]
    bits = sorted(random.Random(0).sample(bits, min(len(bits), 400)))
    opened, left = 0, path.with_name("store.munkey-old")
    for bit in bits:
        path.write_bytes(flipped(data, bit))
        left.write_bytes(b"left")
        before = all_bytes(tmp_path)
        try:
            with DurableStore.open(path, disk=quick) as found:
                assert state(found) == right
                opened += 1
            assert not left.exists()
        except ValueError:
            assert all_bytes(tmp_path) == before
    assert opened < len(bits) if place == "description" else opened


def test_a_store_that_was_killed_after_it_was_given_a_log_is_not_opened_without_it(tmp_path: Path) -> None:
    """Although the note behind the records is from before it had one."""
    for late in (False, True):
        path, log = tmp_path / f"store {late}", tmp_path / f"log {late}"
        found = create(path)
        found.forget([1])
        found.keep_receipts(log, new=True)
        if late:
            found.forget([2])
        shutil.copy(path, tmp_path / "killed")
        found.close()
        refused(lambda: DurableStore.open(tmp_path / "killed"), tmp_path, "keeps a log of receipts")
        for _ in range(2):  # opening it does not lose the mark either
            DurableStore.open(tmp_path / "killed", receipts=False).close()
            refused(lambda: DurableStore.open(tmp_path / "killed"), tmp_path, "keeps a log of receipts")


def test_a_store_that_kept_a_log_is_not_opened_without_it(tmp_path: Path) -> None:
    with create(tmp_path / "store") as found:
        found.keep_receipts(tmp_path / "log", new=True)
        found.forget([3])
        found.compact()
        found.sync()
        held = state(found)
    for read_only in (False, True):
        refused(
            lambda: DurableStore.open(tmp_path / "store", read_only=read_only),  # noqa: B023
            tmp_path,
            "keeps a log of receipts, without which a restored backup brings forgotten instances back",
        )
        for receipts in (False, tmp_path / "log"):
            with DurableStore.open(tmp_path / "store", receipts=receipts, read_only=read_only) as found:  # type: ignore[arg-type]
                assert state(found) == held


@pytest.mark.parametrize("folder", [False, True])
def test_a_model_that_was_saved_beside_a_log_is_not_loaded_without_it(tmp_path: Path, folder: bool) -> None:
    model = filled_model()
    if folder:
        model.memory.store = ShardedKeyStore.of(model.memory.store)  # type: ignore[assignment]
    model.save(tmp_path / "before")
    model.memory.store.keep_receipts(tmp_path / "log", new=True)
    model.save(tmp_path / "backup")
    model.forget([3])
    model.memory.store.close()
    assert 3 in KeyMemoryTransformer.load(tmp_path / "before").memory.store
    refused(lambda: KeyMemoryTransformer.load(tmp_path / "backup"), tmp_path, "was saved beside a log of receipts")
    assert 3 in KeyMemoryTransformer.load(tmp_path / "backup", receipts=False).memory.store
    found = KeyMemoryTransformer.load(tmp_path / "backup", receipts=tmp_path / "log")
    assert 3 not in found.memory.store and 4 in found.memory.store
    found.memory.store.close()


# --- saved models ---------------------------------------------------------------------------------------------


def test_a_bit_of_the_header_of_a_model_that_is_flipped_is_seen(tmp_path: Path) -> None:
    path, model = tmp_path / "model", filled_model()
    model.save(path)
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    bits: set[int] = set()
    for name in (b"neighbours", b"dropout", b"scale", b"seed", b"mode"):
        at = data.index(name, 0, stop)
        bits |= set(range(8 * at, 8 * (at + len(name) + 12)))
    bits |= set(random.Random(0).sample(range(64, 8 * stop), 500))
    digest = model.memory.store.digest()
    for bit in sorted(bits):
        path.write_bytes(flipped(data, bit))
        try:
            found = KeyMemoryTransformer.load(path)
        except ValueError:
            continue
        # White space and the like: the model is what it was.
        assert found.config == model.config and found.memory.store.digest() == digest
        assert (found.memory.store.scale, found.memory.store.seed) == (model.memory.store.scale, 0)
        found.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == data
    path.write_bytes(data)
    assert KeyMemoryTransformer.load(path).memory.store.digest() == digest


@pytest.mark.parametrize("name", ["neighbours", "dropout", "scale"])
def test_a_number_of_the_header_that_was_changed_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    filled_model().save(path)
    data = path.read_bytes()
    at = data.index(name.encode())
    number = next(place for place in range(at + len(name), at + len(name) + 12) if chr(data[place]).isdigit())
    path.write_bytes(data[:number] + (b"3" if data[number : number + 1] != b"3" else b"4") + data[number + 1 :])
    refused(lambda: KeyMemoryTransformer.load(path), tmp_path)


# --- other digits ---------------------------------------------------------------------------------------------


def with_keys(dtype: torch.dtype) -> KeyStore:
    found = KeyStore(*WIDTHS, secret=SECRET, dtype=dtype)
    found.add(range(5), keys_of(list(range(5))).to(dtype), torch.arange(5))
    return found


LOSSY = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize(("log", "backup"), LOSSY)
@pytest.mark.parametrize("where", ["memory", "file", "read only", "folder"])
def test_a_backup_with_other_digits_than_its_log_is_refused(
    tmp_path: Path, log: torch.dtype, backup: torch.dtype, where: str
) -> None:
    exact = keys_of(list(range(5))).double() + 1e-12  # which no shorter number holds
    first, second = (KeyStore(*WIDTHS, secret=SECRET, dtype=dtype) for dtype in (log, backup))
    for found in (first, second):
        found.add(range(5), exact.to(found.keys.dtype), torch.arange(5))
    first.keep_receipts(tmp_path / "log", new=True)
    first.forget([3])
    first.close()
    message = "rounded keys cannot be recognised"
    if where == "memory":
        refused(lambda: second.keep_receipts(tmp_path / "log"), tmp_path, message)
        assert second.log is None
    elif where == "folder":
        sharded = ShardedKeyStore.of(second)
        refused(lambda: sharded.keep_receipts(tmp_path / "log"), tmp_path, message)
    else:
        DurableStore.copy_of(second, tmp_path / "store").close()
        read_only = where == "read only"
        refused(
            lambda: DurableStore.open(tmp_path / "store", receipts=tmp_path / "log", read_only=read_only),
            tmp_path,
            message,
        )


def test_a_backup_whose_numbers_are_wider_is_recognised(tmp_path: Path) -> None:
    found = with_keys(torch.float32)
    found.keep_receipts(tmp_path / "log", new=True)
    found.forget([3])
    found.close()
    assert with_keys(torch.float32).double().keep_receipts(tmp_path / "log").forgotten == (3,)

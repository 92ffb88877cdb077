"""Attack a store: interruptions between any two lines, kills, loss of power, flipped bits; and the same on databases.

    python benchmarks/reliability.py --out docs/results/reliability.json

*Lines*: every change (add, add beyond the room, forget, compact, load) is interrupted before every line of munkey that
it runs. The interruption is a KeyboardInterrupt or a MemoryError; the store is in memory, in a file, or in a file with
a log. Afterwards the store must be before the change or after it, in memory and when its file is opened again, or
refuse everything. *Kills*: a child process changes a store in a file with a log and is killed (SIGKILL) at a random
moment. Then the store is opened again; SQLite and LMDB are killed and opened in the same way. *Bits*: bits of a live
file, a log, a manifest and a file of rows are flipped one at a time. The content read must be equal to the content
written, or an error is raised, and nothing else may change. Every line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from munkey import DurableStore, KeyStore, ShardedKeyStore
from munkey.store import verify

SECRET = b"for attacks"
IDS = list(range(12))
_PACKAGE = os.sep + "munkey" + os.sep


def keys_of(ids: list[int], views: int = 1) -> torch.Tensor:
    rows = [torch.randn(views, 3, generator=torch.Generator().manual_seed(i)) for i in ids]
    return torch.stack(rows) if rows else torch.zeros(0, views, 3)


class LineTrace:
    """Raise an error before line number `at` of munkey that is run."""

    def __init__(self, at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.lines = at, error, 0

    def __enter__(self) -> LineTrace:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        return self._line if _PACKAGE in name and "tests" not in name else None

    def _line(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.at:
                sys.settrace(None)
                raise self.error
        return self._line


def other_state() -> dict[str, torch.Tensor]:
    other = KeyStore(3, 2, secret=SECRET)
    other.add([3, 50], keys_of([3, 50]))
    return dict(other.state_dict())


CHANGES: dict[str, Callable[[KeyStore], object]] = {
    "add": lambda store: store.add([99, 100], keys_of([99, 100], 2)),
    "return": lambda store: store.add([9, 100], keys_of([9, 100], 2), torch.tensor([9, 100])),
    "grow": lambda store: store.add(range(200, 230), keys_of(list(range(200, 230)))),
    "forget": lambda store: store.forget([3, 0, 11]),
    "compact": lambda store: store.compact(),
    "load": lambda store: store.load_state_dict(other_state()),
}


def made(kind: str, folder: str) -> KeyStore:
    if kind == "memory":
        store = KeyStore(3, 2, secret=SECRET)
    else:
        store = DurableStore.create(folder + "/store", 3, 2, secret=SECRET)
    store.add(IDS, keys_of(IDS, 2), torch.tensor(IDS))
    if kind == "file and log":
        store.keep_receipts(folder + "/log", new=True)
    store.forget([9])
    store.digest()
    return store


def state(store: KeyStore) -> tuple[str, tuple[int, ...]]:
    return store.digest(), tuple(store)


def opened(kind: str, folder: str) -> DurableStore:
    return DurableStore.open(folder + "/store", receipts=folder + "/log" if kind == "file and log" else None)


def seen(store: KeyStore, before: object, after: object) -> str:
    """The state of a store after an interruption."""
    try:
        found = state(store)
        near = store.nearest(torch.ones(1, 3), 200).ids
    except RuntimeError as error:
        return "refuses" if "could not be finished" in str(error) else f"violation: {error}"
    if set(near[near >= 0].tolist()) != set(found[1]):
        return "violation: rows and index differ"
    return "before" if found == before else "after" if found == after else "violation: neither before nor after"


def interrupted(kind: str, name: str, every: int) -> collections.Counter[str]:
    change, found = CHANGES[name], collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        store = made(kind, folder)
        before = state(store)
        with LineTrace() as trace:
            change(store)
        after = state(store)
        store.close()
    for error in (KeyboardInterrupt, MemoryError):
        for at in range(0, trace.lines, every):
            with tempfile.TemporaryDirectory() as folder:
                found[attempt(kind, change, folder, error, at, before, after)] += 1
    return found


def attempt(
    kind: str,
    change: Callable[[KeyStore], object],
    folder: str,
    error: type[BaseException],
    at: int,
    before: object,
    after: object,
) -> str:
    store = made(kind, folder)
    try:
        with LineTrace(at, error):
            change(store)
    except error:
        pass
    what = seen(store, before, after)
    store.close()
    if kind == "memory" or what.startswith("violation"):
        return what
    with opened(kind, folder) as again:
        then = seen(again, before, after)
    if then in ("before", "after") and (what in (then, "refuses") or unsure(store)):
        return what
    return f"violation: {what} in memory, {then} in the file"


def unsure(store: KeyStore) -> bool:
    """Return whether the file must be opened again before anything else changes."""
    return isinstance(store, DurableStore) and store.live.unsure


def lines(every: int) -> None:
    for kind in ("memory", "file", "file and log"):
        for name in CHANGES:
            start = time.perf_counter()
            found = interrupted(kind, name, every)
            report("lines", kind=kind, change=name, trials=found.total(), seconds=time.perf_counter() - start, **found)


# --- kills ----------------------------------------------------------------------------------------------------

CHILD = """
import sys, random, torch
sys.path[:0] = {path!r}
from reliability import work
work({kind!r}, {folder!r}, {seed})
"""


def work(kind: str, folder: str, seed: int) -> None:
    """Change a store until this process is killed; every change is noted durably before and after it."""
    luck = random.Random(seed)
    notes = os.open(folder + "/notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: object) -> None:
        os.write(notes, (json.dumps(words) + "\n").encode())

    there = set(IDS)
    act = ACTS[kind](folder)
    note("ready")
    for number in range(10_000):
        if luck.random() < 0.5 and there:
            ids = luck.sample(sorted(there), min(len(there), luck.randint(1, 5)))
            note("forget", ids)
            act("forget", ids)
            there.difference_update(ids)
        else:
            ids = luck.sample(sorted(set(range(60)) - there), 3)
            note("add", ids)
            act("add", ids)
            there.update(ids)
        note("done", number)


def munkey_acts(folder: str) -> Callable[[str, list[int]], object]:
    store = opened("file and log", folder)
    return lambda what, ids: store.add(ids, keys_of(ids)) if what == "add" else store.forget(ids)


def sqlite_acts(folder: str) -> Callable[[str, list[int]], object]:
    base = sqlite3.connect(folder + "/base", isolation_level=None)
    base.execute("PRAGMA secure_delete=ON")
    base.execute("PRAGMA synchronous=FULL")

    def act(what: str, ids: list[int]) -> None:
        base.execute("BEGIN")
        for one in ids:
            if what == "add":
                base.execute("INSERT INTO rows VALUES (?, ?)", (one, keys_of([one]).numpy().tobytes()))
            else:
                base.execute("DELETE FROM rows WHERE id=?", (one,))
        base.execute("COMMIT")

    return act


def lmdb_acts(folder: str) -> Callable[[str, list[int]], object]:
    import lmdb

    base = lmdb.open(folder + "/base", map_size=1 << 24)

    def act(what: str, ids: list[int]) -> None:
        with base.begin(write=True) as change:
            for one in ids:
                key = one.to_bytes(8, "big")
                change.put(key, keys_of([one]).numpy().tobytes()) if what == "add" else change.delete(key)

    return act


ACTS = {"munkey": munkey_acts, "SQLite": sqlite_acts, "LMDB": lmdb_acts}


def prepared(kind: str, folder: str) -> None:
    if kind == "munkey":
        with DurableStore.create(folder + "/store", 3, 2, secret=SECRET) as store:
            store.add(IDS, keys_of(IDS))
            store.keep_receipts(folder + "/log", new=True)
        return
    if kind == "SQLite":
        base = sqlite3.connect(folder + "/base")
        base.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, key BLOB)")
        base.executemany("INSERT INTO rows VALUES (?, ?)", [(one, keys_of([one]).numpy().tobytes()) for one in IDS])
        base.commit()
        base.close()
        return
    ACTS[kind](folder)("add", IDS)


def there_now(kind: str, folder: str) -> tuple[set[int], bool]:
    """The ids in a store after a kill, and whether each has its own key."""
    if kind == "munkey":
        with opened("file and log", folder) as store:
            store.verify()
            ids = list(store)
            right = not ids or torch.equal(store.get(ids).keys, keys_of(ids)[:, 0])
            verify(folder + "/log", secret=SECRET)
            return set(ids), right
    if kind == "SQLite":
        base = sqlite3.connect(folder + "/base")
        rows = base.execute("SELECT id, key FROM rows").fetchall()
    else:
        import lmdb

        with lmdb.open(folder + "/base", map_size=1 << 24).begin() as reader:
            rows = [(int.from_bytes(key, "big"), value) for key, value in reader.cursor()]
    return {one for one, _ in rows}, all(key == keys_of([one]).numpy().tobytes() for one, key in rows)


def allowed(notes: list[list[Any]]) -> list[set[int]]:
    """Allowed states: the state after the last completed change, or after the change that was under way."""
    now, then = set(IDS), set(IDS)
    for what, *more in notes:
        if what == "done":
            now = then
        elif what != "ready":
            then = now | set(more[0]) if what == "add" else now - set(more[0])
    return [now, then]


def kills(trials: int) -> None:
    for kind in ACTS:
        if kind == "LMDB" and not has_lmdb():
            continue
        found, luck = collections.Counter[str](), random.Random(0)
        for seed in range(trials):
            with tempfile.TemporaryDirectory() as folder:
                found[killed(kind, folder, seed, luck.random() * 0.05)] += 1
        report("kills", kind=kind, trials=found.total(), **found)


def killed(kind: str, folder: str, seed: int, after: float) -> str:
    prepared(kind, folder)
    path = [str(Path(__file__).parent)]
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(path=path, kind=kind, folder=folder, seed=seed)])
    notes = Path(folder) / "notes"
    while not (notes.exists() and notes.stat().st_size):
        time.sleep(0.002)
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.wait()
    said = [json.loads(line) for line in notes.read_text().splitlines() if line.endswith("]")]
    try:
        ids, right = there_now(kind, folder)
    except Exception as error:
        return f"violation: {type(error).__name__}: {error}"
    if not right:
        return "violation: a row with another's key"
    return "whole" if ids in allowed(said) else "violation: half a change"


def has_lmdb() -> bool:
    try:
        import lmdb  # noqa: F401
    except ImportError:
        return False
    return True


# --- bits -----------------------------------------------------------------------------------------------------


def flips(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = made("file and log", folder)
        store.forget([1, 2])
        whole = state(store)
        store.close()
        ShardedKeyStore.of(copy_of(store)).save(folder + "/rows")
        for name, read in readers(folder, whole).items():
            flipped(name, Path(folder), read, count)


def copy_of(store: KeyStore) -> KeyStore:
    other = KeyStore(3, 2, secret=SECRET)
    other.load_state_dict(store.state_dict())
    return other


def readers(folder: str, whole: object) -> dict[str, tuple[str, Callable[[], bool]]]:
    """Readers of each kind of file: the file, and a function that returns whether its content is as it was written."""

    def live() -> bool:
        with DurableStore.open(folder + "/store", receipts=False) as store:
            return state(store) == whole

    def log() -> bool:
        return len(verify(folder + "/log", secret=SECRET).events) == 2

    def shards() -> bool:
        return state(ShardedKeyStore.load(folder + "/rows").local) == whole

    rows = next(name for name in os.listdir(folder + "/rows") if name.startswith("rows-"))
    return {
        "live file": ("store", live),
        "log": ("log", log),
        "manifest": ("rows/manifest.json", shards),
        "rows of a folder": ("rows/" + rows, shards),
    }


def flipped(name: str, folder: Path, reader: tuple[str, Callable[[], bool]], count: int) -> None:
    path, read = folder / reader[0], reader[1]
    content = path.read_bytes()
    others = {other: other.read_bytes() for other in folder.rglob("*") if other.is_file()}
    bits, found = len(content) * 8, collections.Counter[str]()
    chosen = range(bits) if bits <= count else sorted(random.Random(0).sample(range(bits), count))
    for bit in chosen:
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found["read as it was" if read() else "violation: read as something else"] += 1
        except (ValueError, FileNotFoundError):
            found["refused"] += 1
            if path.read_bytes() != data:
                found["violation: changed what it refused"] += 1
        except Exception as error:
            found[f"violation: {type(error).__name__}"] += 1
        for other, before in others.items():
            if not other.exists() or (other != path and other.read_bytes() != before):
                found["violation: another file was changed"] += 1
            other.write_bytes(before)
    report("bits", file=name, bits=bits, trials=len(chosen), **found)


def report(what: str, **found: object) -> None:
    LINES.append({"attack": what, **found})
    print(json.dumps(LINES[-1]), flush=True)


LINES: list[dict[str, Any]] = []


def main() -> None:
    """Everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="interrupt before every so many lines")
    parser.add_argument("--kills", type=int, default=200, help="of each store")
    parser.add_argument("--bits", type=int, default=20_000, help="of each file, at most")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.every, args.kills, args.bits = 199, 2, 50
    torch.set_num_threads(1)
    lines(args.every)
    kills(args.kills)
    flips(args.bits)
    violations = sum(n for line in LINES for name, n in line.items() if name.startswith("violation"))
    result = {"violations": violations, "attacks": LINES}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"violations": violations}))


if __name__ == "__main__":
    main()

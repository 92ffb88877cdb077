"""What would stay behind, come back, or be lost where stores, files and logs take one another's place."""

from __future__ import annotations

import copy
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifiers import labels
from classifiers import model as classifier
from rank_cases import filled, loaded_beside_a_log, loaded_elsewhere, no_angle_on_one_rank, words_differ
from rank_pool import RankPool

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, KeyValueMemory, ShardedKeyStore, ValueWriter
from munkey.audit import erasure_report
from munkey.posthoc.privacy import private_backward
from munkey.sharded.ranks import Ranks
from munkey.store import Follower
from munkey.store.file.disk import Disk


def test_who_is_gone_stays_gone_when_an_older_state_is_loaded(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    for size in (1, 2):
        for there in pools(size).run(loaded_beside_a_log, str(tmp_path / str(size))):
            assert there == sorted(set(filled()).difference([3, 5, 8]))


def test_rows_of_another_rank_are_not_loaded(pools: Callable[[int], RankPool]) -> None:
    for said, unchanged in pools(2).run(loaded_elsewhere):
        assert "do not belong to rank" in said and unchanged


def test_ranks_say_the_same_of_missing_ids(pools: Callable[[int], RankPool]) -> None:
    for said in pools(2).run(words_differ):
        assert said == "all ranks must pass the same missing=, found 'ignore', 'raise'"


def test_a_key_without_angle_on_one_rank_is_refused_on_all(pools: Callable[[int], RankPool]) -> None:
    for of_key, of_query in pools(2).run(no_angle_on_one_rank):
        assert of_key.startswith("keys must have a length above 0")
        assert of_query.startswith("queries must have a length above 0")


def test_the_text_of_an_error_of_the_system_travels() -> None:
    ranks = Ranks()
    texts: list[object] = []
    ranks.gather = lambda value: texts.append(value) or [value]  # type: ignore[assignment, func-returns-value]
    for error, text in (
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError("x"), "x"),
    ):
        with pytest.raises(type(error)):
            ranks.fail(error, anywhere=True)
        assert texts.pop() == (type(error), text)


# --- one store in the place of another ------------------------------------------------------------------------


def with_log(memory: KeyValueMemory, path: Path) -> None:
    memory.store.keep_receipts(path / "log", new=True)


def with_file(memory: KeyValueMemory, path: Path) -> None:
    memory.store = DurableStore.copy_of(memory.store, path / "store")


def with_copies(memory: KeyValueMemory, path: Path) -> None:
    memory.store.follow(Follower())


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (with_log, r"keeps a log of receipts; close\(\) it, and give the new store the log afterwards"),
        (with_file, r"lives in a file, which would keep all rows; take a copy\.deepcopy of the model"),
        (with_copies, r"holds copies of all keys; close\(\) it, and make one of the new store"),
    ],
)
def test_nothing_stays_behind_with_a_store(
    tmp_path: Path, prepare: Callable[[KeyValueMemory, Path], None], said: str
) -> None:
    spread = classifier()
    spread.shard()
    spread.save(tmp_path / "folder")
    built = classifier()
    prepare(built.memory, tmp_path)
    store = built.memory.store
    for act in (built.shard, lambda: KeyMemoryTransformer.load(tmp_path / "folder", model=built)):
        with pytest.raises(ValueError, match=said):
            act()
    assert built.memory.store is store
    if prepare is not with_copies:
        store.close()


def test_a_memory_is_spread_once_its_log_is_closed(tmp_path: Path) -> None:
    built = classifier()
    with_log(built.memory, tmp_path)
    built.memory.store.close()
    built.shard()
    built.memory.store.keep_receipts(tmp_path / "log")
    built.memory.store.close()


# --- folders --------------------------------------------------------------------------------------------------


def test_files_of_others_are_not_wiped(tmp_path: Path) -> None:
    theirs = ("rows-of-mine.csv", "model-notes.txt", "manifest.json.old", "rows-00000-of-00001.safetensors")
    for name in theirs:
        (tmp_path / name).write_text("mine")
    store = ShardedKeyStore.of(filled())
    for _ in range(2):
        store.save(tmp_path)
        store.forget(list(store)[:1])
    ShardedKeyStore.load(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in theirs)


def test_a_file_beside_a_store_or_model_is_not_wiped(tmp_path: Path) -> None:
    for end in (".old", ".partial"):
        (tmp_path / f"model{end}").write_text("mine")
        (tmp_path / f"store{end}").write_text("mine")
    for _ in range(2):
        classifier().save(tmp_path / "model")
    with DurableStore.copy_of(filled(), tmp_path / "store") as store:
        store.sync()
    DurableStore.open(tmp_path / "store").close()
    assert all(path.read_text() == "mine" for end in ("old", "partial") for path in tmp_path.glob(f"*.{end}"))


def test_what_is_no_store_loses_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear reader")
    (tmp_path / "letter.munkey-old").write_text("mine")
    with pytest.raises(ValueError, match="is no store"):
        DurableStore.open(tmp_path / "letter")
    assert (tmp_path / "letter.munkey-old").read_text() == "mine"


def test_two_do_not_save_to_one_folder_and_a_load_leaves_a_save_alone(tmp_path: Path) -> None:
    store = ShardedKeyStore.of(filled())
    store.save(tmp_path)
    under_way = tmp_path / f"rows-00000-of-00001-{16 * 'b'}.safetensors.munkey-partial"
    under_way.write_bytes(b"half")
    guard = os.open(tmp_path / "lock", os.O_RDWR)
    fcntl.flock(guard, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match=r"another process saves to .* at this moment; save to another folder"):
        store.save(tmp_path)
    assert ShardedKeyStore.load(tmp_path).digest() == store.digest() and under_way.read_bytes() == b"half"
    os.close(guard)
    assert ShardedKeyStore.load(tmp_path).digest() == store.digest() and under_way.exists(), "loading reads"
    store.save(tmp_path)
    assert not under_way.exists()


def test_a_second_name_of_a_file_that_stays_is_only_a_name(tmp_path: Path) -> None:
    """As an interruption leaves it between the two names of what is replaced."""
    store = ShardedKeyStore.of(filled())
    store.save(tmp_path)
    for path in list(tmp_path.iterdir()):
        if path.name != "lock":
            os.link(path, str(path) + ".munkey-old")
    assert ShardedKeyStore.load(tmp_path).digest() == store.digest()
    store.save(tmp_path)
    assert ShardedKeyStore.load(tmp_path).digest() == store.digest()
    assert not list(tmp_path.glob("*.munkey-old"))


def test_an_error_of_a_lock_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available"):
        Disk().lock(0)


# --- small things ---------------------------------------------------------------------------------------------


def test_another_secret_gives_another_digest(tmp_path: Path) -> None:
    store, secret = filled(), b"another one"
    before, rows = store.digest(), store.get(list(store))
    store.secret = secret
    fresh = KeyStore(*store.widths, secret=secret)
    keys, values = (column.unflatten(0, (len(store), -1)) for column in (rows.keys, rows.values))
    fresh.add(list(store), keys, rows.labels[:: keys.shape[1]], values)
    assert store.digest() == fresh.digest() != before
    for bad in (b"", bytes(65)):
        with pytest.raises(ValueError, match="a secret has 1 to 64 bytes, found"):
            store.secret = bad
    store.keep_receipts(tmp_path / "log", new=True)
    with pytest.raises(ValueError, match="a log of receipts is kept under the secret the store has"):
        store.secret = b"a third"
    store.close()
    with DurableStore.copy_of(store, tmp_path / "store") as durable:
        with pytest.raises(ValueError, match="a store keeps the secret that is in its file"):
            durable.secret = b"a third"
        assert durable.secret == secret


def test_a_log_is_of_one_secret(tmp_path: Path) -> None:
    one, other = classifier(), classifier()
    one.memory.store.secret = b"one"
    one.save(tmp_path / "one")
    other.memory.store.keep_receipts(tmp_path / "log", new=True)
    with pytest.raises(ValueError, match="keeps a log of receipts under another secret; load without model="):
        KeyMemoryTransformer.load(tmp_path / "one", model=other)
    other.memory.store.close()


def test_values_that_are_not_trained_stay_so(tmp_path: Path) -> None:
    store = filled()
    store.values.requires_grad_(False)
    with DurableStore.copy_of(store, tmp_path / "store") as durable:
        assert not durable.values.requires_grad and not copy.deepcopy(durable).values.requires_grad
    with DurableStore.open(tmp_path / "store") as durable:
        assert not durable.values.requires_grad


def test_rounded_keys_have_neighbours_of_their_own() -> None:
    store = KeyStore(2, 2)
    store.add([0, 1, 2], torch.tensor([[1.0, 0.0], [1.001, 0.0], [1.0011, 0.0]], dtype=torch.float32))
    memory = KeyValueMemory(store, metric="dot")
    rows = torch.tensor([0])
    assert memory.neighbours_of_rows(rows, 1)[0].tolist() == [[2]]
    memory.to(torch.bfloat16)  # both are 1 in it: the first of equals is taken
    assert memory.neighbours_of_rows(rows, 1)[0].tolist() == [[1]]


def test_noise_is_for_one_process_and_values_alone() -> None:
    settings = {"clip": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 2, "generator": torch.Generator()}
    written, spread = classifier(), classifier()
    written.memory.writer = ValueWriter(*written.memory.store.widths, task=3)
    spread.shard()
    for built, said in ((written, "found a memory with a writer"), (spread, "train in one process")):
        with pytest.raises(ValueError, match=said):
            private_backward(built, torch.zeros(2, 1, 8, 8), labels(2), ids=[0, 1], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rounded_copies_and_what_functions_enclose_are_found(dtype: torch.dtype) -> None:
    store = filled()
    rows = store.get([3])
    hidden = store.keys[store.rows_of([3])].to(dtype)

    def enclosing() -> torch.Tensor:
        return hidden

    def given(_: torch.Tensor = hidden) -> None: ...

    for holder in (enclosing, given, [hidden]):
        assert erasure_report(rows, holders=[holder]).found["tensors"] == len(hidden)
    assert erasure_report(rows, holders=[lambda: None]).clean

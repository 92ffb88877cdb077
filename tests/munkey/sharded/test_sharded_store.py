"""A store on several ranks says what one store says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_cases import (
    filled,
    load_on_ranks,
    logged_on_ranks,
    other_versions,
    play_on_one,
    play_on_ranks,
    queries,
    refused_on_ranks,
    returned_to_a_closed_log,
    save_on_ranks,
    sent_for,
)
from rank_pool import RankPool
from stores import SECRET

from munkey import ShardedKeyStore
from munkey.sharded import folder
from munkey.store.log import verify

ids = st.lists(st.integers(-3, 12) | st.sampled_from([2**63 - 1, -(2**63)]), unique=True, max_size=8)
operations = st.lists(st.tuples(st.sampled_from(["add", "add", "forget", "replace", "compact"]), ids), max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations, k=st.integers(1, 5))
def test_answers_are_those_of_one_store(pool: RankPool, operations: list, k: int) -> None:
    said, expected = play_on_one(operations, queries(), k)
    found = pool.run(play_on_ranks, operations, queries(), k)
    for rank, (got, answers) in enumerate(found):
        assert got == said, "receipts, digests and counts"
        part = slice(rank, None, pool.size)
        assert answers["ids"] == expected["ids"]
        for ours, theirs in zip(answers["nearest"], expected["nearest"], strict=True):
            for x, y in zip(ours, theirs, strict=True):
                assert torch.equal(x, y[part])
        mine = expected["ids"][part]
        keep = torch.isin(expected["rows"][0], torch.tensor(mine, dtype=torch.int64))
        for x, y in zip(answers["rows"], expected["rows"], strict=True):
            assert torch.equal(x, y[keep])
        assert answers["contains"] == [True] * len(mine) + [False]
        for ours, near in zip(answers["owners"], answers["nearest"], strict=True):
            assert torch.equal(ours, near[0][~near[2]]), "row numbers lead to the rows that were found"


def test_what_so_many_ranks_saved_others_load(pool: RankPool, pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    one = filled()
    one.forget([3, 5])
    pieces = filled().get([3, 5])
    assert set(pool.run(save_on_ranks, str(tmp_path))) == {one.digest()}
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not any(key.numpy().tobytes() in data for key in pieces.keys)
    for size in (1, 2, 3):
        for digest, ids, after in pools(size).run(load_on_ranks, str(tmp_path)):
            assert ids == [*sorted(one), 100] and digest != one.digest() == after


def test_a_second_save_wipes_the_first(pool: RankPool, tmp_path: Path) -> None:
    pool.run(save_on_ranks, str(tmp_path))
    before = sorted(path.name for path in tmp_path.iterdir())
    left = tmp_path / f"rows-00000-of-00009-{16 * 'a'}.safetensors"
    left.write_bytes(b"something")
    pool.run(save_on_ranks, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


MESSAGES = {
    "unknown": "KeyError: ids [99] are not in the store; forget can pass over them with missing='ignore'",
    "known": "ValueError: ids [7] are in the store already; use replace to change them",
    "not finite": "ValueError: keys must be finite as torch.float32; those of 1 instances are not",
    "width": "ValueError: expected queries of shape (B, 3)",
    "missing": "ValueError: missing must be 'raise' or 'ignore', found 'skip'",
    "replace": "KeyError: ids [99] are not in the store",
    "get": "KeyError: ids [98] are not in the store",
    "no folder": "FileNotFoundError: no manifest.json in",
    "closed log": "ValueError: the log '",
}
OF_SEVERAL = {
    "two ranks": "ValueError: ids [50] come from two ranks; give each instance to one of them",
    "k": "ValueError: all ranks must request the same number of neighbours, with or without ids to exclude; found rank "
    "0 2",
    "settings": "ValueError: all ranks must have the same settings of a store: rank 0 has {",
    "secrets": "ValueError: all ranks must have the same digest of an empty store, which the secret decides: ",
    "content": "ValueError: all ranks must have the same content of a store, and secret: rank 0 has '",
    "place": "ValueError: ids [",
}


@pytest.mark.parametrize("what", [*MESSAGES, *OF_SEVERAL])
def test_an_error_of_one_rank_is_raised_on_all_and_changes_nothing(pool: RankPool, tmp_path: Path, what: str) -> None:
    if pool.size == 1 and what in OF_SEVERAL:
        pytest.skip("it takes two ranks to disagree")
    for said in pool.run(refused_on_ranks, what, str(tmp_path / "none")):
        assert said.startswith((MESSAGES | OF_SEVERAL)[what])


def test_whom_a_closed_log_cannot_note_does_not_come_back(pool: RankPool, tmp_path: Path) -> None:
    for said, unchanged in pool.run(returned_to_a_closed_log, str(tmp_path / "log")):
        assert "is closed; open it again" in said and unchanged


def test_a_save_sees_what_pytorch_does_not_count(tmp_path: Path) -> None:
    store = ShardedKeyStore.of(filled())
    store.digest()
    store.local.values.data[:5] += 1
    store.save(tmp_path)
    again = ShardedKeyStore.load(tmp_path)
    assert again.digest() == store.digest() and torch.equal(again.get([0]).values, store.get([0]).values)


def test_two_versions_do_not_start_together(pools: Callable[[int], RankPool]) -> None:
    for said in pools(2).run(other_versions):
        assert said == "all ranks must have the same version of munkey: rank 0 has '1.0', rank 1 has '9.9'"


def test_a_log_makes_a_backup_forget(pool: RankPool, tmp_path: Path) -> None:
    one = filled()
    one.keep_receipts(tmp_path / "one", new=True)
    receipt = one.forget([3, 5])
    found = pool.run(logged_on_ranks, str(tmp_path))
    for nothing, got, back, ids, digest, before in found:
        assert nothing == () and back == (3,) and ids == [n for n in range(40) if n != 3]
        assert digest == before
        assert dataclasses.replace(got, time=0) == dataclasses.replace(receipt, time=0)
        assert got == found[0][1], "one receipt, whoever asks"
    verified = verify(tmp_path / "log", secret=SECRET)
    assert [event["kind"] for event in verified.events] == ["forgot", "returning", "returned"]
    assert verified.receipts == [found[0][1]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "which the manifest names, is missing; restore a backup"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "is damaged: its rows are not those"),
        (lambda path: path.write_bytes(b"?" * 100), "rows-"),
    ],
)
def test_a_bad_file_is_named(pool: RankPool, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    pool.run(save_on_ranks, str(tmp_path))
    path = sorted(tmp_path.glob("rows-*"))[-1]
    damage(path)
    for error in pool.tried(load_on_ranks, str(tmp_path)):
        assert isinstance(error, ValueError | FileNotFoundError)
        assert path.name in str(error) and message in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(format=9), "has format version 9, this munkey reads version 1"),
        (lambda found: found.update(**{"class": "other"}), "is no manifest of a store"),
        (lambda found: found.pop("secret"), "is no manifest of a store"),
        (lambda found: found.update(digest="0"), "do not match the digest in its manifest"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    pool: RankPool, tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    pool.run(save_on_ranks, str(tmp_path))
    found = json.loads((tmp_path / "manifest.json").read_text())
    change(found)
    if "checksum" in found:
        found["checksum"] = folder._checksum(found)
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    for error in pool.tried(load_on_ranks, str(tmp_path)):
        assert isinstance(error, ValueError) and message in str(error)


def test_a_search_sends_what_the_cost_model_says(pool: RankPool) -> None:
    """See docs/scale.md."""
    ranks, asked, k, width = pool.size, 6, 4, 3
    messages, sent = (sum(each) for each in zip(*pool.run(sent_for, "search"), strict=True))
    assert messages == 3 * ranks * (ranks - 1)
    assert sent == (ranks - 1) * (32 * ranks + asked * (4 * width + 24 * k + 8))


def test_messages_of_a_deletion_do_not_depend_on_the_rows(pool: RankPool) -> None:
    messages = [each for each, _ in pool.run(sent_for, "forget")]
    assert messages == [11 * (pool.size - 1)] * pool.size

"""A classifier with a memory on several ranks learns and says what it does on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifiers import model as classifier
from rank_cases import (
    images,
    known_classes,
    known_classes_on_ranks,
    labels,
    loaded_model,
    read_out,
    read_out_on_ranks,
    remembered_a_bad_label,
    saved_model,
    sharded_with_other_encoders,
    trained_model,
    trained_model_on_ranks,
)
from rank_pool import RankPool

from munkey import KeyMemoryTransformer, KeyValueMemory, ShardedKeyStore


@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_training_on_ranks_is_training_on_one(pool: RankPool, mode: str) -> None:
    weights, values, before, after, forgotten, near = trained_model(mode, shard=False)
    twins = {}
    for rank, found in enumerate(pool.run(trained_model_on_ranks, mode)):
        part = slice(rank, None, pool.size)
        assert found[0].keys() == weights.keys()
        for name, weight in found[0].items():
            torch.testing.assert_close(weight, weights[name])
        torch.testing.assert_close(found[1], values)
        torch.testing.assert_close(found[2], before[part])
        torch.testing.assert_close(found[3], after[part])
        assert found[4] == forgotten
        twins |= found[5]
    assert twins == near


def test_a_model_is_a_folder_that_any_number_of_ranks_loads(
    pool: RankPool, pools: Callable[[int], RankPool], tmp_path: Path
) -> None:
    one = classifier().double()
    one.remember(range(24), images(24), labels(24))
    one.forget([3])
    one.save(tmp_path / "one")
    with torch.no_grad():
        expected = one(images(6, 1))
    folder = tmp_path / "model"
    for logits in pool.run(saved_model, str(folder)):
        torch.testing.assert_close(logits, expected)
    assert len(list(folder.iterdir())) == pool.size + 3, (
        "rows of each rank, weights, manifest, lock; nothing of the first save"
    )
    for size in (1, 2):
        for logits, digest, said in pools(size).run(loaded_model, str(folder)):
            torch.testing.assert_close(logits, expected)
            assert digest == one.memory.store.digest()
            if size > 1:
                assert "holds a model, whose weights would be lost" in said[0]
                assert "is spread over ranks; load the file without model=" in said[1]
    KeyMemoryTransformer.load(folder).save(tmp_path / "alone")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "one").read_bytes() or pool.size > 1
    next(folder.glob("model-*")).unlink()
    with pytest.raises(FileNotFoundError):
        KeyMemoryTransformer.load(folder)


def test_rows_alone_are_no_model(tmp_path: Path) -> None:
    ShardedKeyStore(3, 2).save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds rows, but no model; load them with ShardedKeyStore\.load"):
        KeyMemoryTransformer.load(tmp_path)


def test_all_ranks_have_the_same_encoder(pools: Callable[[int], RankPool]) -> None:
    for said in pools(2).run(sharded_with_other_encoders):
        assert said.startswith("all ranks must have the same fingerprint of the key encoder: rank 0 has '")


def test_a_bad_label_on_one_rank_is_said_on_all(pools: Callable[[int], RankPool]) -> None:
    first, second = pools(2).run(remembered_a_bad_label)
    assert second == "a label is at least 0, found -1; leave out inputs that have no label"
    assert first == second + " (on rank 1)"


def test_what_follows_values_comes_after_sharding() -> None:
    built = classifier()
    built.attach(torch.optim.SGD([built.memory.store.values], 0.1))
    with pytest.raises(ValueError, match="detach it, shard or load, then attach"):
        built.shard()
    built.memory.store.detach(*built.memory.store.optimizers)
    built.shard()
    with pytest.raises(ValueError, match="is spread over ranks already; save it, and load it with another number"):
        built.shard()


def test_another_search_is_not_for_several_ranks() -> None:
    memory = KeyValueMemory(ShardedKeyStore(3, 2), search=lambda *a, **b: None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="does its own search; leave search= out"):
        memory.neighbours_of_rows(torch.tensor([0]), 1)


def test_columns_of_one_rank_are_not_those_of_all() -> None:
    store = ShardedKeyStore(3, 2)
    for name in ("ids", "keys", "columns"):
        with pytest.raises(
            AttributeError, match=rf"has no {name} of its own; those of this rank are in \.local\.{name}"
        ):
            getattr(store, name)
    with pytest.raises(AttributeError, match="'ShardedKeyStore' object has no attribute 'nothing'"):
        store.nothing  # noqa: B018


def test_a_state_that_is_loaded_is_counted() -> None:
    store, other = ShardedKeyStore(3, 2), ShardedKeyStore(3, 2)
    store.add([7, 8], torch.eye(3)[:2])
    other.load_state_dict(store.state_dict())
    assert len(other) == other.used == 2 and list(other) == [7, 8]


def test_classes_that_a_transformer_knows_are_those_of_all_ranks(pool: RankPool) -> None:
    expected = known_classes(shard=False)
    assert expected[:2] == [True, True] and not any(expected[2:])
    assert pool.run(known_classes_on_ranks) == [expected] * pool.size


def test_answers_of_votes_and_sums_are_those_of_one(pool: RankPool) -> None:
    expected = read_out(shard=False)
    for rank, found in enumerate(pool.run(read_out_on_ranks)):
        for answers, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(answers, whole[rank :: pool.size], rtol=1e-12, atol=1e-12)

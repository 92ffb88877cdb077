"""On several processes models learn, grow and generate what they do on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from process_cases import generated_here, greatest_here, grown_here, refining, refining_here
from rank_pool import RankPool

from treediff import TreeTopology
from treediff.core.distributed import ALONE, World, data_parallel, start


@pytest.mark.parametrize(
    ("ranks", "resumed", "settings"),
    [
        (1, False, {"policy": "highest_loss", "threshold": 0.05}),
        (2, True, {"min_share": 0.3}),  # which prunes
        (3, False, {"policy": "highest_loss", "threshold": 0.05}),
        (3, True, {"min_share": 0.3}),
    ],
)
def test_a_tree_grows_on_many_processes_as_on_one(
    pools: Callable[[int], RankPool], ranks: int, resumed: bool, settings: dict[str, Any]
) -> None:
    weights, tree, history = grown_here(resumed, settings)
    topology = TreeTopology.from_json(tree)
    assert "subtree" in history and resumed == (len(topology.leaves) < 1 + history.count("subtree") + 1)
    for found in pools(ranks).run(grown_here, resumed, settings):
        assert found[1:] == (tree, history)
        for name, weight in found[0].items():
            torch.testing.assert_close(weight, weights[name])


@pytest.mark.parametrize("how", ["data parallel", "fully sharded"])
def test_the_second_stage_learns_on_many_processes_as_on_one(pool: RankPool, how: str) -> None:
    _, weights, sample = refining("data parallel", ALONE)
    losses = []
    for loss, found, drawn in pool.run(refining_here, how):
        losses.append(loss)
        torch.testing.assert_close(drawn, sample)
        assert found.keys() == weights.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, weights[name])
    assert sum(losses) / len(losses) == pytest.approx(refining("data parallel", ALONE)[0], rel=1e-5)


def test_images_do_not_depend_on_the_number_of_processes(pool: RankPool) -> None:
    images, one_by_one = generated_here(4)
    for found, singly in pool.run(generated_here, 4):
        torch.testing.assert_close(found, images)
        assert torch.equal(singly, one_by_one), "batches of the same size give the same bits"


def test_shares_are_equal_and_cover_a_batch() -> None:
    rows = torch.arange(10, 17)
    parts = [World(rank, 3).share(rows) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert torch.cat(parts).tolist() == [*range(10, 17), 10, 11]
    assert not len(World(1, 2).share(rows[:0])) and torch.equal(ALONE.share(rows), rows)
    assert [World(rank, 2).share(rows[:1]).tolist() for rank in range(2)] == [[10], [10]]


def test_noise_is_the_own_of_each_process() -> None:
    def drawn(world: World) -> list[float]:
        return torch.rand(3, generator=world.own(torch.Generator().manual_seed(5))).tolist()

    assert drawn(ALONE) == torch.rand(3, generator=torch.Generator().manual_seed(5)).tolist()
    assert len({str(drawn(World(rank, 3))) for rank in range(3)}) == 3 and drawn(World(1, 3)) == drawn(World(1, 3))


def test_all_know_the_greatest_number(pool: RankPool) -> None:
    assert pool.run(greatest_here, [3, 8, 5]) == [[3, 8, 8][pool.size - 1]] * pool.size


@pytest.mark.parametrize(
    ("cuda", "local", "expected"),
    [
        (True, "3", [3, "nccl"]),
        (True, None, ["nccl"]),  # of a launcher that is not torchrun, and the script chooses
        (False, "3", ["gloo"]),
    ],
)
def test_each_process_has_an_accelerator_of_its_own(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, local: str | None, expected: list[int | str]
) -> None:
    told: list[int | str] = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", told.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert start() == World(5, 8)
    assert told == expected


def test_alone_nothing_changes() -> None:
    model = torch.nn.Linear(2, 1)
    assert start() is ALONE and data_parallel(model.forward, model) == model.forward
    assert ALONE.map(lambda x: x + 1, [1, 2]) == [2, 3]
    x = torch.zeros(2)
    assert ALONE.gather(x) is x and ALONE.greatest(3) == 3

"""Probabilities of leaves that are kept between splits: equal to those computed anew, and no row is read in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from growing import blobs, growth_of, reach, small, train
from torch import Tensor, nn
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.rows import Rows
from treediff.growth.reach import LeafProbabilities

ROWS = Rows(blobs(90, 30, 60, 40, dtype=torch.float64), dtype=torch.float64)


def model(depth: int = 1) -> TreeVAE:
    return small(TreeTopology.balanced(depth), width=32, dtype=torch.float64)


def by_hand(model: TreeVAE, x: Rows) -> Tensor:
    return torch.stack([reach(model, x[:], leaf) for leaf in model.topology.leaves], 1)


def sharp(model: TreeVAE, node: int, factor: float = 1e4) -> None:
    """Make a router more certain."""
    router = model.banks.posterior_routers.module(node)
    last = [layer for layer in router.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.weight *= factor
    model.banks.posterior_routers.assign(node, router)


def counted(model: TreeVAE) -> list[int]:
    """Count the rows of each call of the encoder."""
    calls: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_they_are_those_of_every_row_at_every_moment_of_a_growth() -> None:
    built = model(0)
    growth = growth_of(built, max_leaves=6)
    for stage in growth.stages(ROWS):
        torch.testing.assert_close(growth._probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-9)
        train(stage, ROWS[:])
        torch.testing.assert_close(growth._probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-9)
    assert len(built.topology.leaves) == 6


def test_after_a_split_only_rows_that_reach_the_leaf_are_read() -> None:
    built = model()
    sharp(built, 0)
    probs = LeafProbabilities(built, batch_size=1000)
    there = int((probs(ROWS)[:, 0] >= 1e-4).sum())
    calls = counted(built)
    assert torch.equal(probs(ROWS), probs(ROWS)) and not calls
    built.split(1, generator=seeded(1))
    found = probs(ROWS)
    assert calls == [there] and 0 < there < len(ROWS)
    torch.testing.assert_close(found, by_hand(built, ROWS), rtol=1e-9, atol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(len(ROWS), dtype=torch.float64))
    for leaf in (3, 5):  # two splits before the next call, one under the other
        built.split(leaf, generator=seeded(2))
    torch.testing.assert_close(probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.normal_(next(model.encoder.parameters())),
        lambda model: nn.init.normal_(next(model.bottom_up.parameters())),
        lambda model: nn.init.normal_(model.banks.posterior_routers.weights_of(0)),
        lambda model: model.load_state_dict({name: x + 0.1 for name, x in model.state_dict().items()}),
        lambda model: model.prune(3),
        lambda model: [torch.optim.Adam([weight], lr=0.1, fused=True).step() for weight in stepped(model)],
    ],
    ids=["encoder", "ladder", "router", "loaded", "pruned", "optimiser"],
)
def test_a_change_is_seen(change: Callable[[TreeVAE], object]) -> None:
    built = model(2)
    probs = LeafProbabilities(built)
    before = probs(ROWS)
    change(built)
    torch.testing.assert_close(probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-9)
    assert before.shape != probs(ROWS).shape or not torch.equal(before, probs(ROWS))


def stepped(model: TreeVAE) -> list[nn.Parameter]:
    """A router's weights, with a gradient."""
    weight = model.banks.posterior_routers.weights_of(1)
    weight.grad = torch.randn(weight.shape, generator=seeded(3), dtype=weight.dtype)
    return [weight]


@pytest.mark.parametrize("leaf", [3, 4, 5])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_after_pruning_hardly_a_row_is_read(leaf: int, sharpness: float) -> None:
    built = small(TreeTopology.balanced(1).split(2).split(1), width=32, dtype=torch.float64)
    for node in built.topology.routed:
        sharp(built, node, sharpness)
    probs = LeafProbabilities(built, batch_size=1000)
    probs(ROWS)
    calls = counted(built)
    built.prune(leaf)
    found = probs(ROWS)
    assert not calls  # its sibling is a leaf
    torch.testing.assert_close(found, by_hand(built, ROWS), rtol=1e-9, atol=1e-4)
    other = next(node for node in built.topology.leaves if built.topology.parent(node) in (1, 2))
    last = built.topology.leaves_under(1 if other in built.topology.leaves_under(2) else 2)
    built.prune(last[0])
    torch.testing.assert_close(probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-4)


@pytest.mark.parametrize("sharpness", [1.0, 1e4])
def test_rows_that_hardly_reach_what_is_left_are_read(sharpness: float) -> None:
    built = small(TreeTopology.balanced(1).split(2), width=32, dtype=torch.float64)
    sharp(built, 0, sharpness)
    probs = LeafProbabilities(built, batch_size=1000)
    there = int((probs(ROWS)[:, 1:].sum(1) < 1e-4).sum())
    calls = counted(built)
    built.prune(1)  # what is left has two leaves
    found = probs(ROWS)
    assert calls == ([there] if there else []) and bool(there) == (sharpness > 1)
    torch.testing.assert_close(found, by_hand(built, ROWS), rtol=1e-9, atol=1e-4)


def test_pruned_and_split_between_two_calls() -> None:
    built = model(2)
    probs = LeafProbabilities(built)
    probs(ROWS)
    built.prune(3)
    built.split(5, generator=seeded(4))
    torch.testing.assert_close(probs(ROWS), by_hand(built, ROWS), rtol=1e-9, atol=1e-9)


def test_other_rows_are_read() -> None:
    built = model()
    probs = LeafProbabilities(built)
    probs(ROWS)
    other = ROWS.select(torch.arange(len(ROWS)).flip(0))
    torch.testing.assert_close(probs(other), by_hand(built, other), rtol=1e-9, atol=1e-9)


def test_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match="node 9 is not in the tree"):
        LeafProbabilities(model()).reach(ROWS, 9)

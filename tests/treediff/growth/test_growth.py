"""How a tree grows: which stages come, on which rows, when it stops, and what each change leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from growing import blobs, growth_of, reach, send_left, small, train, weights
from torch import Tensor
from worlds import seeded

from treediff import Stage, TreeGrowth, TreeTopology, TreeVAE
from treediff.growth import KLAnnealing
from treediff.metrics import effective_leaves

EPOCHS = {"initial": 1, "settle": 2, "subtree": 3, "intermediate": 4, "final": 5}
ROOT = TreeTopology.balanced(0)


def kinds(splits: int, every: int) -> list[str]:
    """The documented order of stages."""
    order = ["initial"]
    for i in range(1, splits + 1):
        order += ["settle", "subtree"] + ["intermediate"] * (i % every == 0)
    return [*order, "final"]


def named(**epochs: int) -> dict[str, Any]:
    return {f"{kind}_epochs": n for kind, n in epochs.items()}


# --- which stages come --------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(("leaves", "every"), [(1, 1), (3, 1), (4, 2), (5, 3), (5, 9)])
def test_stages_come_in_the_documented_order(start: int, leaves: int, every: int) -> None:
    model = small(TreeTopology.balanced(start))
    growth = growth_of(model, max_leaves=leaves, intermediate_every=every, epochs=99, **named(**EPOCHS))
    found = list(growth.stages(blobs(40, 40, 40, 40)))
    splits = max(0, leaves - 2**start)
    assert [stage.kind for stage in found] == kinds(splits, every)
    assert [stage.index for stage in found] == list(range(len(found)))
    assert [stage.epochs for stage in found] == [EPOCHS[stage.kind] for stage in found]
    assert len(model.topology.leaves) == max(leaves, 2**start)
    for stage, after in pairwise(found):
        assert (bool(stage.splits)) == (stage.kind in ("settle", "subtree"))
        if stage.kind == "settle":
            assert after.splits == stage.splits
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_epochs_that_are_not_named_are_those_of_all_stages() -> None:
    growth = growth_of(small(), epochs=7, subtree_epochs=3)
    assert {(s.kind, s.epochs) for s in growth.stages(blobs(40, 40, 40, 40))} == {
        ("initial", 7), ("settle", 7), ("subtree", 3), ("intermediate", 7), ("final", 7),
    }  # fmt: skip


@pytest.mark.parametrize("kind", EPOCHS)
def test_a_stage_without_epochs_is_skipped_and_the_tree_grows_all_the_same(kind: str) -> None:
    x, models = blobs(40, 40, 40, 40), (small(), small())
    with_it, without = (
        [(s.kind, s.index, s.splits, s.rows.tolist()) for s in growth_of(model, epochs=1, **epochs).stages(x)]
        for model, epochs in zip(models, ({}, named(**{kind: 0})), strict=True)
    )
    assert without == [stage for stage in with_it if stage[0] != kind]
    assert models[0].topology == models[1].topology


def test_each_kind_of_stage_has_its_own_kl_weight() -> None:
    initial, between, final = (KLAnnealing(start=start, step=0.01) for start in (0.1, 0.2, 0.3))
    growth = growth_of(small(), annealing=between, initial_annealing=initial, final_annealing=final)
    for stage in growth.stages(blobs(40, 40, 40, 40)):
        expected = {"initial": initial, "final": final}.get(stage.kind, between)
        assert [stage.kl_weight(epoch) for epoch in (0, 1.5)] == [expected(0), expected(1.5)]


@pytest.mark.parametrize("epochs", [1, 2, 9])
def test_the_final_stage_ends_with_the_whole_bound(epochs: int) -> None:
    (final,) = growth_of(small(), max_leaves=2, initial_epochs=0, final_epochs=epochs).stages(blobs(40, 40))
    assert epochs == 1 or final.kl_weight(epochs - 1) == pytest.approx(1)


# --- on which rows ------------------------------------------------------------------------------------------


def shares(model: TreeVAE, x: Tensor, leaves: tuple[int, ...]) -> list[float]:
    preferred = torch.stack([reach(model, x, leaf) for leaf in leaves]).argmax(0).tolist()
    return [preferred.count(place) / len(x) for place in range(len(leaves))]


@pytest.mark.parametrize("min_share", [0.0, 0.2])
@pytest.mark.parametrize("start", [0, 1])
def test_rows_follow_the_membership_rule(start: int, min_share: float) -> None:
    x = blobs(60, 30, 20, 50, dtype=torch.float64)
    model = small(TreeTopology.balanced(start), max_depth=3, dtype=torch.float64)
    growth = growth_of(model, max_leaves=5, min_share=min_share)
    above, restricted = math.nan, 0
    for stage in growth.stages(x):
        if not stage.splits:
            assert stage.rows.tolist() == list(range(len(x)))
        else:
            (split,) = stage.splits
            if stage.kind == "settle":  # the leaves are those before the split
                old = {*model.topology.leaves, split} - set(model.topology.children(split))
                effective = sum(share >= min_share for share in shares(model, x, tuple(old)))
                above = min(1 / max(1, effective), 0.5)
            belongs = [i for i, p in enumerate(reach(model, x, split).tolist()) if p >= above]
            assert stage.rows.tolist() == belongs
            restricted += len(belongs) < len(x)
        train(stage, x)
    assert restricted


def test_members_of_leaves() -> None:
    probs = torch.tensor([[0.4, 0.35, 0.25], [1.0, 0.0, 0.0], [0.3, 0.3, 0.4]])
    assert growth_of(small()).members(probs).tolist() == [
        [True, True, False],
        [True, False, False],
        [False, False, True],
    ]
    # The third leaf, with a share of 0.22, does not count here, and 1/2 is asked of everyone.
    assert growth_of(small(), min_share=0.22).members(probs).sum().item() == 1


# --- where it stops -----------------------------------------------------------------------------------------


def test_leaves_at_the_greatest_depth_are_not_split_and_growth_goes_on_with_others() -> None:
    model = small(TreeTopology.balanced(1).split(1), max_depth=2)
    # The deep leaves, 3 and 4, come first for this policy.
    deep_first = growth_of(model, max_leaves=99, policy=lambda leaves: -leaves.share)
    assert [s.splits for s in deep_first.stages(blobs(60, 60, 20, 20)) if s.kind == "settle"] == [(2,)]
    assert model.topology.leaves == (3, 4, 5, 6)


def test_leaves_with_few_rows_are_not_split_and_growth_goes_on_with_others() -> None:
    x, model = blobs(100, 30, 100), small()
    growth = growth_of(model, max_leaves=5, min_rows=40, policy=lambda leaves: -leaves.rows)
    seen = []
    for stage in growth.stages(x):
        if stage.kind == "settle":
            seen.append(len(stage.rows))
            assert len(stage.rows) >= 40
    probs = torch.stack([reach(model, x, leaf) for leaf in model.topology.leaves], 1)
    rows = growth.members(probs.float()).sum(0)
    assert seen and (rows < 40).any()  # there were leaves of both kinds


def test_growth_ends_when_no_leaf_can_be_split() -> None:
    model = small()
    assert [s.kind for s in growth_of(model, max_leaves=9, min_rows=999).stages(blobs(40, 40))] == ["initial", "final"]
    assert model.topology == TreeTopology.balanced(1)


def test_only_leaves_with_a_share_count_towards_the_greatest_number() -> None:
    x, model = blobs(60, 60), small()
    growth = growth_of(model, max_leaves=2, min_share=0.05, min_rows=8)
    seen = []
    for stage in growth.stages(x):
        seen.append((stage.kind, stage.splits))
        if stage.kind == "initial":
            send_left(model, 0, 50.0)  # leaf 2 starves: one effective leaf is not enough
    assert seen[:3] == [("initial", ()), ("settle", (1,)), ("subtree", (1,))]
    probs = model.leaf_log_probs(x).exp()
    assert effective_leaves(probs, min_share=0.05) == 2
    assert 2 not in model.topology.ids  # pruned at the end


def test_growth_ends_although_every_split_starves_a_child() -> None:
    x, model = blobs(60, 60), small(TreeTopology.balanced(0), max_depth=3)
    growth = growth_of(model, max_leaves=9, min_share=0.05, intermediate_epochs=0)
    splits = []
    for stage in growth.stages(x):
        if stage.kind == "subtree":
            splits += stage.splits
            send_left(model, *stage.splits, 50.0)
    # The child that has everything is split again until it lies too deep; a starved one never is.
    assert splits == [0, 1, 3]
    assert len(model.topology.leaves) == 1


@pytest.mark.parametrize("seed", range(4))
def test_at_the_end_no_leaf_is_below_the_least_share(seed: int) -> None:
    x, model = torch.randn(200, 3, generator=seeded(seed)), small(TreeTopology.balanced(0), seed=seed)
    for stage in growth_of(model, max_leaves=9, min_share=0.1, min_rows=1).stages(x):
        if stage.kind == "settle":  # a leaf with rows for two, and a cut that gives both their share
            assert len(stage.rows) >= 40
        train(stage, x)
    preferred = model.cluster(x)
    assert min(int((preferred == leaf).sum()) for leaf in model.topology.leaves) >= 20


def test_the_best_leaves_of_one_depth_are_split_together() -> None:
    x, model = blobs(60, 50, 40, 30, dtype=torch.float64), small(TreeTopology.balanced(1), dtype=torch.float64)
    growth, together, kinds = growth_of(model, max_leaves=7, splits_at_once=3, intermediate_every=2), [], []
    for stage in growth.stages(x):
        kinds.append(stage.kind)
        if stage.kind == "settle":
            together.append(stage.splits)
            tree = model.topology
            assert len({tree.depth(node) for node in stage.splits}) == 1
            reached = torch.stack([torch.tensor(reach(model, x, node).tolist()) for node in stage.splits])
            assert torch.equal((reached >= stage.above).any(0).nonzero().squeeze(1), stage.rows)
        train(stage, x)
    assert [len(splits) for splits in together[:2]] == [2, 3], "all of the second level, then three of four"
    assert kinds[:5] == ["initial", "settle", "subtree", "intermediate", "settle"]
    assert len(model.topology.leaves) == 7


def test_growth_gives_up_after_twice_as_many_splits_as_leaves() -> None:
    x, model = blobs(60, 60), small(TreeTopology.balanced(0), max_depth=9)
    splits = 0
    for stage in growth_of(model, max_leaves=2, min_share=0.05).stages(x):
        if stage.kind == "subtree":
            splits += 1
            send_left(model, *stage.splits, 50.0)
    assert splits == 4


def test_leaves_that_the_final_stage_empties_are_pruned() -> None:
    x, model = blobs(60, 60), small()
    for stage in growth_of(model, max_leaves=2, min_share=0.05).stages(x):
        if stage.kind == "final":
            send_left(model, 0, 50.0)
    assert model.topology == TreeTopology.balanced(1).prune(2)


def test_the_least_share_follows_from_the_number_of_leaves() -> None:
    assert [TreeGrowth(small(), max_leaves=leaves).min_share for leaves in (2, 20, 100)] == [0.01, 0.01, 0.002]


@pytest.mark.parametrize(("keep", "learning"), [("growth", ("initial", "final")), ("always", ("initial",))])
def test_clusters_that_are_kept_stay_while_all_else_trains(keep: str, learning: tuple[str, ...]) -> None:
    x, model = blobs(50, 50, 50, 50), small(TreeTopology.balanced(0))
    clusters: dict[int, Tensor] = {}
    for stage in growth_of(model, max_leaves=4, intermediate_every=1, keep_cuts=keep).stages(x):
        before = weights(model)
        train(stage, x)
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        deciding = {name for name in moved if name.startswith(("encoder", "bottom_up", "banks.posterior_routers"))}
        assert bool(deciding) == (stage.kind in learning) and moved - deciding
        found = {node: reach(model, x, node) for node in model.topology.ids}
        if stage.kind not in learning:
            for node, probs in clusters.items():
                assert torch.equal(found[node], probs)
            clusters = found
    assert len(model.topology.leaves) == 4 and all(p.requires_grad for p in model.parameters())


# --- pruning ------------------------------------------------------------------------------------------------


def test_pruning_takes_starved_leaves_and_nothing_else() -> None:
    x, model = blobs(60, 60, 60, 60), small(TreeTopology.balanced(2), width=64)
    growth = growth_of(model, max_leaves=1, min_share=0.05)
    for stage in growth.stages(x):
        if stage.kind == "initial":
            left, _ = model.topology.children(0)
            send_left(model, left, 9.0)  # nobody goes to the right leaf there
            before = weights(model)
    starved = TreeTopology.balanced(2).children(left)[1]
    assert model.topology == TreeTopology.balanced(2).prune(starved)
    after = model.state_dict()
    assert set(before) - set(after) == {
        f"banks.{bank}.{node}"
        for bank, node in [
            ("heads", starved), ("transitions", starved), ("decoders", starved),
            ("posterior_routers", left), ("prior_routers", left),
        ]
    }  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("min_share", [0.0, 0.1, 0.3, 0.9])
def test_pruning_takes_the_smallest_first_until_all_have_their_share(min_share: float) -> None:
    x, model = blobs(60, 40, 15, 5), small(TreeTopology.balanced(2))
    growth = growth_of(model, max_leaves=1, min_share=min_share, final_epochs=0)
    for _ in growth.stages(x):
        expected = copy.deepcopy(model)
    while len(leaves := expected.topology.leaves) > 1:
        counts = [int((expected.cluster(x) == leaf).sum()) for leaf in leaves]
        if min(counts) >= min_share * len(x):
            break
        expected.prune(leaves[counts.index(min(counts))])
    assert model.topology == expected.topology
    assert (len(model.topology.leaves) == 1) == (min_share == 0.9)


# --- new nodes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", ["blobs", "one cloud", "a few far away"])
def test_a_new_router_begins_as_a_cut_in_which_no_child_starves(shape: str, seed: int) -> None:
    x = blobs(50, 50, 50, 50, seed=seed) if shape == "blobs" else torch.randn(200, 3, generator=seeded(seed))
    if shape == "a few far away":
        x[:5] *= 9
    model = small(ROOT, seed=seed, width=64)
    for stage in growth_of(model, seed=seed).stages(x):
        if stage.kind != "settle":
            continue
        left, right = (reach(model, x[stage.rows], child) for child in model.topology.children(*stage.splits))
        share = (left > right).double().mean().item()
        assert 0.1 <= share <= 0.9
        assert ((left - right).abs() > 0.5 * (left + right)).double().mean() > 0.8  # a decision, not a coin


def test_a_tree_that_has_routers_already_begins_with_a_cut_at_each_of_them() -> None:
    x, model = blobs(50, 50, 50, 50), small(TreeTopology.balanced(2), width=64)
    next(growth_of(model).stages(x))
    counts = [int((model.cluster(x) == leaf).sum()) for leaf in model.topology.leaves]
    assert min(counts) > 40


@pytest.mark.parametrize("warm", [True, False])
def test_children_begin_as_copies_only_of_the_leaf_and_only_if_asked(warm: bool) -> None:
    x, model, before, drawn = blobs(40, 40, 40, 40), small(), {}, []
    for stage in growth_of(model, warm_start=warm).stages(x):
        after = model.state_dict()
        if stage.kind == "settle":
            assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
            (split,) = stage.splits
            left, right = model.topology.children(split)
            for role in ("heads", "decoders"):
                for child in (left, right):
                    assert torch.equal(after[f"banks.{role}.{child}"], before[f"banks.{role}.{split}"]) == warm
            new = [after[f"banks.transitions.{child}"].clone() for child in (left, right)]
            assert not any(torch.equal(new[0], other) for other in (new[1], *drawn))
            drawn += new
            assert warm or not torch.equal(after[f"banks.decoders.{left}"], after[f"banks.decoders.{right}"])
        train(stage, x)
        before = weights(model)


@pytest.mark.parametrize("policy", ["largest", "highest_loss"])
def test_the_global_random_state_is_left_alone(policy: str) -> None:
    x, state = blobs(40, 40, 40, 40), torch.get_rng_state()
    for stage in growth_of(small(), policy=policy).stages(x):
        train(stage, x)
    assert torch.equal(torch.get_rng_state(), state)


def grown(x: Tensor, seed: int) -> Iterator[tuple[Stage, dict[str, Tensor]]]:
    model = small()
    for stage in growth_of(model, seed=seed).stages(x):
        train(stage, x)
        yield stage, weights(model)


def test_the_seed_decides() -> None:
    x = blobs(40, 40, 40, 40)
    first, again, other = (list(grown(x, seed))[-1][1] for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first.keys() & other.keys())


def test_images_grow_too() -> None:
    x = torch.rand(60, 1, 8, 8, generator=seeded())
    model = TreeVAE.for_images(size=8, latent=2, width=8, max_depth=2, generator=seeded())
    for stage in growth_of(model, max_leaves=3).stages(x):
        train(stage, x)
    assert len(model.topology.leaves) == 3

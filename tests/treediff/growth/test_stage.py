"""One stage of training: what trains, on which batches, and the loss of a split against a loop over its nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import blobs, send_left, small, train, weights
from hypothesis import given
from hypothesis import strategies as st
from models import build, louder, observations
from strategies import quick
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence
from worlds import seeded

from treediff import Stage, TreeTopology, TreeVAE
from treediff.growth import KLAnnealing
from treediff.testing import NaiveTreeVAE

TREE = TreeTopology.balanced(2).split(4)
# A split is one of a node above two leaves: at the root, in a tree, further down, and below a node that passes through.
SPLITS = [(TreeTopology.balanced(1), 0), (TREE, 2), (TREE, 4), (TREE.prune(3), 4)]
BANKS = ("heads", "transitions", "posterior_routers", "prior_routers", "decoders")


def stage_of(model: TreeVAE, kind: str, split: int | None = None, **settings: Any) -> Stage:  # noqa: ANN401
    given = {
        "index": 0,
        "epochs": 1,
        "rows": torch.arange(5),
        "annealing": KLAnnealing.constant(),
        "splits": () if split is None else (split,),
    }
    return Stage(model, kind, **{**given, **settings})  # type: ignore[arg-type]


def trained_names(kind: str, split: int, tree: TreeTopology) -> set[str]:
    """What the documentation says trains in a settle or subtree stage."""
    names = {f"banks.{bank}.{child}" for bank in ("heads", "transitions", "decoders") for child in tree.children(split)}
    names.add(f"banks.prior_routers.{split}")
    return names | {f"banks.posterior_routers.{split}"} if kind == "subtree" else names


# --- what trains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tree", "split"), SPLITS)
@pytest.mark.parametrize("kind", ["settle", "subtree"])
def test_a_split_trains_its_routers_and_children_and_leaves_every_other_bit(
    kind: str, tree: TreeTopology, split: int
) -> None:
    model, x = small(tree), blobs(20, 20, 20, 20)
    whole = stage_of(model, "initial", rows=torch.arange(len(x)))
    whole.loss(x, generator=seeded()).backward()  # gradients that somebody forgot to clear
    stage = stage_of(model, kind, split, rows=torch.arange(len(x)))
    expected = trained_names(kind, split, model.topology)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {id(p) for p in stage.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len({id(p) for p in stage.parameters()}) == len(stage.parameters())

    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)  # of all parameters, to be mean
    for step in range(4):
        stage.loss(x, generator=seeded(step)).backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == expected


@pytest.mark.parametrize("kind", ["initial", "intermediate", "final"])
def test_the_other_stages_train_everything(kind: str) -> None:
    model, x = small(TREE), blobs(20, 20, 20, 20)
    stage_of(model, "settle", 4)
    stage = stage_of(model, kind, rows=torch.arange(len(x)))
    assert all(p.requires_grad for p in model.parameters())
    assert [id(p) for p in stage.parameters()] == [id(p) for p in model.parameters()]
    before = weights(model)
    train(stage, x)
    # One weight has nothing to do in this tree: the last rung of the ladder is above the root.
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- the loss -----------------------------------------------------------------------------------------------


def naive_loss(model: NaiveTreeVAE, x: Tensor, noise: dict[int, Tensor], split: int, kl_weight: float) -> Tensor:
    """The terms of the bound that a split takes part in, node by node with plain probabilities."""
    tree = model.topology
    ladder = [model.encoder(x)]
    for block in model.bottom_up:
        ladder.insert(0, block(ladder[0]))

    def latent(node: int, parent: Tensor | None) -> tuple[Tensor, Tensor]:
        posterior, prior = model._gaussians(node, ladder[tree.depth(node)], parent)
        return posterior.mean + posterior.stddev * noise[node], kl_divergence(posterior, prior).sum(1)

    path = tree.path(split)
    probability, z = torch.ones(len(x), dtype=x.dtype), None
    for node in path:
        z, _ = latent(node, z)
        if node == split:
            break
        children = tree.children(node)
        if len(children) == 2:
            left = torch.sigmoid(model.posterior_routers[str(node)](ladder[tree.depth(node)]))
            probability = probability * (left if path[tree.depth(node) + 1] == children[0] else 1 - left)
    q = torch.sigmoid(model.posterior_routers[str(split)](ladder[tree.depth(split)]))
    p = torch.sigmoid(model.prior_routers[str(split)](z))
    kl, reconstruction = probability * kl_divergence(Bernoulli(q), Bernoulli(p)), torch.zeros(len(x), dtype=x.dtype)
    for child, turn in zip(tree.children(split), (q, 1 - q), strict=True):
        z_child, kl_child = latent(child, z)
        kl = kl + probability * turn * kl_child
        output = model.decoders[str(child)](z_child)
        reconstruction = reconstruction - probability * turn * model.likelihood.log_prob(output, x)
    return (reconstruction + kl_weight * kl).mean()


def noise_of(model: TreeVAE, splits: tuple[int, ...], n: int, seed: int) -> dict[int, Tensor]:
    """What the stage draws: for the nodes of the paths and the children, level by level, and for each row."""
    tree = model.topology
    below = {node for split in splits for node in (*tree.path(split), *tree.children(split))}
    nodes = [node for level in tree.levels for node in level if node in below]
    noise = torch.randn(len(nodes) * n, *model.latent, generator=seeded(seed), dtype=model.dtype)
    return dict(zip(nodes, noise.split(n), strict=True))


@pytest.mark.parametrize(("tree", "split"), SPLITS)
@pytest.mark.parametrize("kind", ["settle", "subtree"])
@pytest.mark.parametrize("data", ["vectors", "mlp"])
def test_the_loss_of_a_split_is_that_of_the_loop(data: str, kind: str, tree: TreeTopology, split: int) -> None:
    model = louder(build(tree, data), 2.0, only="routers")
    x, naive = observations(model, 5), NaiveTreeVAE(model)
    found = stage_of(model, kind, split).loss(x, 0.3, generator=seeded(7))
    expected = naive_loss(naive, x, noise_of(model, (split,), 5, 7), split, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    found.backward()
    expected.backward()
    names = trained_names(kind, split, model.topology)
    for role in BANKS:
        bank = getattr(model.banks, role)
        for node in bank.nodes:
            flat = bank.weights_of(node).grad
            assert (flat is not None) == (f"banks.{role}.{node}" in names)
            if flat is not None:
                views = {name: view[0] for name, view in bank._views(flat[None]).items()}
                for name, parameter in getattr(naive, role)[str(node)].named_parameters():
                    torch.testing.assert_close(views[name], parameter.grad, rtol=1e-7, atol=1e-9)
                assert flat.any()


def test_splits_of_one_depth_are_trained_together_as_each_alone() -> None:
    tree, splits = TreeTopology.balanced(3), (3, 5, 6)
    model = louder(build(tree), 2.0, only="routers")
    x, naive = observations(model, 5), NaiveTreeVAE(model)
    stage = stage_of(model, "subtree", splits=splits)
    expected = sum(naive_loss(naive, x, noise_of(model, splits, 5, 7), split, 0.3) for split in splits)
    torch.testing.assert_close(stage.loss(x, 0.3, generator=seeded(7)), expected, rtol=1e-9, atol=1e-9)
    names = set.union(*(trained_names("subtree", split, tree) for split in splits))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    assert {id(p) for p in stage.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["initial", "intermediate", "final"])
def test_the_loss_of_the_whole_tree_is_the_negative_elbo(kind: str) -> None:
    model = build(TREE)
    x = observations(model, 5)
    found = stage_of(model, kind).loss(x, 0.3, generator=seeded(7))
    torch.testing.assert_close(found, model.elbo(x, generator=seeded(7)).loss(0.3), rtol=0, atol=0)


def test_the_parts_of_a_split_add_up_to_the_bound_of_a_tree_with_one() -> None:
    model = build(TreeTopology.balanced(1))
    x = observations(model, 6)
    elbo = model.elbo(x, generator=seeded(7))
    found = stage_of(model, "subtree", 0).loss(x, generator=seeded(7))
    torch.testing.assert_close(found, (-elbo.elbo - elbo.kl_root).mean())


@pytest.mark.parametrize(("tree", "split"), SPLITS)
def test_no_network_runs_in_vain(tree: TreeTopology, split: int) -> None:
    model, ran = small(tree), {}
    for name in BANKS:
        getattr(model.banks, name).register_forward_pre_hook(
            lambda _, args, name=name: ran.setdefault(name, []).append((sorted(args[2]), len(args[0])))
        )
    stage_of(model, "subtree", split).loss(blobs(2, 3), generator=seeded())
    path, children = list(tree.path(split)), list(tree.children(split))
    assert ran["decoders"] == [(children, 10)]
    assert ran["heads"] == [(sorted(path + children), 5 * len(path + children))]
    deciding = [node for node in path if node in tree.routed or node == split]
    assert ran["posterior_routers"] == [(sorted(deciding), 5 * len(deciding))]
    assert [nodes for nodes, _ in ran["transitions"]] == [[node] for node in path[1:]] + [children]


def test_rows_below_the_threshold_run_no_child() -> None:
    model, rows = small(TREE), []
    send_left(model, 0, 20.0)
    model.banks.decoders.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    x = blobs(2, 3)
    exact, skipped = (stage_of(model, "subtree", 2, threshold=t).loss(x, generator=seeded()) for t in (0.0, 1e-3))
    assert rows == [10, 0]
    assert skipped == 0 and exact.abs() < 1e-5


# --- batches ------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 99), min_size=1, unique=True), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_batches_cover_the_rows_once(rows: list[int], batch_size: int, epoch: int, seed: int) -> None:
    model = nn.Module()  # batches ask nothing of the model
    stage = stage_of(model, "final", rows=torch.tensor(rows), seed=seed)  # type: ignore[arg-type]
    found = list(stage.batches(epoch, batch_size))
    assert sorted(torch.cat(found).tolist()) == sorted(rows)
    assert {len(batch) for batch in found[:-1]} <= {batch_size} and len(found[-1]) <= batch_size


def test_the_order_depends_on_seed_stage_and_epoch_alone() -> None:
    def order(epoch: int, batch_size: int = 7, **settings: Any) -> list[int]:  # noqa: ANN401
        model = small(seed=settings.pop("model", 0))
        stage = stage_of(model, settings.pop("kind", "final"), rows=torch.arange(50, 90), **settings)
        return torch.cat(list(stage.batches(epoch, batch_size))).tolist()

    usual, state = order(3, index=2, seed=1), torch.get_rng_state()
    assert order(3, index=2, seed=1) == usual
    assert order(3, batch_size=40, index=2, seed=1, model=5, kind="initial", threshold=0.1) == usual
    others = [order(2, index=2, seed=1), order(3, index=3, seed=1), order(3, index=2, seed=2)]
    assert usual not in others and others[0] != others[1] != others[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_batch_is_an_error() -> None:
    stage = stage_of(small(TREE), "subtree", 4)
    with pytest.raises(ValueError, match=r"expected observations of shape \(batch, 3\), found \(2, 4\)"):
        stage.loss(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        next(stage.batches(0, 0))

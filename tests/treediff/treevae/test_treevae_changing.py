"""What growing and pruning change, and above all what they leave as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, PRUNED, build, few, noise_for, observations
from strategies import topologies
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE

SEEDS = st.integers(0, 2**32)


def noise_by_node(model: TreeVAE, by_node: dict[int, Tensor]) -> Tensor:
    """The same noise for the same node, whatever else the tree has; new nodes get zeros."""
    some = next(iter(by_node.values()))
    return torch.stack([by_node.get(node, torch.zeros_like(some)) for node in model.topology], 1)


def named_noise(model: TreeVAE, n: int) -> dict[int, Tensor]:
    return dict(zip(model.topology, noise_for(model, n).unbind(1), strict=True))


def weights(model: TreeVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["vectors", "mlp", "maps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tree", [TreeTopology.balanced(1), GROWN, PRUNED], ids=["two", "grown", "pruned"])
def test_splitting_leaves_the_rest_as_it_was(tree: TreeTopology, dtype: torch.dtype, kind: str) -> None:
    model = build(tree, kind, dtype=dtype)
    x, noise = observations(model, 5), named_noise(model, 5)
    split, *others = tree.leaves
    before = model.posterior(x, noise=noise_by_node(model, noise))
    log_probs, held = model.leaf_log_probs(x), weights(model)
    pictures = {leaf: model.reconstruct(x, leaf=leaf, generator=seeded(1)) for leaf in others}
    drawn = {leaf: model.sample(4, node=leaf, generator=seeded(2)).images for leaf in others}

    children = model.split(split, generator=seeded(3))

    after = model.posterior(x, noise=noise_by_node(model, noise))
    # All paths of a batch are computed side by side, and where a row lies decides how `exp` rounds it: the last bit may
    # change. A path on its own lies where it lay.
    last = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    for node in tree:
        torch.testing.assert_close(after.latents(node), before.latents(node), **last)
    for leaf in others:
        assert torch.equal(model.reconstruct(x, leaf=leaf, generator=seeded(1)), pictures[leaf]), leaf
        assert torch.equal(model.sample(4, node=leaf, generator=seeded(2)).images, drawn[leaf]), leaf
    columns = {leaf: k for k, leaf in enumerate(model.topology.leaves)}
    grown = model.leaf_log_probs(x)
    for k, leaf in enumerate(tree.leaves):
        if leaf != split:
            torch.testing.assert_close(grown[:, columns[leaf]], log_probs[:, k], **last)
    shared = grown[:, [columns[child] for child in children]].logsumexp(1)
    torch.testing.assert_close(shared, log_probs[:, 0], **last)
    now = weights(model)
    gone = {f"banks.decoders.{split}"}
    assert held.keys() - now.keys() == gone
    assert all(torch.equal(now[name], value) for name, value in held.items() if name not in gone)


def test_a_split_makes_exactly_the_networks_it_needs() -> None:
    model = build(TreeTopology.balanced(1))
    held = weights(model).keys()
    assert model.split(2) == (3, 4)
    fresh = {f"banks.{bank}.{node}" for bank in ("heads", "transitions", "decoders") for node in (3, 4)}
    assert weights(model).keys() - held == fresh | {"banks.posterior_routers.2", "banks.prior_routers.2"}


def test_warm_children_begin_as_copies_of_the_leaf() -> None:
    model = build(TreeTopology.balanced(1))
    head, decoder = model.banks.heads.weights_of(1).clone(), model.banks.decoders.weights_of(1).clone()
    for child in model.split(1, warm_start=True):
        assert torch.equal(model.banks.heads.weights_of(child), head)
        assert torch.equal(model.banks.decoders.weights_of(child), decoder)
        assert model.banks.heads.weights_of(child).requires_grad
    cold = build(TreeTopology.balanced(1))
    left, right = cold.split(1, generator=seeded(4))
    assert not torch.equal(cold.banks.decoders.weights_of(left), cold.banks.decoders.weights_of(right))


def test_children_follow_the_generator_and_the_dtype() -> None:
    def grown(seed: int) -> dict[str, Tensor]:
        model = build(TreeTopology.balanced(1))
        state = torch.get_rng_state()
        model.split(1, generator=seeded(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return weights(model)

    first, again, other = grown(0), grown(0), grown(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["banks.decoders.3"], other["banks.decoders.3"])
    assert {value.dtype for value in first.values()} == {torch.float64}


@few
@given(topologies(max_steps=7), st.integers(0, 63), SEEDS)
def test_pruning_gives_a_leafs_probability_to_its_sibling(tree: TreeTopology, number: int, seed: int) -> None:
    if len(tree.leaves) == 1:
        tree = tree.split(tree.leaves[0])
    model = build(tree, seed=seed)
    x, noise = observations(model, 3), named_noise(model, 3)
    gone = tree.leaves[number % len(tree.leaves)]
    before, probabilities = model.posterior(x, noise=noise_by_node(model, noise)), model.leaf_log_probs(x).exp()
    column = {leaf: k for k, leaf in enumerate(tree.leaves)}

    model.prune(gone)

    # The last decision on the way to the leaf is no longer taken.
    path = tree.path(gone)
    decided = max(path.index(node) for node in path if node in tree.routed)
    heirs = [leaf for leaf in tree.leaves_under(path[decided]) if leaf not in tree.leaves_under(path[decided + 1])]
    reached = probabilities[:, [column[leaf] for leaf in tree.leaves_under(path[decided])]].sum(1)
    kept = probabilities[:, [column[leaf] for leaf in heirs]].sum(1)
    now = model.leaf_log_probs(x).exp()
    assert model.topology.leaves == tuple(leaf for leaf in tree.leaves if leaf != gone)
    for k, leaf in enumerate(model.topology.leaves):
        share = reached / kept if leaf in heirs else 1.0
        torch.testing.assert_close(now[:, k], probabilities[:, column[leaf]] * share, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(now.sum(1), torch.ones(3).double())

    # Latents do not change: a decision is no part of them.
    after = model.posterior(x, noise=noise_by_node(model, noise))
    for node in model.topology:
        torch.testing.assert_close(after.latents(node), before.latents(node), rtol=1e-12, atol=1e-12)


def test_pruning_drops_the_networks_of_what_is_gone_and_no_other() -> None:
    model = build(TreeTopology.balanced(2))
    held = weights(model)
    model.prune(3)
    after_one = weights(model)
    roles = ("heads", "transitions", "decoders")
    assert held.keys() - after_one.keys() == {f"banks.{role}.3" for role in roles} | {
        f"banks.{kind}_routers.1" for kind in ("posterior", "prior")
    }
    model.prune(4)  # node 1 has no child left and goes as well
    assert model.topology.leaves == (5, 6) and 1 not in model.topology
    now = weights(model)
    assert all(torch.equal(now[name], held[name]) for name in now)
    assert {name.rsplit(".", 1)[1] for name in now if name.startswith("banks.heads.")} == {"0", "2", "5", "6"}


@few
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63)), max_size=6), SEEDS)
def test_any_history_gives_a_model_that_computes(history: list[tuple[bool, int]], seed: int) -> None:
    """A model built on the tree that growth ended with, given the same weights, agrees bit by bit."""
    model = build(TreeTopology.balanced(1), seed=seed)
    for splits, number in history:
        leaf = model.topology.leaves[number % len(model.topology.leaves)]
        if splits and model.topology.depth(leaf) < len(model.bottom_up):
            model.split(leaf, generator=seeded(number))
        elif not splits and len(model.topology.leaves) > 1:
            model.prune(leaf)
        model.banks.plan(None, torch.device("cpu"))  # a layout that the next step must not go on using
    x, noise = observations(model, 2), noise_for(model, 2)
    twin = build(model.topology, seed=seed + 1)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.elbo(x, noise=noise).elbo, model.elbo(x, noise=noise).elbo)


def test_errors_teach_and_change_nothing() -> None:
    model = build(TreeTopology.balanced(1).split(1))
    held, tree = weights(model), model.topology
    lone = build(TreeTopology.balanced(0))
    deepest = TreeVAE.for_vectors(features=3, max_depth=1, width=4, topology=TreeTopology.balanced(1))
    with pytest.raises(KeyError, match="node 9 is not in the tree"):
        model.split(9)
    with pytest.raises(ValueError, match="node 1 is not a leaf"):
        model.split(1)
    with pytest.raises(ValueError, match="a tree of depth 2 needs as many bottom-up blocks, this model has 1"):
        deepest.split(1)
    with pytest.raises(KeyError, match="node 9 is not in the tree"):
        model.prune(9)
    with pytest.raises(ValueError, match="node 0 is not a leaf"):
        model.prune(0)
    with pytest.raises(ValueError, match="node 0 is the only leaf"):
        lone.prune(0)
    assert model.topology == tree and deepest.topology == TreeTopology.balanced(1)
    assert all(torch.equal(value, held[name]) for name, value in weights(model).items())
    assert deepest.cluster(torch.zeros(1, 3)).item() in (1, 2)


def test_a_model_takes_on_the_tree_of_weights_to_be_loaded() -> None:
    model, other = build(PRUNED), build(TreeTopology.balanced(1), seed=3)
    other.become(PRUNED)
    other.load_state_dict(model.state_dict())
    x = observations(model, 2)
    assert other.topology == PRUNED and torch.equal(other.leaf_log_probs(x), model.leaf_log_probs(x))
    with pytest.raises(ValueError, match="a tree of depth 9 needs as many bottom-up blocks, this model has"):
        other.become(TreeTopology.chain(9))
    assert other.topology == PRUNED

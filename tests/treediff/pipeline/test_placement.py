"""Where images belong: conditions from posterior and prior against loops over images, node by node."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from models import GROWN, PRUNED, build, observations
from pairs import pair
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.noise import counter_normal, counter_uniform, seed_from
from treediff.pipeline.conditions import condition_of, condition_of_sample

TREES = {"lone root": TreeTopology.balanced(0), "chain": TreeTopology.chain(2), "grown": GROWN, "pruned": PRUNED}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # in float64, where a product over more rows may add in another order


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


# --- the posterior as a condition ---------------------------------------------------------------------------


def slow_leaf(model: TreeVAE, x: Tensor, mode: str | Tensor, seed: int, index: int, i: int) -> int:
    """One image's leaf: counted through its probabilities one by one."""
    if isinstance(mode, Tensor):
        return int(mode[i])
    shares = model.leaf_log_probs(x)[0].exp().tolist()
    if mode == "argmax":
        return model.topology.leaves[shares.index(max(shares))]
    point = float(counter_uniform(seed, torch.tensor([index]), draw=-1, dtype=torch.float64))
    for leaf, share in zip(model.topology.leaves, shares, strict=True):
        if point < share:
            return leaf
        point -= share
    raise AssertionError("the shares do not add up to 1")


def check_condition(model: TreeVAE, x: Tensor, mode: str | Tensor, first: int = 5) -> None:
    """Image by image, from `posterior` along the one path and the leaf's own decoder."""
    tree, seed = model.topology, seed_from(seeded(8))
    found = condition_of(model, x, leaf=mode, first_index=first, generator=seeded(8))
    assert found.z is not None and found.z.shape == (len(x), tree.max_depth + 1, *model.latent)
    assert found.weights is not None and found.is_known().all() and not found.z.requires_grad
    for i in range(len(x)):
        row, index = x[i : i + 1], torch.tensor([first + i])
        leaf = slow_leaf(model, row, mode, seed, first + i, i)
        assert found.node[i] == leaf
        noise = [counter_normal(seed, index, model.latent, draw=node, dtype=torch.float64) for node in tree.ids]
        posterior = model.posterior(row, leaf=torch.tensor([leaf]), noise=torch.stack(noise, 1))
        path = tree.path(leaf)
        for depth, node in enumerate(path):
            close(found.z[i, depth], posterior.latents(node)[0])
        assert not found.z[i, len(path) :].any()
        close(
            found.require_image()[i],
            model.likelihood.mean(model.banks.decoders.module(leaf)(posterior.latents(leaf)))[0],
        )
        close(found.weights[i], model.leaf_log_probs(row)[0].exp())


@torch.no_grad()
@each_tree
@pytest.mark.parametrize("mode", ["sample", "argmax", "ids"])
def test_a_condition_equals_the_loop_over_images(mode: str, tree: TreeTopology) -> None:
    model = pair(tree).tree_vae
    ids = torch.tensor([tree.leaves[i % len(tree.leaves)] for i in range(7)])
    check_condition(model, observations(model, 7), ids if mode == "ids" else mode)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vectors", "mlp", "maps", "colour"])
def test_a_condition_of_other_models(kind: str) -> None:
    model = build(PRUNED, kind)
    check_condition(model, observations(model, 3), "sample")


@torch.no_grad()
def test_leaves_are_drawn_by_their_probability() -> None:
    model, n = pair().tree_vae, 6000
    for x in observations(model, 2, seed=4):
        found = condition_of(model, x.expand(n, *x.shape), generator=seeded(1))
        shares = model.leaf_log_probs(x[None])[0].exp()
        counts = torch.tensor([int((found.node == leaf).sum()) for leaf in GROWN.leaves], dtype=torch.float64)
        assert float(((counts - n * shares) ** 2 / (n * shares)).sum()) < 16.3  # one in a thousand, 3 degrees
        assert shares.max() < 0.8 and shares.min() > 0.02
    # Neighbours are drawn on their own.
    pairs = Counter(zip((found.node[:-1] == 5).tolist(), (found.node[1:] == 5).tolist(), strict=True))
    share = float(shares[GROWN.leaves.index(5)])
    assert pairs[True, True] / n == pytest.approx(share**2, abs=0.02)


@torch.no_grad()
def test_a_condition_does_not_depend_on_the_batch() -> None:
    model = pair().tree_vae
    x = observations(model, 9)
    whole = condition_of(model, x, generator=seeded(2))
    for first, n in ((0, 1), (4, 1), (2, 5), (9, 0)):
        part = condition_of(model, x[first : first + n], first_index=first, generator=seeded(2))
        expected = whole[slice(first, first + n)]
        assert torch.equal(part.node, expected.node)
        for name in ("z", "image", "weights"):
            close(getattr(part, name), getattr(expected, name))


@each_tree
def test_a_sample_as_a_condition_is_as_long_as_the_tree_is_deep(tree: TreeTopology) -> None:
    model = pair(tree).tree_vae
    for node in (tree.root, tree.leaves[0], tree.leaves[-1]):
        drawn = model.sample(4, node=node, generator=seeded(3))
        found = condition_of_sample(drawn, tree)
        assert found.z is not None and found.z.shape == (4, tree.max_depth + 1, *model.latent)
        assert torch.equal(found.z[:, : drawn.z.shape[1]], drawn.z) and not found.z[:, drawn.z.shape[1] :].any()
        assert found.node is drawn.leaf and found.image is drawn.images and found.weights is None


# --- conditions from the prior ------------------------------------------------------------------------------


def slow_path(model: TreeVAE, row: Tensor, leaf: int, seed: int, index: int, from_prior: bool) -> list[Tensor]:
    """One image's latents on the way to a leaf, node by node with ordinary modules."""
    features, latents = model.features(row), []
    for depth, node in enumerate(model.topology.path(leaf)):
        noise = counter_normal(seed, torch.tensor([index]), model.latent, draw=node, dtype=torch.float64)
        mean, logvar = model.banks.heads.module(node)(features[depth]).chunk(2, 1)
        if depth:
            prior_mean, prior_logvar = model.banks.transitions.module(node)(latents[-1]).chunk(2, 1)
            precision, prior_precision = torch.exp(-logvar) * (not from_prior), torch.exp(-prior_logvar)
            total = precision + prior_precision
            mean, logvar = (precision * mean + prior_precision * prior_mean) / total, -total.log()
        latents.append(mean + torch.exp(logvar / 2) * noise)
    return latents


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "vectors", "maps"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@each_tree
def test_prior_paths_equal_the_loop_over_images_and_nodes(tree: TreeTopology, share: float, kind: str) -> None:
    model, seed, first = build(tree, kind), seed_from(seeded(8)), 5
    x = observations(model, 8)
    found = condition_of(model, x, prior_share=share, first_index=first, generator=seeded(8))
    assert found.z is not None and found.weights is not None
    chosen = [float(counter_uniform(seed, torch.tensor([first + i]), draw=-2, dtype=torch.float64)) for i in range(8)]
    assert min(chosen) < 0.5 < max(chosen)
    for i, point in enumerate(chosen):
        leaf = slow_leaf(model, x[i : i + 1], "sample", seed, first + i, i)
        latents = slow_path(model, x[i : i + 1], leaf, seed, first + i, point < share)
        assert found.node[i] == leaf
        close(found.z[i, : len(latents)], torch.cat(latents))
        assert not found.z[i, len(latents) :].any()
        close(found.require_image()[i], model.likelihood.mean(model.banks.decoders.module(leaf)(latents[-1]))[0])
        close(found.weights[i], model.leaf_log_probs(x[i : i + 1])[0].exp())


@torch.no_grad()
@each_tree
@pytest.mark.parametrize("mode", ["sample", "argmax"])
def test_other_images_and_all_that_prior_paths_share_with_them_stay_bit_for_bit(mode: str, tree: TreeTopology) -> None:
    model, n = pair(tree).tree_vae, 60
    x = observations(model, n)
    plain, none, some, all_ = (
        condition_of(model, x, leaf=mode, generator=seeded(2), **share)
        for share in ({}, {"prior_share": 0}, {"prior_share": 0.5}, {"prior_share": 1})
    )
    for name in ("node", "z", "image", "weights"):
        assert torch.equal(getattr(plain, name), getattr(none, name))
    for found in (some, all_):
        assert found.z is not None and plain.z is not None
        assert torch.equal(found.node, plain.node) and torch.equal(found.weights, plain.weights)
        assert torch.equal(found.z[:, 0], plain.z[:, 0])
    if len(tree) == 1:
        assert torch.equal(all_.z, plain.z) and torch.equal(all_.image, plain.image)
        return
    same = (some.z == plain.z).flatten(1).all(1)
    assert 15 <= int(same.sum()) <= 45 and not (all_.z == plain.z).flatten(1).all(1).any()
    assert torch.equal(some.image[same], plain.image[same])
    close(some.z[~same], all_.z[~same])
    close(some.image[~same], all_.image[~same])


@torch.no_grad()
def test_prior_paths_are_drawn_for_each_image_and_apart_from_its_leaf() -> None:
    model, n, share = pair().tree_vae, 6000, 0.3
    x = observations(model, 1).expand(n, *model.inputs)
    plain, found = (condition_of(model, x, prior_share=s, generator=seeded(1)) for s in (0.0, share))
    from_prior = (found.z[:, 1] != plain.z[:, 1]).flatten(1).all(1)
    assert float(from_prior.double().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    for leaf in GROWN.leaves:
        here = from_prior[found.node == leaf]
        assert float(here.double().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / len(here)) ** 0.5)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_prior_paths_do_not_depend_on_the_batch(share: float) -> None:
    model = pair().tree_vae
    x = observations(model, 9)
    whole = condition_of(model, x, prior_share=share, generator=seeded(2))
    for first, n in ((0, 1), (4, 1), (2, 5), (9, 0)):
        part = condition_of(model, x[first : first + n], prior_share=share, first_index=first, generator=seeded(2))
        for name in ("node", "z", "image", "weights"):
            close(getattr(part, name), getattr(whole[slice(first, first + n)], name))


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    model = pair()
    x = observations(model.tree_vae, 2)
    for call in (model.loss, lambda x, **s: condition_of(model.tree_vae, x, **s)):
        with pytest.raises(ValueError, match=re.escape(f"prior_share must be between 0 and 1, found {share}")):
            call(x, prior_share=share)

"""Both stages together: ways to generate against one stage after the other, and against each other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import GROWN, PRUNED, build, observations
from pairs import pair, small
from torch import Tensor
from worlds import seeded

from treediff import DiffuseTreeVAE, TreeTopology
from treediff.core.noise import seed_from
from treediff.diffusion import DDPMSampler
from treediff.layers.grouped.bank import NodeBank
from treediff.pipeline.conditions import condition_of, condition_of_sample
from treediff.pipeline.model import Refined

TREES = {"lone root": TreeTopology.balanced(0), "chain": TreeTopology.chain(2), "grown": GROWN, "pruned": PRUNED}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # in float64, where a product over more rows may add in another order


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def check_same(found: Refined, expected: Refined) -> None:
    close(found.images, expected.images)
    close(found.coarse, expected.coarse)
    assert torch.equal(found.leaf, expected.leaf)


def part_of(whole: Refined, rows: slice) -> Refined:
    return Refined(whole.images[rows], whole.coarse[rows], whole.leaf[rows])


# --- three ways to generate ---------------------------------------------------------------------------------


@each_tree
@pytest.mark.parametrize("condition", ["reconstruction_path", "diffuse_tree_vae"])
def test_generating_is_one_stage_after_the_other(condition: str, tree: TreeTopology) -> None:
    model = pair(tree, condition=condition)
    for node in (None, tree.root, tree.leaves[-1], tree.path(tree.leaves[-1])[-1 - (len(tree) > 1)]):
        found = model.generate(4, node=node, temperature=0.7, first_index=3, generator=seeded(1), steps=3)
        seed = seed_from(seeded(1))
        drawn = model.tree_vae.sample(4, node=node, temperature=0.7, first_index=3, generator=seeded(seed))
        told = condition_of_sample(drawn, tree)
        images = model.ddpm.sample(told, first_index=3, generator=seeded(seed), steps=3)
        check_same(found, Refined(images, drawn.images, drawn.leaf))
        assert set(found.leaf.tolist()) <= set(tree.leaves_under(tree.root if node is None else node))
        assert found.images.min() >= 0 and found.images.max() <= 1
    leaf = tree.leaves[-1]
    check_same(
        model.generate(3, leaf=leaf, generator=seeded(1), steps=2),
        model.generate(3, node=leaf, generator=seeded(1), steps=2),
    )


@each_tree
def test_every_column_of_a_tree_is_that_leaf_generated(tree: TreeTopology) -> None:
    model = pair(tree)
    settings: dict[str, Any] = {"temperature": 0.8, "first_index": 2, "steps": 3, "sampler": DDPMSampler()}
    every = model.generate_tree(4, generator=seeded(4), **settings)
    assert every.images.shape == (4, len(tree.leaves), *model.tree_vae.inputs) == every.coarse.shape
    for k, leaf in enumerate(tree.leaves):
        column = Refined(every.images[:, k], every.coarse[:, k], every.leaf[:, k])
        check_same(column, model.generate(4, leaf=leaf, generator=seeded(4), **settings))


@each_tree
def test_every_column_of_a_refinement_is_that_leaf_refined(tree: TreeTopology) -> None:
    model = pair(tree)
    x = observations(model.tree_vae, 4)
    settings: dict[str, Any] = {"first_index": 2, "steps": 3, "sampler": DDPMSampler()}
    every = model.refine(x, leaf="all", generator=seeded(4), **settings)
    for k, leaf in enumerate(tree.leaves):
        column = Refined(every.images[:, k], every.coarse[:, k], every.leaf[:, k])
        check_same(column, model.refine(x, leaf=torch.full((4,), leaf), generator=seeded(4), **settings))


@pytest.mark.parametrize("mode", ["sample", "argmax"])
def test_refining_is_one_stage_after_the_other(mode: str) -> None:
    model = pair()
    x, seed = observations(model.tree_vae, 5), seed_from(seeded(6))
    found = model.refine(x, leaf=mode, first_index=4, generator=seeded(6), steps=2)
    told = condition_of(model.tree_vae, x, leaf=mode, first_index=4, generator=seeded(seed))
    images = model.ddpm.sample(told, first_index=4, generator=seeded(seed), steps=2)
    check_same(found, Refined(images, told.require_image(), told.node))
    if mode == "argmax":
        assert torch.equal(found.leaf, model.tree_vae.cluster(x))
    else:  # by default
        check_same(model.refine(x, first_index=4, generator=seeded(6), steps=2), found)


@pytest.mark.parametrize("way", ["generate", "generate_tree", "refine", "refine all"])
def test_an_image_does_not_depend_on_its_batch(way: str) -> None:
    model = pair()
    x = observations(model.tree_vae, 7)

    def draw(first: int, n: int, seed: int = 5) -> Refined:
        settings: dict[str, Any] = {"first_index": first, "generator": seeded(seed), "steps": 2}
        settings["sampler"] = DDPMSampler("large")
        if way.startswith("refine"):
            return model.refine(x[first : first + n], leaf="all" if "all" in way else "sample", **settings)
        found: Refined = getattr(model, way)(n, **settings)
        return found

    whole, again = draw(0, 7), draw(0, 7)
    assert torch.equal(whole.images, again.images) and torch.equal(whole.leaf, again.leaf)
    for first, n in ((0, 1), (3, 1), (2, 4), (6, 1), (7, 0)):
        check_same(draw(first, n), part_of(whole, slice(first, first + n)))
    assert not torch.isclose(draw(0, 7, seed=6).images, whole.images).all()


def test_settings_reach_the_second_stage() -> None:
    model = pair()
    x = observations(model.tree_vae, 2)
    for draw in (model.generate, model.generate_tree, lambda n, **s: model.refine(x, **s)):
        plain, other = (
            draw(2, generator=seeded(1), steps=2, **s) for s in ({}, {"guidance": 3.0, "away_from": "sibling"})
        )
        assert not torch.isclose(plain.images, other.images).all() and torch.equal(plain.coarse, other.coarse)
        with pytest.raises(ValueError, match="grid must be one of"):
            draw(2, grid="even")


def test_noise_on_the_condition_reaches_the_second_stage() -> None:
    model = pair(condition_noise=0.6)
    x = observations(model.tree_vae, 2)
    for draw in (model.generate, model.generate_tree, lambda n, **s: model.refine(x, **s)):
        plain, other, same = (
            draw(2, generator=seeded(1), steps=2, **s) for s in ({}, {"condition_noise": 0.5}, {"condition_noise": 0.0})
        )
        assert not torch.isclose(plain.images, other.images).all() and torch.equal(plain.coarse, other.coarse)
        assert torch.equal(plain.images, same.images)
    every = model.generate_tree(3, generator=seeded(4), steps=2, condition_noise=0.5)
    column = Refined(every.images[:, 0], every.coarse[:, 0], every.leaf[:, 0])
    check_same(column, model.generate(3, leaf=GROWN.leaves[0], generator=seeded(4), steps=2, condition_noise=0.5))


# --- how much is computed -----------------------------------------------------------------------------------


def rows_through(bank: NodeBank) -> list[int]:
    counts: list[int] = []
    bank.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    return counts


@pytest.mark.parametrize("way", ["generate", "generate through a node", "refine", "loss"])
@pytest.mark.parametrize("tree", [GROWN, PRUNED], ids=["grown", "pruned"])
def test_one_path_is_walked_and_one_decoder_runs_per_image(tree: TreeTopology, way: str) -> None:
    model, n = pair(tree), 11
    first, x = model.tree_vae, observations(model.tree_vae, 11)
    decoded, handed, headed = (
        rows_through(bank) for bank in (first.banks.decoders, first.banks.transitions, first.banks.heads)
    )
    if way == "loss":
        model.loss(x, generator=seeded())
        leaves = condition_of(first, x, generator=seeded()).node.tolist()
        decoded, handed, headed = ([sum(counts) // 2] for counts in (decoded, handed, headed))
    else:
        settings: dict[str, Any] = {"generator": seeded(), "steps": 2}
        node = tree.path(tree.leaves[-1])[1] if "node" in way else None
        found = model.refine(x, **settings) if way == "refine" else model.generate(n, node=node, **settings)
        leaves = found.leaf.tolist()
    depths = [tree.depth(leaf) for leaf in leaves]
    assert sum(decoded) == n and sum(handed) == sum(depths)
    assert sum(headed) == (0 if "generate" in way else sum(depths) + n)


def test_prior_paths_cost_no_second_walk() -> None:
    model, x = pair(), observations(build(GROWN, "conv"), 11)
    first = model.tree_vae
    counts = [rows_through(bank) for bank in (first.banks.decoders, first.banks.transitions, first.banks.heads)]
    plain = model.loss(x, generator=seeded())
    walked = [sum(count) for count in counts]
    mixed = model.loss(x, prior_share=0.5, generator=seeded())
    assert [sum(count) for count in counts] == [2 * rows for rows in walked]
    assert not torch.isclose(plain, mixed)


def test_the_first_stage_is_frozen() -> None:
    model = pair()
    x = observations(model.tree_vae, 5)
    generator, same = seeded(3), seeded(3)
    loss = model.loss(x, generator=generator)
    loss.backward()
    assert all(p.grad is None for p in model.tree_vae.parameters())
    assert all(p.grad is not None for p in model.ddpm.unet.parameters())
    told = condition_of(model.tree_vae, x, generator=same)
    assert torch.equal(model.ddpm.loss(x, told, generator=same), loss)
    again = condition_of(model.tree_vae, x, generator=same)  # at every step the leaf is drawn anew
    assert again.z is not None and told.z is not None
    assert not torch.equal(again.node, told.node) and not torch.isclose(again.z[:, 0], told.z[:, 0]).any()


def test_the_loss_passes_the_share_on() -> None:
    model = pair()
    x = observations(model.tree_vae, 5)
    generator, same = seeded(3), seeded(3)
    loss = model.loss(x, prior_share=0.7, generator=generator)
    told = condition_of(model.tree_vae, x, prior_share=0.7, generator=same)
    assert torch.equal(model.ddpm.loss(x, told, generator=same), loss)
    assert torch.equal(model.loss(x, prior_share=0.0, generator=seeded(3)), model.loss(x, generator=seeded(3)))
    loss.backward()
    assert all(p.grad is None for p in model.tree_vae.parameters())


def test_global_random_numbers_are_left_alone() -> None:
    model, state = pair(), torch.get_rng_state()
    x = observations(model.tree_vae, 2)
    model.loss(x, generator=seeded())
    for draw in (model.generate, model.generate_tree, lambda n, **s: model.refine(x, **s)):
        found = draw(2, generator=seeded(), steps=1)
        assert not found.images.requires_grad and not found.coarse.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


# --- nothing, and what is wrong -----------------------------------------------------------------------------


@each_tree
def test_no_images_are_fine(tree: TreeTopology) -> None:
    model = pair(tree)
    x, leaves, shape = observations(model.tree_vae, 0), len(tree.leaves), model.tree_vae.inputs
    settings: dict[str, Any] = {"steps": 2, "guidance": 2.0, "rescale": 0.5}
    for found in (
        model.generate(0, **settings),
        model.refine(x, **settings),
        model.refine(x, leaf="argmax", **settings),
    ):
        assert found.images.shape == found.coarse.shape == (0, *shape) and found.leaf.shape == (0,)
    for found in (model.generate_tree(0, **settings), model.refine(x, leaf="all", **settings)):
        assert found.images.shape == found.coarse.shape == (0, leaves, *shape) and found.leaf.shape == (0, leaves)


def test_errors_teach() -> None:
    model = pair()
    x = observations(model.tree_vae, 2)
    with pytest.raises(ValueError, match="give a node or a leaf, found node=0 and leaf=1"):
        model.generate(2, node=0, leaf=1)
    with pytest.raises(KeyError, match=re.escape("node 2 is not a leaf; the leaves are [1, 4, 5, 6]")):
        model.generate(2, leaf=2)
    with pytest.raises(KeyError, match="node 99 is not in the tree"):
        model.generate(2, node=99)
    with pytest.raises(ValueError, match="n and temperature must be at least 0"):
        model.generate(-1)
    with pytest.raises(KeyError, match="node 2 is not a leaf of the tree"):
        model.refine(x, leaf=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="leaf must be one id for each of the 2 images"):
        model.refine(x, leaf=torch.tensor([1]))
    for leaf in ("best", 1):
        with pytest.raises(
            ValueError, match=re.escape(f"leaf must be 'sample', 'argmax' or (B,) leaf ids, found {leaf!r}")
        ):
            model.refine(x, leaf=leaf)  # type: ignore[arg-type]
    for call in (model.loss, model.refine, lambda x: model.refine(x, leaf="all")):
        with pytest.raises(
            ValueError, match=re.escape("expected observations of shape (batch, 1, 6, 6), found (2, 1, 6, 5)")
        ):
            call(x[..., :5])  # type: ignore[operator]


def test_stages_must_fit() -> None:
    first = build(GROWN, "conv")
    message = f"both stages must have one tree, found {GROWN} and {PRUNED}; a tree that grows or is pruned needs a new"
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffuseTreeVAE(first, small(PRUNED))
    message = "both stages must have images of one shape, found (1, 6, 6) and (1, 8, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        DiffuseTreeVAE(first, small(GROWN))

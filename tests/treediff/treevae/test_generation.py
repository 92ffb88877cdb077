"""Drawing from the prior: against a loop over images and nodes, and what must not depend on what."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, KINDS, PRUNED, build, few, louder
from strategies import topologies
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.noise import counter_normal, seed_from
from treediff.treevae.prior import LeafSamples, TreeSample

TREES = {"lone root": TreeTopology.balanced(0), "chain": TreeTopology.chain(2), "grown": GROWN, "pruned": PRUNED}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
# A product over more rows may add in another order; in float64 that is far below this.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def one_by_one(model: TreeVAE, path: tuple[int, ...], seed: int, index: int, temperature: float) -> tuple[Tensor, ...]:
    """Latents along one path and the picture at its end, by ordinary modules; and the prior's logits on the way."""
    z = torch.zeros(())
    latents, logits = [], []
    for depth, node in enumerate(path):
        noise = temperature * counter_normal(seed, torch.tensor([index]), model.latent, draw=node, dtype=torch.float64)
        if depth == 0:
            z = noise
        else:
            mean, logvar = model.banks.transitions.module(node)(z).chunk(2, 1)
            z = mean + torch.exp(logvar / 2) * noise
        latents.append(z[0])
        if node in model.topology.routed:
            logits.append(model.banks.prior_routers.module(node)(z)[0])
    picture = model.likelihood.mean(model.banks.decoders.module(path[-1])(z))[0]
    return torch.stack(latents), picture, torch.stack(logits) if logits else torch.zeros(0)


def check_valid(model: TreeVAE, found: TreeSample, node: int) -> None:
    """Each path is one of the tree, goes through the node, and ends at the leaf; all past the leaf is empty."""
    tree = model.topology
    depth = max(tree.depth(leaf) for leaf in tree.leaves_under(node))
    n = len(found.leaf)
    assert found.path.shape == (n, depth + 1) and found.z.shape == (n, depth + 1, *model.latent)
    assert found.images.shape == (n, *model.inputs)
    for i, (path, leaf) in enumerate(zip(found.path.tolist(), found.leaf.tolist(), strict=True)):
        steps = tree.path(leaf)
        assert leaf in tree.leaves and node in steps
        assert path == [*steps, *[-1] * (depth + 1 - len(steps))]
        assert not found.z[i, len(steps) :].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@each_tree
def test_equals_a_loop_over_images_and_nodes(tree: TreeTopology, kind: str) -> None:
    model = build(tree, kind)
    seed = seed_from(seeded(1))
    drawn = model.sample(6, temperature=0.7, first_index=3, generator=seeded(1))
    check_valid(model, drawn, tree.root)
    for i, leaf in enumerate(drawn.leaf.tolist()):
        z, picture, _ = one_by_one(model, tree.path(leaf), seed, 3 + i, 0.7)
        close(drawn.z[i, : len(z)], z)
        close(drawn.images[i], picture)
    every = model.sample_leaves(3, temperature=0.7, first_index=3, generator=seeded(1))
    for i in range(3):
        for k, leaf in enumerate(tree.leaves):
            path = tree.path(leaf)
            z, picture, logits = one_by_one(model, path, seed, 3 + i, 0.7)
            close(every.images[i, k], picture)
            lefts = [tree.children(a)[0] == b for a, b in pairwise(path) if a in tree.routed]
            turns = [1.0 if left else -1.0 for left in lefts]
            expected = sum(
                (torch.nn.functional.logsigmoid(t * v) for t, v in zip(turns, logits, strict=True)), torch.zeros(())
            )
            close(every.log_probs[i, k], expected.double())


@torch.no_grad()
@few
@given(topologies(max_steps=7), st.integers(0, 63), st.integers(0, 5), st.integers(0, 2**32))
def test_paths_are_valid_through_any_node_of_any_tree(tree: TreeTopology, number: int, n: int, seed: int) -> None:
    model = louder(build(tree, seed=seed), 5.0, only="prior_routers")
    node = tree.ids[number % len(tree)]
    check_valid(model, model.sample(n, node=node, generator=seeded(seed)), node)
    every = model.sample_leaves(n, generator=seeded(seed))
    assert every.images.shape == (n, len(tree.leaves), 3)
    torch.testing.assert_close(every.log_probs.exp().sum(1), torch.ones(n).double())


@each_tree
def test_a_leaf_chosen_and_the_column_of_that_leaf_are_the_same_picture(tree: TreeTopology) -> None:
    model = build(tree, "maps")
    every = model.sample_leaves(5, temperature=0.8, generator=seeded(4))
    for k, leaf in enumerate(tree.leaves):
        drawn = model.sample(5, node=leaf, temperature=0.8, generator=seeded(4))
        close(drawn.images, every.images[:, k])
        assert drawn.leaf.tolist() == [leaf] * 5


@each_tree
@pytest.mark.parametrize("node", ["root", "leaf", "inner"])
def test_an_image_does_not_depend_on_its_batch(tree: TreeTopology, node: str) -> None:
    model = build(tree, "mlp")
    through = {"root": tree.root, "leaf": tree.leaves[-1], "inner": tree.path(tree.leaves[-1])[-1 - (len(tree) > 1)]}
    whole = model.sample(9, node=through[node], generator=seeded(5))
    for first, n in ((0, 1), (4, 1), (2, 5), (8, 1)):
        part = model.sample(n, node=through[node], first_index=first, generator=seeded(5))
        assert torch.equal(part.path, whole.path[first : first + n])
        close(part.images, whole.images[first : first + n])
        close(part.z, whole.z[first : first + n])
    leaves = model.sample_leaves(9, generator=seeded(5))
    part_of_leaves = model.sample_leaves(2, first_index=6, generator=seeded(5))
    close(part_of_leaves.images, leaves.images[6:8])
    close(part_of_leaves.log_probs, leaves.log_probs[6:8])


def test_images_under_one_root_share_the_path_they_share() -> None:
    model = build(GROWN, "mlp")  # 0 -> 1, 2; 2 -> 3, 4; 3 -> 5, 6
    five, six, four = (model.sample(3, node=leaf, generator=seeded(6)).z for leaf in (5, 6, 4))
    close(five[:, :3], six[:, :3])
    close(five[:, :2], four[:, :2])
    assert not torch.isclose(five[:, 3], six[:, 3]).any()


@torch.no_grad()
def test_at_temperature_0_every_latent_is_its_mean() -> None:
    model = build(PRUNED, "maps")
    drawn = model.sample(8, temperature=0, generator=seeded(7))
    assert not drawn.z[:, 0].any()
    for i, leaf in enumerate(drawn.leaf.tolist()):
        for depth, node in enumerate(PRUNED.path(leaf)[1:], start=1):
            mean, _ = model.banks.transitions.module(node)(drawn.z[i : i + 1, depth - 1]).chunk(2, 1)
            close(drawn.z[i : i + 1, depth], mean)
    pictures = model.sample_leaves(4, temperature=0.0, generator=seeded(8)).images
    close(pictures, pictures[:1].expand_as(pictures))


def test_temperature_scales_the_noise_of_the_root() -> None:
    model = build(GROWN)
    one, half = (model.sample(4, temperature=t, generator=seeded(9)).z[:, 0] for t in (1.0, 0.5))
    close(half, 0.5 * one)
    assert one.std() > 0.3


@pytest.mark.parametrize("call", ["sample", "sample_leaves"])
def test_the_seed_says_all_and_global_state_is_left_alone(call: str) -> None:
    model, state = build(GROWN), torch.get_rng_state()

    def draw(seed: int) -> Tensor:
        found: TreeSample | LeafSamples = getattr(model, call)(4, generator=seeded(seed))
        assert not found.images.requires_grad
        return found.images

    assert torch.equal(draw(0), draw(0))
    assert not torch.isclose(draw(0), draw(1)).any()
    assert torch.equal(torch.get_rng_state(), state)
    generator = seeded(0)
    first, second = (getattr(model, call)(4, generator=generator).images for _ in range(2))
    assert torch.equal(first, draw(0)) and not torch.isclose(first, second).any()  # a generator moves on


def test_without_a_generator_torchs_own_is_used() -> None:
    model = build(GROWN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = model.sample(3).images
        torch.manual_seed(3)
        second, third = model.sample(3).images, model.sample(3).images
    assert torch.equal(first, second) and not torch.equal(second, third)


@each_tree
def test_no_images_are_fine(tree: TreeTopology) -> None:
    model = build(tree, "maps")
    check_valid(model, model.sample(0), tree.root)
    check_valid(model, model.sample(0, node=tree.leaves[-1]), tree.leaves[-1])
    every = model.sample_leaves(0)
    assert every.images.shape == (0, len(tree.leaves), 1, 5, 6) and every.log_probs.shape == (0, len(tree.leaves))


def test_pictures_lie_in_the_range_of_the_data() -> None:
    for kind in ("mlp", "conv"):
        images = louder(build(GROWN, kind), 3.0).sample(20, generator=seeded()).images
        assert (images >= 0).all() and (images <= 1).all()


SIGNS = "n and temperature must be at least 0, and temperature finite; found"
KINDS_OF_NUMBERS = "n and first_index must be integers and temperature a number; found"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n": -1}, ValueError, f"{SIGNS} n=-1 and temperature=1.0"),
        ({"n": 2, "temperature": -0.1}, ValueError, f"{SIGNS} n=2 and temperature=-0.1"),
        ({"n": 2, "temperature": float("inf")}, ValueError, f"{SIGNS} n=2 and temperature=inf"),
        ({"n": 2, "temperature": float("nan")}, ValueError, f"{SIGNS} n=2 and temperature=nan"),
        ({"n": 2.5}, TypeError, f"{KINDS_OF_NUMBERS} n=2.5"),
        ({"n": True}, TypeError, f"{KINDS_OF_NUMBERS} n=True"),
        ({"n": 2, "first_index": 0.5}, TypeError, f"{KINDS_OF_NUMBERS} n=2, first_index=0.5"),
        ({"n": 2, "temperature": None}, TypeError, f"{KINDS_OF_NUMBERS} n=2, first_index=0 and temperature=None"),
    ],
)
def test_errors_teach(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build(GROWN)
    for call in (model.sample, model.sample_leaves):
        with pytest.raises(error, match=re.escape(message)):
            call(**settings)


@pytest.mark.parametrize("node", [99, -1, "1"])
def test_a_node_must_be_in_the_tree(node: Any) -> None:  # noqa: ANN401
    with pytest.raises(KeyError, match=re.escape(f"node {node!r} is not in the tree; its nodes are {list(GROWN.ids)}")):
        build(GROWN).sample(2, node=node)

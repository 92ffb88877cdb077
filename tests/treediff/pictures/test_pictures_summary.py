"""What pictures show of a tree, against the same found image by image."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PRUNED, build, few, observations
from strategies import topologies
from summaries import SPLIT, image_model, labels_for, summary_of
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.noise import seed_from
from treediff.diffusion.ddpm import LeafConditionedDDPM
from treediff.pictures import summarize_tree
from treediff.pipeline.conditions import condition_of_sample
from treediff.pipeline.model import DiffuseTreeVAE
from treediff.treevae.prior import TreeSample


@torch.no_grad()
@pytest.mark.parametrize("tree", [TreeTopology.balanced(0), SPLIT, PRUNED], ids=["root", "split", "pruned"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_shares_counts_and_classes_equal_those_found_image_by_image(tree: TreeTopology, batch_size: int) -> None:
    model = image_model(tree)
    x, labels = observations(model, 20), labels_for(20)
    shares, counts = Counter[int](), Counter[int]()
    classes = {node: Counter[int]() for node in tree}
    for row, label in zip(x, labels.tolist(), strict=True):
        probabilities = model.leaf_log_probs(row[None])[0].exp().tolist()
        for leaf, probability in zip(tree.leaves, probabilities, strict=True):
            for node in tree.path(leaf):
                shares[node] += probability / len(x)  # type: ignore[assignment]
        for node in tree.path(tree.leaves[int(np.argmax(probabilities))]):
            counts[node] += 1
            classes[node][label] += 1
    found = summarize_tree(model, x, labels, batch_size=batch_size)
    shown = tree.contracted()
    assert found.rows == 20 and [node.id for node in found] == list(shown)
    for node in shown:
        record = found[node]
        assert record.share == pytest.approx(shares[node], abs=1e-5)
        assert record.count == counts[node]
        assert record.class_counts is not None and record.class_counts.tolist() == [classes[node][k] for k in range(3)]
        assert (record.parent, record.depth) == (shown.parent(node), shown.depth(node))
    if len(tree.leaves) > 1:
        assert sum(counts[leaf] > 0 for leaf in tree.leaves) > 1  # there was something to tell apart


@torch.no_grad()
def test_members_of_a_leaf_are_those_nearest_to_its_mean_latent() -> None:
    model = image_model()
    x = observations(model, 30)
    found = summarize_tree(model, x, labels_for(30), members=4)
    clusters = model.cluster(x)
    noise = torch.zeros(1, len(SPLIT), *model.latent)
    for leaf in SPLIT.leaves:
        rows = (clusters == leaf).nonzero().flatten().tolist()
        latents = []
        for row in rows:
            # With no noise every latent is its mean, and so is the one below it.
            latents.append(model.posterior(x[row : row + 1], noise=noise).latents(leaf)[0].double())
        if rows:
            centre = torch.stack(latents).mean(0)
            distance = [((z - centre) ** 2).sum().item() for z in latents]
            rows = [row for _, row in sorted(zip(distance, rows, strict=True))]
        record = found[leaf]
        assert record.member_rows.tolist() == rows[:4]
        np.testing.assert_array_equal(record.members, x[rows[:4]].numpy())
        assert record.member_labels is not None and record.member_labels.tolist() == labels_for(30)[rows[:4]].tolist()


def test_members_of_an_inner_node_come_from_its_leaves_in_proportion() -> None:
    found = summary_of(image_model(), n=40, members=6)
    for node in SPLIT:
        record = found[node]
        chosen = Counter(record.member_rows.tolist())
        assert set(chosen.values()) <= {1} and len(record.member_rows) == min(6, record.count)
        for leaf in SPLIT.leaves_under(node):
            own = [row for row in found[leaf].member_rows.tolist() if row in chosen]
            fair = 6 * found[leaf].count / max(1, record.count)
            assert abs(len(own) - fair) < 1 or record.count <= 6
    # From left to right: the leaves under the root in the order 1, 5, 6, 4.
    at = [leaf for row in found[0].member_rows.tolist() for leaf in (1, 5, 6, 4) if row in found[leaf].member_rows]
    assert at == sorted(at, key=[1, 5, 6, 4].index)


@pytest.mark.parametrize("kind", ["mlp", "colour"])
def test_samples_are_those_of_the_model(kind: str) -> None:
    model = image_model(kind=kind)
    found = summary_of(model, n=9, samples=3)
    for node in SPLIT:
        expected = model.sample(3, node=node, generator=seeded(1)).images
        np.testing.assert_allclose(found[node].samples, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_each_nodes_samples_are_refined_once() -> None:
    model, told = image_model(), list[TreeSample]()

    def refine(sample: TreeSample) -> Tensor:
        told.append(sample)
        assert not torch.is_grad_enabled()
        return torch.full_like(sample.images, 1 / len(told)).double()

    found = summary_of(model, samples=3, refine=refine)
    assert len(told) == len(SPLIT)
    for i, node in enumerate(SPLIT):
        expected = model.sample(3, node=node, generator=seeded(1))
        for name in ("images", "leaf", "path", "z"):
            assert torch.equal(getattr(told[i], name), getattr(expected, name)), name
        np.testing.assert_array_equal(found[node].samples, expected.images.numpy())
        np.testing.assert_array_equal(found[node].refined, np.full((3, 1, 4, 3), 1 / (i + 1), np.float32))
    assert all(node.refined is None for node in summary_of(model))


def test_refined_samples_are_those_of_both_stages() -> None:
    tree_vae = TreeVAE.for_images(size=8, network="mlp", latent=4, topology=TreeTopology.balanced(1).split(2))
    pair = DiffuseTreeVAE(tree_vae, LeafConditionedDDPM.for_tree(tree_vae, width=16)).eval()
    with torch.no_grad():
        pair.ddpm.unet.out.weight.normal_(generator=seeded(3))  # it begins at 0, where no condition would be seen
    seed = seed_from(seeded(1))
    found = summarize_tree(
        tree_vae,
        torch.rand(5, 1, 8, 8, generator=seeded(0)),
        samples=3,
        generator=seeded(seed),
        refine=lambda sample: pair.ddpm.sample(
            condition_of_sample(sample, tree_vae.topology), steps=2, generator=seeded(seed)
        ),
    )
    assert len({found[leaf].refined.tobytes() for leaf in tree_vae.topology.leaves}) == 3  # type: ignore[union-attr]
    for node in tree_vae.topology:
        expected = pair.generate(3, node=node, steps=2, generator=seeded(1))
        np.testing.assert_allclose(found[node].samples, expected.coarse.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[node].refined, expected.images.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("refine", "error", "message"),
    [
        (lambda x: [x], TypeError, "expected a float tensor in [0, 1], found list; an array: torch.as_tensor(x), a"),
        (
            lambda x: x.byte(),
            TypeError,
            "expected a float tensor in [0, 1], found torch.uint8; convert it with x",
        ),
        (lambda x: x[1:], ValueError, "expected one image for each sample, shape (5, 1, 4, 3), found shape (4, 1, 4"),
        (lambda x: x[:0], ValueError, "found shape (0, 1, 4, 3); refine all of sample.images, in their order"),
        (lambda x: x[:, 0], ValueError, "found shape (5, 4, 3); refine all of sample.images, in their order"),
        (lambda x: x * 0 - 0.25, ValueError, "expected values in [0, 1], found -0.25 to -0.25; images from -1 to 1"),
        (lambda x: x * 0 + 1.5, ValueError, "expected values in [0, 1], found 1.5 to 1.5; images from -1 to 1"),
        (lambda x: x * float("nan"), ValueError, "expected values in [0, 1], found nan to nan; images from -1 to 1"),
    ],
)
def test_what_refine_returns_is_checked(refine: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    model = image_model()
    with pytest.raises(error, match=r"^what refine returned for node 0: .*" + re.escape(message)):
        summary_of(model, refine=lambda sample: refine(sample.images))
    assert model.training


@few
@given(topologies(max_steps=6), st.integers(1, 12), st.integers(0, 3), st.integers(1, 9), st.integers(0, 2**32))
def test_what_holds_for_every_tree(tree: TreeTopology, n: int, members: int, max_rows: int, seed: int) -> None:
    model = build(tree, "mlp", seed=seed, dtype=torch.float32)
    found = summary_of(model, n, samples=2, members=members, max_rows=max_rows, batch_size=5)
    tree = tree.contracted()
    assert len(found) == len(tree)
    assert found[tree.root].share == pytest.approx(1, abs=1e-5) and found[tree.root].count == n
    for node in tree:
        record, below = found[node], tree.children(node)
        if below:
            assert record.share == pytest.approx(sum(found[child].share for child in below), abs=1e-6)
            assert record.count == sum(found[child].count for child in below)
        assert record.samples.shape == (2, 1, 4, 3) and record.members.shape[0] == min(members, record.count)
        assert record.class_counts is not None and record.class_counts.sum() == record.count


def test_without_labels_there_are_no_classes() -> None:
    found = summary_of(image_model(), labels=False)
    assert found.class_names is None
    assert all(node.class_counts is None and node.member_labels is None for node in found)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda v: np.array(v, np.uint8)])
def test_labels_may_be_lists_arrays_and_tensors(make: Any) -> None:  # noqa: ANN401
    model = image_model()
    labels = [0, 2] * 5
    found = summarize_tree(model, observations(model, 10), make(labels))
    assert found.class_names == ("class 0", "class 1", "class 2")
    assert found[0].class_counts is not None and found[0].class_counts.tolist() == [5, 0, 5]


def test_a_summary_follows_its_arguments_alone_and_leaves_the_model_as_it_was() -> None:
    model, state = image_model(), torch.get_rng_state()
    model.banks.heads.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    first, second = summary_of(model), summary_of(model)
    for node in SPLIT:
        np.testing.assert_array_equal(first[node].samples, second[node].samples)
        np.testing.assert_array_equal(first[node].member_rows, second[node].member_rows)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int]] = []
    summary_of(image_model(), n=10, batch_size=4, progress=lambda done, n: told.append((done, n)))
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_images_may_be_of_another_precision_than_the_model() -> None:
    model = image_model()
    x = observations(model, 6)
    np.testing.assert_array_equal(summarize_tree(model, x.double())[0].members, summarize_tree(model, x)[0].members)


def test_nodes_are_found_by_id() -> None:
    found = summary_of(image_model())
    assert found[4].id == 4 and repr(found) == "TreeSummary(7 nodes, 4 leaves, 30 images of (1, 4, 3))"
    assert repr(found[0]) == "NodeSummary(id=0, depth=0, share=1.000, count=30)"
    with pytest.raises(KeyError, match=r"node 9 is not in the tree; its nodes are \[0, 1, 2, 3, 4, 5, 6\]"):
        found[9]


GOOD = {"images": torch.full((4, 1, 4, 3), 0.5)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, found 0"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1, found 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, found 0"),
        ({"members": -1}, ValueError, "members must be at least 0, found -1"),
        ({"images": torch.zeros(0, 1, 4, 3)}, ValueError, "expected at least one row, found none"),
        (
            {"images": torch.zeros(4, 1, 4, 3, dtype=torch.int64)},
            TypeError,
            "expected floating-point rows, or images of 8 or 16 bits, found torch.int64",
        ),
        ({"images": torch.zeros(4, 1, 5, 3)}, ValueError, "expected observations of shape (batch, 1, 4, 3)"),
        ({"images": torch.full((4, 1, 4, 3), 2.0)}, ValueError, "observations must lie in [0.0, 1.0]"),
        ({"labels": [0, 1]}, ValueError, "labels: expected one per image, shape (4,), found shape (2,)"),
        ({"labels": [0.0, 1.0, 0.0, 1.0]}, TypeError, "labels: expected integers counting from 0, found float64"),
        ({"labels": [0, 1, -1, 0]}, ValueError, "labels: expected classes counting from 0, found -1; leave out rows"),
        ({"class_names": ["a"]}, ValueError, "class_names name the classes of labels, but no labels were given"),
        (
            {"labels": [0, 2, 0, 0], "class_names": ["a", "b"]},
            ValueError,
            "class_names: expected at least 3 names, as labels reach 2, found 2",
        ),
    ],
    ids=lambda value: str(value)[:25],
)
def test_errors_teach(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        summarize_tree(image_model(), **{**GOOD, **change})


def test_models_of_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("pictures need a model of images, (1, height, width) or (3,")):
        summarize_tree(build(SPLIT), torch.zeros(2, 3).double())


def test_a_model_that_diverged_is_named_as_such() -> None:
    model = image_model()
    with torch.no_grad():
        model.banks.posterior_routers.weights_of(0).fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's probabilities are not finite: its weights hold NaN or infinity"):
        summary_of(model)
    assert model.training

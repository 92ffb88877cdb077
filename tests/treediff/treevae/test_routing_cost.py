"""Encoder, routers and decoders run once, and only where their answer is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import GROWN, PRUNED, build, noise_for, observations
from torch import Tensor
from worlds import seeded

from treediff import LeafDensity, TreeTopology, TreeVAE
from treediff.pipeline.conditions import condition_of
from treediff.treevae.posterior import leaf_log_probs_of

TREES = [GROWN, PRUNED, TreeTopology.balanced(0), TreeTopology.balanced(3)]


@contextmanager
def counting(model: TreeVAE) -> Iterator[Counter[str]]:
    """How many rows pass each part."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda _, given: counts.update({name: len(given[0])})

    parts = {"encoder": model.encoder}
    parts |= {"posterior_routers": model.banks.posterior_routers, "decoders": model.banks.decoders}
    hooks = [part.register_forward_pre_hook(count(name)) for name, part in parts.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def deciding(tree: TreeTopology, leaves: list[int]) -> int:
    """How many decisions lie on the paths to some leaves."""
    return sum(node in tree.routed for leaf in leaves for node in tree.path(leaf))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_a_path_of_ones_own_is_that_part_of_the_whole(tree: TreeTopology, threshold: float) -> None:
    model = build(tree)
    x, noise = observations(model, 7), noise_for(model, 7)
    leaf = torch.tensor([tree.leaves[i % len(tree.leaves)] for i in range(7)])
    ranks = torch.tensor([tree.leaves.index(int(i)) for i in leaf])
    expected = model.route(model.features(x), threshold=threshold).along(ranks)
    with counting(model) as counts:
        found = model.posterior(x, leaf=leaf, threshold=threshold, noise=noise)
    for name in ("image", "node", "parent", "log_reach", "routed", "logits", "starts"):
        torch.testing.assert_close(getattr(found.visits, name), getattr(expected, name))
    if not threshold:
        assert counts["posterior_routers"] == deciding(tree, leaf.tolist())


@pytest.mark.parametrize("tree", TREES)
def test_a_reconstruction_encodes_and_routes_once(tree: TreeTopology) -> None:
    model = build(tree)
    x = observations(model, 6)
    best = model.cluster(x)
    with counting(model) as counts:
        found = model.reconstruct(x, generator=seeded(3))
    assert counts == Counter(encoder=6, posterior_routers=6 * len(tree.routed), decoders=6)
    with counting(model) as counts:
        torch.testing.assert_close(found, model.reconstruct(x, leaf=best, generator=seeded(3)))
    assert counts == Counter(encoder=6, posterior_routers=deciding(tree, best.tolist()), decoders=6)


@pytest.mark.parametrize("tree", TREES)
def test_importance_samples_share_their_decisions(tree: TreeTopology) -> None:
    model = build(tree)
    x = observations(model, 4)
    with counting(model) as counts:
        model.iwae(x, 10, chunk=3, generator=seeded(4))
    assert counts == Counter(encoder=4, posterior_routers=4 * len(tree.routed), decoders=40)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("batch", [0, 3])
def test_repeated_visits_are_those_of_repeated_rows(tree: TreeTopology, batch: int) -> None:
    model = build(tree)
    features = model.features(observations(model, batch))
    found = model.route(features).repeated(4)
    expected = model.route(features.repeat_interleave(4, 1))
    assert found.batch == expected.batch == 4 * batch
    for name in ("image", "node", "parent", "log_reach", "routed", "logits", "starts"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    torch.testing.assert_close(leaf_log_probs_of(found), leaf_log_probs_of(expected))


def test_without_its_image_a_condition_is_the_same_and_nothing_is_decoded() -> None:
    model = build(GROWN)
    x = observations(model, 8)
    settings: dict[str, Any] = {"prior_share": 0.5, "first_index": 3}
    whole, bare = (condition_of(model, x, decode=d, generator=seeded(5), **settings) for d in (True, False))
    assert bare.image is None and isinstance(whole.image, Tensor)
    for name in ("node", "z", "weights"):
        assert torch.equal(getattr(bare, name), getattr(whole, name))
    with counting(model) as counts:
        LeafDensity.fit(model, observations(model, 200), components=1, generator=seeded(6))
    assert counts["encoder"] == 200 and not counts["decoders"]

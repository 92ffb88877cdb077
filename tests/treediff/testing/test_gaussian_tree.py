"""GaussianTree against scipy and numpy: the oracle of other tests needs oracles of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.special import logsumexp
from strategies import quick, topologies
from worlds import (
    UNEVEN,
    log_joint_by_scipy,
    log_prior_of_one_path,
    moments_of_one_path,
    parameters,
    seeded,
    world,
)

from treediff.testing import GaussianTree, same_hierarchy
from treediff.tree.topology import TreeTopology

SEEDS = st.integers(0, 2**32)


@quick
@given(topologies(max_steps=6), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_everything_equals_a_mixture_built_by_scipy(tree: TreeTopology, latent: int, features: int, seed: int) -> None:
    known = world(tree, latent, features, seed)
    means, covariances = known.leaf_moments()
    for k, leaf in enumerate(tree.leaves):
        mean, covariance = moments_of_one_path(known, leaf)
        np.testing.assert_allclose(means[k].numpy(), mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(covariances[k].numpy(), covariance, rtol=1e-9, atol=1e-9)
    prior = [log_prior_of_one_path(known, leaf) for leaf in tree.leaves]
    np.testing.assert_allclose(known.log_prior().numpy(), prior, rtol=1e-9, atol=1e-12)

    x = 3 * torch.randn(4, features, generator=seeded(seed), dtype=torch.float64)
    joint = log_joint_by_scipy(known, x)
    evidence = logsumexp(joint, axis=1)
    posterior = joint - evidence[:, None]
    np.testing.assert_allclose(known.log_prob(x).numpy(), evidence, rtol=1e-7)
    np.testing.assert_allclose(known.leaf_log_posterior(x).numpy(), posterior, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(known.leaf_log_posterior(x).exp().sum(1).numpy(), 1, rtol=1e-12)

    reached = known.node_log_posterior(x).exp().numpy()
    for i, node in enumerate(tree):
        under = [k for k, leaf in enumerate(tree.leaves) if node in tree.path(leaf)]
        np.testing.assert_allclose(reached[:, i], np.exp(posterior[:, under]).sum(1), rtol=1e-6, atol=1e-12)


def test_a_lone_root_is_probabilistic_pca() -> None:
    known = world(TreeTopology.balanced(0))
    weight = known.decoder_weight[0]
    torch.testing.assert_close(known.leaf_moments()[1][0], weight @ weight.T + 0.3 * torch.eye(3).double())
    assert known.leaf_log_posterior(torch.zeros(2, 3)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("features", [1, 2])
def test_the_density_integrates_to_one(features: int) -> None:
    known = GaussianTree.random(UNEVEN, latent=2, features=features, variance=0.2, generator=seeded())
    axis = torch.arange(-12.0, 12.0, 0.1, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    # A sum over a grid finer than the noise is exact up to the tails for a smooth function.
    assert known.log_prob(grid).exp().sum().item() * 0.1**features == pytest.approx(1, abs=1e-8)


def test_far_away_the_log_density_is_still_a_number() -> None:
    x = torch.full((1, 3), 1e6)
    expected = logsumexp(log_joint_by_scipy(world(), x.double()), axis=1)
    np.testing.assert_allclose(world().log_prob(x).numpy(), expected, rtol=1e-9)
    assert world().leaf_log_posterior(x).exp().sum().item() == pytest.approx(1)


def test_the_gradient_is_the_score_of_the_mixture() -> None:
    known = world()
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    known.log_prob(x).sum().backward()
    expected = np.zeros((4, 3))
    posterior = known.leaf_log_posterior(x.detach()).exp().numpy()
    for k, leaf in enumerate(known.topology.leaves):
        mean, covariance = moments_of_one_path(known, leaf)
        pulls = np.linalg.solve(covariance, (mean - x.detach().numpy()).T).T
        expected += posterior[:, [k]] * pulls
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_float32_data_get_float64_answers() -> None:
    x = torch.randn(2, 3, generator=seeded())
    for found in (world().log_prob(x), world().leaf_log_posterior(x), world().node_log_posterior(x)):
        assert found.dtype == torch.float64
    torch.testing.assert_close(world().log_prob(x), world().log_prob(x.double()), rtol=0, atol=0)


def test_the_world_owns_its_numbers() -> None:
    given_numbers = parameters(UNEVEN)
    given_numbers["bias"][1].requires_grad_()
    known = GaussianTree(**given_numbers)
    with torch.no_grad():
        given_numbers["bias"][1] += 1
    assert not known.bias[1].requires_grad
    torch.testing.assert_close(known.bias[1], world().bias[1], rtol=0, atol=0)


# --- random worlds ------------------------------------------------------------------------------------------


@quick
@given(topologies(max_steps=6), st.integers(0, 2), st.integers(0, 2), SEEDS)
def test_distances_between_leaves_tell_where_their_paths_part(
    tree: TreeTopology, more_latent: int, more_features: int, seed: int
) -> None:
    room = max(tree.max_depth, 1)
    known = GaussianTree.random(
        tree, latent=room + more_latent, features=room + more_features, separation=8.0, generator=seeded(seed)
    )
    means = known.leaf_moments()[0]
    for i, first in enumerate(tree.leaves):
        for j, second in enumerate(tree.leaves[:i]):
            siblings = 8.0 * 0.5 ** (tree.depth(tree.lowest_common_ancestor(first, second)) + 1)
            distance = torch.dist(means[i], means[j]).item()
            assert siblings * (1 - 1e-9) <= distance <= siblings * math.sqrt(4 / 3)


def test_spreads_halve_with_depth() -> None:
    known = GaussianTree.random(TreeTopology.chain(4), latent=64, features=64, variance=1e-9, generator=seeded())
    spread = known.leaf_moments()[1][0].diagonal().mean().sqrt().item()
    assert spread == pytest.approx(0.5**4, rel=0.1)


def test_the_hierarchy_can_be_read_from_the_data() -> None:
    tree = TreeTopology.balanced(2).split(3).split(6).prune(5)
    known = GaussianTree.random(tree, latent=4, features=6, generator=seeded(4))
    x, leaf = known.sample(2_000, generator=seeded(5))
    guess = torch.tensor(tree.leaves)[known.leaf_log_posterior(x).argmax(1)]
    assert (guess == leaf).double().mean() > 0.95

    centres = np.stack([x[leaf == node].mean(0).numpy() for node in tree.leaves])
    k = len(centres)
    merges = linkage(centres, "average")[:, :2].astype(int).tolist()
    children: dict[int, tuple[int | None, int | None]] = {k + i: (a, b) for i, (a, b) in enumerate(merges)}
    found = TreeTopology.from_children(children, root=2 * k - 2, next_id=2 * k - 1)
    assert same_hierarchy(found, tree, dict(enumerate(tree.leaves)))


def test_deeper_than_the_data_are_wide_is_allowed() -> None:
    known = GaussianTree.random(TreeTopology.balanced(3), latent=2, features=1, generator=seeded())
    means = known.leaf_moments()[0][:, 0]
    torch.testing.assert_close((means[0::2] - means[1::2]).abs(), torch.ones(4, dtype=torch.float64))


# --- errors -------------------------------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[], object]:  # noqa: ANN401
    return lambda: GaussianTree(**{**parameters(TreeTopology.balanced(1)), **values})


EACH = "needs one entry for each of the nodes"
PAIR = TreeTopology.balanced(1)
ONE, TWO, SQUARE = torch.zeros(1), torch.zeros(2), torch.zeros(2, 2)
WIDTHS = "latent and features must be at least 1 and separation at least 0; found "


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (changed(variance=0.0), ValueError, "variance must be finite and above 0, found 0.0"),
        (changed(variance=math.inf), ValueError, "variance must be finite and above 0, found inf"),
        (changed(variance=math.nan), ValueError, "variance must be finite and above 0, found nan"),
        (changed(weight={1: SQUARE}), KeyError, f"weight {EACH} [1, 2], found [1]"),
        (changed(bias={0: TWO, 1: TWO, 2: TWO}), KeyError, f"bias {EACH} [1, 2], found [0, 1, 2]"),
        (changed(logvar={}), KeyError, f"logvar {EACH} [1, 2], found []"),
        (changed(branch_logit={1: 0.0}), KeyError, f"branch_logit {EACH} [0], found [1]"),
        (changed(decoder_weight={}), KeyError, f"decoder_weight {EACH} [1, 2]"),
        (changed(decoder_bias={}), KeyError, f"decoder_bias {EACH} [1, 2]"),
        (
            changed(decoder_weight={1: TWO, 2: TWO}),
            ValueError,
            "decoder_weight must have the shape (features, latent), found (2,)",
        ),
        (changed(bias={1: TWO, 2: ONE}), ValueError, "bias of node 2 must have the shape (2,), found (1,)"),
        (
            changed(branch_logit={0: TWO}),
            ValueError,
            "branch_logit of node 0 must have the shape (), found (2,)",
        ),
        (
            changed(logvar={1: TWO, 2: TWO / 0}),
            ValueError,
            "logvar of node 2 must be finite, found [nan, nan]",
        ),
        (changed(branch_logit={0: math.inf}), ValueError, "branch_logit of node 0 must be finite, found inf"),
        (lambda: GaussianTree.random(PAIR, latent=0, features=1), ValueError, f"{WIDTHS}0, 1 and 8.0"),
        (lambda: GaussianTree.random(PAIR, latent=1, features=0), ValueError, f"{WIDTHS}1, 0 and 8.0"),
        (
            lambda: GaussianTree.random(PAIR, latent=1, features=1, separation=-1),
            ValueError,
            f"{WIDTHS}1, 1 and -1",
        ),
        (lambda: world().sample(-1), ValueError, "n must be at least 0, found -1"),
        (lambda: world().log_prob(torch.zeros(3)), ValueError, "expected x of shape (batch, 3), found (3,)"),
        (
            lambda: world().leaf_log_posterior(torch.zeros(1, 2)),
            ValueError,
            "found (1, 2); flatten images first",
        ),
        (lambda: world().node_log_posterior(torch.zeros(1, 1, 3)), ValueError, "found (1, 1, 3)"),
    ],
)
def test_errors_teach(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()

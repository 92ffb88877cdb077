"""GaussianTree against scipy, numpy and large samples: the oracle of other tests needs oracles of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.cluster.hierarchy import linkage
from scipy.special import expit, logsumexp
from strategies import quick, topologies
from torch import Tensor

from treediff.testing import GaussianMixture, GaussianTree, same_hierarchy
from treediff.topology import TreeTopology

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32)
UNEVEN = TreeTopology.balanced(2).split(4).prune(3).prune(5)  # pass-throughs at 1 and 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(tree: TreeTopology, latent: int = 2, features: int = 3, seed: int = 0) -> dict[str, Any]:
    """Every number different, nothing symmetric or orthogonal, so that a transposed matrix shows."""
    generator = seeded(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    below = tree.ids[1:]
    return {
        "topology": tree,
        "weight": {node: draw(latent, latent) for node in below},
        "bias": {node: draw(latent) for node in below},
        "logvar": {node: draw(latent) for node in below},
        "branch_logit": {node: draw().item() for node in tree.routed},
        "decoder_weight": {leaf: draw(features, latent) for leaf in tree.leaves},
        "decoder_bias": {leaf: draw(features) for leaf in tree.leaves},
        "variance": 0.3,
    }


def world(tree: TreeTopology = UNEVEN, latent: int = 2, features: int = 3, seed: int = 0) -> GaussianTree:
    return GaussianTree(**parameters(tree, latent, features, seed))


def moments_of_one_path(known: GaussianTree, leaf: int) -> tuple[Array, Array]:
    """Write x as a sum of independent noises, one per node of the path, each seen through all below it."""
    path = known.topology.path(leaf)
    decoder = known.decoder_weight[leaf].numpy()
    mean = known.decoder_bias[leaf].numpy()
    covariance = known.variance * np.eye(known.features)
    for i, node in enumerate(path):
        seen = decoder
        for later in reversed(path[i + 1 :]):
            seen = seen @ known.weight[later].numpy()
        if i == 0:
            covariance = covariance + seen @ seen.T
        else:
            mean = mean + seen @ known.bias[node].numpy()
            covariance = covariance + seen @ np.diag(np.exp(known.logvar[node].numpy())) @ seen.T
    return mean, covariance


def log_prior_of_one_path(known: GaussianTree, leaf: int) -> float:
    path, total = known.topology.path(leaf), 0.0
    for above, below in pairwise(path):
        if above in known.topology.routed:
            left = expit(known.branch_logit[above].item())
            total += math.log(left if known.topology.children(above)[0] == below else 1 - left)
    return total


def log_joint_by_scipy(known: GaussianTree, x: Tensor) -> Array:
    """The logarithm of P(leaf) p(x | leaf), `(B, K)`, from the path-by-path moments."""
    columns = []
    for leaf in known.topology.leaves:
        normal = stats.multivariate_normal(*moments_of_one_path(known, leaf))
        columns.append(log_prior_of_one_path(known, leaf) + np.atleast_1d(normal.logpdf(x.numpy())))
    return np.stack(columns, 1)


# --- exact answers ----------------------------------------------------------------------------------------


@quick
@given(topologies(max_steps=6), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_everything_equals_a_mixture_built_by_scipy(
    tree: TreeTopology, latent: int, features: int, seed: int
) -> None:
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
    known.log_prob(x).sum().backward()  # type: ignore[no-untyped-call]
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


# --- samples ----------------------------------------------------------------------------------------------


def test_samples_have_the_moments_of_their_leaves() -> None:
    known, n = world(), 200_000
    x, leaf = known.sample(n, generator=seeded(1))
    assert x.dtype == torch.float64 and leaf.dtype == torch.int64
    assert set(leaf.tolist()) == set(UNEVEN.leaves)
    for k, node in enumerate(UNEVEN.leaves):
        mean, covariance = (moments[k].numpy() for moments in known.leaf_moments())
        rows = x[leaf == node].numpy()
        variance = covariance.diagonal()
        # Five standard errors; with 12 numbers per leaf a right program fails once in 100000 seeds or so.
        bound = 5 * np.sqrt(variance / len(rows))
        assert (np.abs(rows.mean(0) - mean) < bound).all()
        bound = 5 * np.sqrt((np.outer(variance, variance) + covariance**2) / len(rows))
        assert (np.abs(np.cov(rows.T) - covariance) < bound).all()


def test_leaves_are_as_frequent_as_the_prior_says() -> None:
    tree, n = TreeTopology.balanced(2).split(3).prune(4), 50_000
    known = world(tree)
    leaf = known.sample(n, generator=seeded(2))[1].numpy()
    counts = [(leaf == node).sum() for node in tree.leaves]
    expected = n * known.log_prior().exp().numpy()
    # One right program in a million would fail here; the seed is fixed.
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_posteriors_are_calibrated() -> None:
    known = GaussianTree.random(
        UNEVEN, latent=2, features=2, separation=1.5, variance=0.1, generator=seeded()
    )
    x, leaf = known.sample(20_000, generator=seeded(3))
    for i, node in enumerate(UNEVEN):
        probability = known.node_log_posterior(x).exp()[:, i]
        passed = torch.isin(leaf, torch.tensor(UNEVEN.leaves_under(node))).double()
        error = (passed - probability).mean().abs()
        assert (
            error <= 5 * (probability * (1 - probability)).mean().clamp_min(0).sqrt() / len(x) ** 0.5 + 1e-12
        )


def test_samples_and_worlds_follow_the_seed_alone() -> None:
    state = torch.get_rng_state()

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        return GaussianTree.random(UNEVEN, latent=2, features=3, generator=seeded(seed)).sample(
            9, generator=seeded(seed)
        )

    (x, leaf), (again, leaf_again), (other, _) = draw(0), draw(0), draw(1)
    assert torch.equal(x, again) and torch.equal(leaf, leaf_again)
    assert not torch.isclose(x, other).any()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_torchs_own_is_used() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = GaussianTree.random(UNEVEN, latent=2, features=3).sample(3)[0]
        torch.manual_seed(0)
        second = GaussianTree.random(UNEVEN, latent=2, features=3).sample(3)[0]
        third = GaussianTree.random(UNEVEN, latent=2, features=3).sample(3)[0]
    assert torch.equal(first, second)
    assert not torch.isclose(first, third).any()


def test_no_samples_are_fine() -> None:
    x, leaf = world().sample(0)
    assert x.shape == (0, 3) and leaf.shape == (0,)
    assert world().node_log_posterior(x).shape == (0, len(UNEVEN))


# --- random worlds ----------------------------------------------------------------------------------------


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
    known = GaussianTree.random(
        TreeTopology.chain(4), latent=64, features=64, variance=1e-9, generator=seeded()
    )
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


# --- hierarchies ------------------------------------------------------------------------------------------


def shape_of(tree: TreeTopology, node: int, names: dict[int, int]) -> Any:  # noqa: ANN401
    """Nested frozensets, a single child standing for its parent: equal if and only if the hierarchies are."""
    below = [shape_of(tree, child, names) for child in tree.children(node)]
    return names[node] if not below else below[0] if len(below) == 1 else frozenset(below)


def mirrored(tree: TreeTopology, flips: int, shift: int) -> TreeTopology:
    """The same hierarchy under other ids, with some left and right swapped."""
    children: dict[int, tuple[int | None, int | None]] = {}
    for i, (node, left, right) in enumerate(zip(tree.ids, tree.left, tree.right, strict=True)):
        pair = [None if child is None else child + shift for child in (left, right)]
        children[node + shift] = (pair[1], pair[0]) if flips >> i & 1 else (pair[0], pair[1])
    return TreeTopology.from_children(children, root=tree.root + shift, next_id=tree.next_id + shift)


@quick
@given(topologies(), st.integers(0, 2**40), st.integers(0, 9), st.randoms(use_true_random=False))
def test_same_hierarchy_sees_through_names_and_swaps(
    tree: TreeTopology, flips: int, shift: int, random: Random
) -> None:
    other = mirrored(tree, flips, shift)
    assert same_hierarchy(tree, other, {leaf: leaf + shift for leaf in tree.leaves})
    shuffled = list(other.leaves)
    random.shuffle(shuffled)
    leaf_map = dict(zip(tree.leaves, shuffled, strict=True))
    expected = shape_of(tree, tree.root, leaf_map) == shape_of(other, other.root, {n: n for n in other})
    assert same_hierarchy(tree, other, leaf_map) == expected


def test_same_hierarchy_contracts_pass_throughs() -> None:
    short = TreeTopology.balanced(1)
    assert same_hierarchy(short.split(1).prune(3), short, {4: 1, 2: 2})
    assert same_hierarchy(TreeTopology.chain(3), TreeTopology.balanced(0), {3: 0})


def test_same_hierarchy_needs_every_leaf_to_have_its_own_partner() -> None:
    short, long = TreeTopology.balanced(1), TreeTopology.balanced(1).split(2)
    assert not same_hierarchy(short, long, {1: 1, 2: 3})
    assert not same_hierarchy(long, short, {1: 1, 3: 2, 4: 2})
    assert not same_hierarchy(short, short, {1: 1, 2: 1})


# --- errors -----------------------------------------------------------------------------------------------


def changed(**values: Any) -> Callable[[], object]:  # noqa: ANN401
    return lambda: GaussianTree(**{**parameters(TreeTopology.balanced(1)), **values})


def mixture(weights: int, means: tuple[int, ...], covariances: tuple[int, ...]) -> Callable[[], object]:
    return lambda: GaussianMixture(torch.zeros(weights), torch.zeros(means), torch.zeros(covariances))


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
        (
            mixture(2, (1, 3), (1, 3, 3)),
            ValueError,
            "expected log_weights (K,), means (K, F), covariances (K, F, F); found",
        ),
        (mixture(2, (1, 3), (1, 3, 3)), ValueError, "found [(2,), (1, 3), (1, 3, 3)]"),
        (mixture(1, (3,), (1, 3, 3)), ValueError, "expected log_weights (K,)"),
        (mixture(1, (1, 3), (1, 3)), ValueError, "expected log_weights (K,)"),
        (mixture(2, (2, 3), (2, 3, 3)), ValueError, "positive definite; those of components [0, 1] are not"),
        (lambda: same_hierarchy(PAIR, PAIR, {1: 2}), KeyError, f"leaf_map {EACH} [1, 2]"),
        (
            lambda: same_hierarchy(PAIR, PAIR, {1: 2, 2: 0}),
            ValueError,
            "leaf_map must lead to leaves of the second tree, [1, 2]; found [0]",
        ),
    ],
)
def test_errors_teach(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()

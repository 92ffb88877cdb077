"""Large samples from a GaussianTree against its exact moments and probabilities."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from worlds import UNEVEN, seeded, world

from treediff.testing import GaussianTree
from treediff.tree.topology import TreeTopology


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
    known = GaussianTree.random(UNEVEN, latent=2, features=2, separation=1.5, variance=0.1, generator=seeded())
    x, leaf = known.sample(20_000, generator=seeded(3))
    for i, node in enumerate(UNEVEN):
        probability = known.node_log_posterior(x).exp()[:, i]
        passed = torch.isin(leaf, torch.tensor(UNEVEN.leaves_under(node))).double()
        error = (passed - probability).mean().abs()
        assert error <= 5 * (probability * (1 - probability)).mean().clamp_min(0).sqrt() / len(x) ** 0.5 + 1e-12


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

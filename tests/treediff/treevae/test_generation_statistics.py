"""Large samples from a linear TreeVAE against the exact probabilities and moments of its GaussianTree."""

from __future__ import annotations

import pytest
import torch
from linear import linear_model
from models import GROWN, build, louder
from scipy import stats
from worlds import UNEVEN, seeded, world

from treediff import TreeTopology


@pytest.mark.parametrize("tree", [UNEVEN, TreeTopology.balanced(2)], ids=["uneven", "balanced"])
def test_leaves_are_as_frequent_as_the_prior_says(tree: TreeTopology) -> None:
    known, n = world(tree), 20_000
    leaf = linear_model(known).sample(n, generator=seeded(1)).leaf
    counts = [int((leaf == node).sum()) for node in tree.leaves]
    expected = n * known.log_prior().exp().numpy()
    # One right program in a million would fail here; the seed is fixed.
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_through_an_inner_node_leaves_are_as_frequent_as_given_that_node() -> None:
    tree, n = TreeTopology.balanced(3), 20_000
    known = world(tree)
    leaf = linear_model(known).sample(n, node=2, generator=seeded(2)).leaf
    below = tree.leaves_under(2)
    counts = [int((leaf == node).sum()) for node in below]
    assert sum(counts) == n
    columns = [tree.leaves.index(node) for node in below]
    expected = n * known.log_prior()[columns].softmax(0).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_frequencies_follow_routers_that_look_at_the_latent() -> None:
    model, n = louder(build(GROWN, seed=2), 3.0, only="prior_routers"), 20_000
    # Each root is drawn once more and seen from all leaves; the mean over roots is what chance should come to.
    expected = model.sample_leaves(n, generator=seeded(3)).log_probs.exp()
    assert expected.std(0).min() > 0.01
    leaf = model.sample(n, generator=seeded(4)).leaf
    for k, node in enumerate(GROWN.leaves):
        share = (leaf == node).double().mean()
        error = (expected[:, k].mean() * (1 - expected[:, k].mean()) / n + expected[:, k].var() / n).sqrt()
        assert (share - expected[:, k].mean()).abs() < 5 * error


def test_a_decision_is_taken_with_the_routers_probability() -> None:
    """Calibration image by image: decisions drawn from the same seed as the latents they look at."""
    model, n = louder(build(TreeTopology.balanced(1)), 8.0, only="prior_routers"), 20_000
    left = model.sample_leaves(n, generator=seeded(5)).log_probs[:, 0].exp()
    went = (model.sample(n, generator=seeded(5)).leaf == 1).double()
    assert left.std() > 0.05
    for low, high in ((0.0, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 1.0)):
        some = (left >= low) & (left < high)
        spread = (left[some] * (1 - left[some])).sum().sqrt()
        assert ((went - left)[some].sum().abs() <= 5 * spread).item()


def test_the_noise_of_a_decision_is_not_that_of_its_latent() -> None:
    """Where routers do not look at the latent, those that go left have latents like those that go right."""
    drawn = linear_model(world(TreeTopology.balanced(2))).sample(20_000, generator=seeded(7))
    for depth in (0, 1):
        node, below = drawn.path[:, depth], drawn.path[:, depth + 1]
        for parent in node.unique():
            children = below[node == parent]
            # Size and direction: either could tell what the draw was.
            z = drawn.z[node == parent, depth]
            seen = torch.cat([z, z.square(), z.square().sum(1, keepdim=True).log()], 1)
            left, right = (seen[children == child] for child in children.unique())
            error = (left.var(0) / len(left) + right.var(0) / len(right)).sqrt()
            assert ((left.mean(0) - right.mean(0)).abs() < 5 * error).all()


def test_pictures_have_the_moments_of_their_leaves() -> None:
    known, n = world(UNEVEN), 30_000
    model = linear_model(known)
    means, covariances = known.leaf_moments()
    # A picture is the mean of the likelihood, so the observation noise is missing from it.
    covariances = covariances - known.variance * torch.eye(known.features)
    for k, leaf in enumerate(UNEVEN.leaves):
        images = model.sample(n, node=leaf, generator=seeded(6)).images
        variance = covariances[k].diagonal()
        assert ((images.mean(0) - means[k]).abs() < 5 * (variance / n).sqrt()).all()
        bound = 5 * ((torch.outer(variance, variance) + covariances[k] ** 2) / n).sqrt()
        assert ((images.T.cov() - covariances[k]).abs() < bound).all()

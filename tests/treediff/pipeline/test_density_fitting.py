"""Densities fitted to the posterior: against closed forms and against what scikit-learn says of the same rows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from linear import Decision, linear_model
from models import GROWN, PRUNED, build, observations
from sklearn.mixture import GaussianMixture
from torch import Tensor
from worlds import Array, seeded, world

from treediff import TreeTopology, TreeVAE
from treediff.core.noise import combine_seeds, seed_from
from treediff.pipeline.conditions import condition_of
from treediff.pipeline.density import LeafDensity


def known_world(logits: dict[int, float] | None = None, seed: int = 0) -> TreeVAE:
    """A linear model that routes all alike, whose posterior variances do not depend on the image."""
    known = world(GROWN, seed=seed)
    model = linear_model(known, seed=seed)
    with torch.no_grad():
        for node in GROWN.ids:
            model.banks.heads.named_weights(node)["weight"][2:] = 0
        for node in GROWN.routed:
            bias = torch.tensor([(logits or {}).get(node, 0.4)]).double()
            model.banks.posterior_routers.assign(node, Decision(3, torch.zeros(1, 3).double(), bias))
    return model


def path_of(model: TreeVAE, leaf: int, mean: Array, factor: Array) -> tuple[Array, Array]:
    """Mean and covariance of a leaf's path for images `mean + factor noise`: each latent is affine in all noises."""
    path, f = GROWN.path(leaf), 3
    noises = f + 2 * len(path)
    x_map = np.hstack([factor, np.zeros((f, noises - f))])
    maps: list[Array] = []
    means: list[Array] = []
    for depth, node in enumerate(path):
        head = {name: w.detach().numpy() for name, w in model.banks.heads.named_weights(node).items()}
        z_map, z_mean = head["weight"][:2] @ x_map, head["weight"][:2] @ mean + head["bias"][:2]
        precision = np.exp(-head["bias"][2:])
        if depth:
            prior = {name: w.detach().numpy() for name, w in model.banks.transitions.named_weights(node).items()}
            own = np.exp(-prior["bias"][2:])
            total = precision + own
            z_map = (precision[:, None] * z_map + own[:, None] * prior["weight"][:2] @ maps[-1]) / total[:, None]
            z_mean = (precision * z_mean + own * (prior["weight"][:2] @ means[-1] + prior["bias"][:2])) / total
            precision = total
        z_map = z_map.copy()
        z_map[:, f + 2 * depth : f + 2 * depth + 2] += np.diag(precision**-0.5)
        maps.append(z_map)
        means.append(z_mean)
    stacked = np.concatenate(maps)
    return np.concatenate(means), stacked @ stacked.T


def check_gaussian(density: LeafDensity, k: int, m: int, mean: Array, covariance: Array, n: float) -> None:
    """Within five standard errors of what `n` rows say; all past the leaf is empty."""
    numbers = len(mean)
    found, factor = density.means[k, m], density.factors[k, m].double()
    assert not found[numbers:].any() and not factor[numbers:].any() and not factor[:, numbers:].any()
    assert torch.equal(factor, factor.tril()) and (factor.diagonal()[:numbers] > 0).all()
    variance = np.diag(covariance)
    assert (np.abs(found[:numbers].numpy() - mean) < 5 * np.sqrt(variance / n)).all()
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    assert (np.abs((factor @ factor.T).numpy()[:numbers, :numbers] - covariance) < 5 * error).all()


def gaussian_images(n: int, mean: Array, factor: Array, seed: int) -> Tensor:
    noise = torch.randn(n, 3, generator=seeded(seed), dtype=torch.float64)
    return torch.from_numpy(mean) + noise @ torch.from_numpy(factor).T


FACTOR = np.array([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]])


def test_fitting_recovers_the_gaussian_that_latents_come_from() -> None:
    model, mean, n = known_world(), np.array([0.5, -1.0, 2.0]), 20_000
    x = gaussian_images(n, mean, FACTOR, 1)
    density = LeafDensity.fit(model, x, components=1, generator=seeded(2))
    shares = model.leaf_log_probs(x[:1])[0].exp().detach()
    torch.testing.assert_close(density.shares, shares.float())
    assert density.means.dtype == density.factors.dtype == density.weights.dtype == torch.float32
    for k, leaf in enumerate(GROWN.leaves):
        check_gaussian(density, k, 0, *path_of(model, leaf, mean, FACTOR), n * float(shares[k]))
    assert (density.weights == 1).all()


def test_fitting_recovers_a_mixture() -> None:
    model, n, share = known_world(seed=1), 12_000, 0.3
    centres = [np.array([0.0, 0.0, 0.0]), np.array([40.0, -60.0, 50.0])]
    few = round(n * share)
    x = torch.cat([gaussian_images(few, centres[0], FACTOR, 3), gaussian_images(n - few, centres[1], FACTOR, 4)])
    x = x[torch.randperm(n, generator=seeded(5))]
    density = LeafDensity.fit(model, x, components=2, generator=seeded(6))
    for k, leaf in enumerate(GROWN.leaves):
        order = density.weights[k].argsort().tolist()
        rows = n * float(density.shares[k])
        assert float(density.weights[k, order[0]]) == pytest.approx(share, abs=5 * (share * (1 - share) / rows) ** 0.5)
        for m, centre, part in zip(order, centres, (share, 1 - share), strict=True):
            check_gaussian(density, k, m, *path_of(model, leaf, centre, FACTOR), rows * part)


def test_fitting_is_scikit_learns_mixture_of_the_posteriors_paths() -> None:
    model = build(PRUNED, "conv")
    x = observations(model, 300)
    density = LeafDensity.fit(model, x, components=3, generator=seeded(7))
    seed = seed_from(seeded(7))
    told = condition_of(model, x, generator=seeded(seed))
    assert told.z is not None
    torch.testing.assert_close(density.shares, model.leaf_log_probs(x).exp().mean(0).float())
    for k, leaf in enumerate(PRUNED.leaves):
        numbers = len(PRUNED.path(leaf)) * 3
        rows = told.z.flatten(1)[told.node == leaf, :numbers].numpy()
        known = GaussianMixture(3, max_iter=200, random_state=combine_seeds(seed, leaf) % 2**32).fit(rows)
        torch.testing.assert_close(density.weights[k], torch.from_numpy(known.weights_).float())
        torch.testing.assert_close(density.means[k, :, :numbers], torch.from_numpy(known.means_).float())
        factor = density.factors[k, :, :numbers, :numbers]
        torch.testing.assert_close(factor @ factor.mT, torch.from_numpy(known.covariances_).float())


def test_samples_of_a_fitted_density_have_the_moments_of_what_it_was_fitted_to() -> None:
    """EM keeps mean and covariance of the data, whatever the number of components."""
    model = build(GROWN, "conv")
    x = observations(model, 600)
    density = LeafDensity.fit(model, x, components=2, generator=seeded(1))
    told = condition_of(model, x, generator=seeded(seed_from(seeded(1))))
    assert told.z is not None
    for leaf in GROWN.leaves:
        rows = told.z[told.node == leaf].flatten(1)[:, : 3 * len(GROWN.path(leaf))]
        z = density.sample(model, 20_000, node=leaf, generator=seeded(2)).z.flatten(1)
        assert ((z.mean(0) - rows.mean(0)).abs() < 5 * rows.std(0) / 20_000**0.5).all()
        assert (z.T.cov() - rows.T.cov(correction=0)).abs().max() < 0.1 * rows.var(0).max()


def test_fitting_depends_on_the_seed_only() -> None:
    model = build(GROWN, "mlp")
    x, state, numpys = observations(model, 200), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    one, same, other = (
        LeafDensity.fit(model, x, components=2, batch_size=size, generator=seeded(seed))
        for size, seed in ((200, 1), (33, 1), (200, 2))
    )
    for name, table in one.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], table, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(one.means[:, 0], other.means[:, 0]).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == str(numpys)  # noqa: NPY002


@pytest.mark.parametrize(("n", "expected"), [(2, 1), (5, 1), (6, 2), (11, 3), (12, 4), (60, 4)])
def test_few_images_make_few_components(n: int, expected: int) -> None:
    """Of two numbers each: three images make a covariance."""
    model = build(TreeTopology.balanced(0))
    density = LeafDensity.fit(model, observations(model, n), components=4, generator=seeded(1))
    assert (density.weights > 0).sum() == expected and not density.weights[0, expected:].any()
    assert float(density.weights.sum()) == pytest.approx(1)
    drawn = density.sample(model, 50, generator=seeded(2))
    assert drawn.z.isfinite().all() and drawn.images.isfinite().all()


def test_a_leaf_without_images_is_an_error() -> None:
    x = torch.randn(40, 3, generator=seeded(1), dtype=torch.float64)
    message = "a Gaussian needs at least 2 images, found 0 of 40 at leaf 6; give more images, or prune the leaf with "
    with pytest.raises(ValueError, match=re.escape(message + "tree_vae.prune(6)")):
        LeafDensity.fit(known_world({0: 0.0, 2: 2.0, 3: 1000.0}), x, generator=seeded(2))
    model = known_world({0: -50.0, 2: -50.0})
    weight = torch.tensor([[100.0, 0.0, 0.0]]).double()
    model.banks.posterior_routers.assign(0, Decision(3, weight, torch.zeros(1).double()))
    x[:, 0] = -1
    x[3, 0] = 1  # the only one that goes left, to leaf 1
    with pytest.raises(ValueError, match="found 1 of 40 at leaf 1"):
        LeafDensity.fit(model, x, generator=seeded(2))
    with pytest.raises(ValueError, match="expected at least one row, found none"):
        LeafDensity.fit(model, x[:0])

"""Score and denoiser of a mixture against autograd, quadrature and each other."""

import pytest
import torch
from torch import Tensor
from worlds import seeded, world

from treediff.diffusion.schedule import CosineSchedule, LinearSchedule
from treediff.testing import ExactDenoiser, GaussianMixture, GaussianTree

TIMES = [0.02, 0.3, 0.7, 1.0]


def points(known: GaussianTree, n: int = 6) -> Tensor:
    return known.sample(n, generator=seeded(1))[0]


def level(t: float) -> tuple[float, float]:
    time = torch.tensor(t, dtype=torch.float64)
    return float(LinearSchedule().alpha(time)), float(LinearSchedule().sigma(time))


@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_the_density(t: float) -> None:
    mixture = world().mixture.noised(*level(t))
    x = points(world()).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach()), gradient)


@pytest.mark.parametrize("t", TIMES)
def test_denoiser_and_score_by_the_formula_of_tweedie(t: float) -> None:
    known, schedule = world(), LinearSchedule()
    denoiser, x, (alpha, sigma) = known.denoiser(schedule), points(known), level(t)
    torch.testing.assert_close(denoiser(x, t), (x + sigma**2 * denoiser.score(x, t)) / alpha, rtol=1e-6, atol=1e-6)


def test_denoiser_is_the_mean_of_the_posterior_by_quadrature() -> None:
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[-1.0], [2.0]], dtype=torch.float64),
        torch.tensor([[[0.5]], [[0.2]]], dtype=torch.float64),
    )
    alpha, sigma, x_t = 0.8, 0.6, torch.tensor([[0.4]], dtype=torch.float64)
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    joint = (mixture.log_prob(grid) - 0.5 * ((x_t - alpha * grid) / sigma).square().squeeze(1)).exp()
    expected = (joint * grid.squeeze(1)).sum() / joint.sum()
    torch.testing.assert_close(mixture.denoise(x_t, alpha, sigma).squeeze(), expected)


def test_noised_moments_by_sampling() -> None:
    known, n = world(), 200_000
    x, _ = known.sample(n, generator=seeded(2))
    x_t = 0.6 * x + 0.8 * torch.randn(x.shape, generator=seeded(3), dtype=torch.float64)
    noised = known.mixture.noised(0.6, 0.8)
    weights = noised.log_weights.exp()
    mean = weights @ noised.means
    spread = noised.means - mean
    covariance = torch.einsum("k,kij->ij", weights, noised.covariances + spread[:, :, None] * spread[:, None, :])
    torch.testing.assert_close(x_t.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x_t.T), covariance, atol=0.3, rtol=0.03)


@pytest.mark.parametrize("t", TIMES)
def test_an_inner_node_is_the_mixture_of_its_leaves(t: float) -> None:
    """With weights `P(leaf | x_t, node)`, which change with `x_t`."""
    known, schedule = world(), CosineSchedule()
    x = points(known)
    time = torch.tensor(t, dtype=torch.float64)
    noised = known.mixture.noised(float(schedule.alpha(time)), float(schedule.sigma(time)))
    posterior = noised.log_posterior(x).exp()
    leaves = known.topology.leaves
    by_leaf = torch.stack([known.denoiser(schedule, leaf)(x, t) for leaf in leaves], 1)
    for node in known.topology:
        under = torch.tensor([leaf in known.topology.leaves_under(node) for leaf in leaves])
        weights = posterior * under / (posterior * under).sum(1, keepdim=True)
        torch.testing.assert_close(known.denoiser(schedule, node)(x, t), (weights[..., None] * by_leaf).sum(1))


def test_the_root_is_everything() -> None:
    known = world()
    x = points(known)
    root = known.denoiser(LinearSchedule(), known.topology.root)
    torch.testing.assert_close(root(x, 0.4), known.denoiser(LinearSchedule())(x, 0.4))


def test_without_noise_nothing_changes() -> None:
    x = points(world())
    torch.testing.assert_close(world().mixture.denoise(x, 1.0, 0.0), x)


def test_shapes_and_empty_batches() -> None:
    denoiser = ExactDenoiser(world().mixture, LinearSchedule())
    assert denoiser(torch.zeros(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match=r"expected x of shape \(batch, 3\), found \(2, 4\)"):
        denoiser(torch.zeros(2, 4), 0.5)


def test_no_such_node() -> None:
    with pytest.raises(KeyError, match="99"):
        world().denoiser(LinearSchedule(), 99)

"""Visits below the threshold that take place by chance: the bound and its gradient are right on average."""

import pytest
import torch

from treediff import TreeTopology, TreeVAE

DRAWS = 4000
TREE = TreeTopology.balanced(2).split(4).split(7).prune(5)


@pytest.fixture(scope="module")
def model() -> TreeVAE:
    generator = torch.Generator().manual_seed(2)
    made = TreeVAE.for_vectors(features=5, latent=2, width=8, topology=TREE, generator=generator).double()
    with torch.no_grad():  # decided enough that leaves lie on both sides of the thresholds
        for node in made.banks.posterior_routers.nodes:
            made.banks.posterior_routers.named_weights(node)["logit.weight"].mul_(6)
    return made


def terms(model: TreeVAE, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the four terms over evenly spaced chances, for one vector, and the gradient of their sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, generator=generator, dtype=torch.float64).expand(DRAWS, -1)
    noise = torch.randn(1, len(TREE), 2, generator=generator, dtype=torch.float64).expand(DRAWS, -1, -1)
    chance = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    ladder = model.features(x)
    visits = model.route(ladder, threshold=threshold, chance=chance if threshold else None)
    posterior = model.latents(ladder, visits, noise=noise)
    bound = posterior.bound(model.leaf_log_likelihood(posterior, x))
    found = torch.stack([bound.reconstruction, bound.kl_root, bound.kl_nodes, bound.kl_decisions]).mean(1)
    gradient = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True)
    return found.detach(), torch.cat([g.flatten() for g in gradient if g is not None])


@pytest.mark.parametrize("threshold", [0.02, 0.2, 0.9])
def test_terms_and_gradients_are_exact_on_average(model: TreeVAE, threshold: float) -> None:
    exact, slope = terms(model, 0.0)
    found, found_slope = terms(model, threshold)
    # A step function integrated on a grid is off by at most a step's height over the number of points.
    torch.testing.assert_close(found, exact, rtol=0, atol=float(exact.abs().max()) * len(TREE) / DRAWS)
    torch.testing.assert_close(found_slope, slope, rtol=0, atol=float(slope.abs().max()) * len(TREE) / DRAWS)


def test_a_visit_takes_place_as_often_as_its_probability_over_the_threshold(model: TreeVAE) -> None:
    x = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(DRAWS, -1)
    chance = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    exact = model.route(model.features(x[:1])).log_reach.exp()
    visits = model.route(model.features(x), threshold=0.3, chance=chance)
    share = visits.node.bincount(minlength=len(TREE)) / DRAWS
    torch.testing.assert_close(share.double(), (exact / 0.3).clamp_max(1), rtol=0, atol=1 / DRAWS)
    assert (share < 1).any()
    assert len(visits.image) < DRAWS * len(TREE)
    heavy = visits.log_reach.exp().clamp_min(0.3)
    torch.testing.assert_close(visits.reach(), heavy)


def test_without_chance_the_weights_are_the_probabilities(model: TreeVAE) -> None:
    visits = model.route(model.features(torch.zeros(3, 5, dtype=torch.float64)), threshold=0.1)
    torch.testing.assert_close(visits.reach(), visits.log_reach.exp())

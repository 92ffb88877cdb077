"""Leaving out what is hardly reached: what it costs, and that no reported number does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, PRUNED, build, few, louder, noise_for, observations
from strategies import topologies
from worlds import seeded

from treediff import TreePosterior, TreeTopology, TreeVAE
from treediff.tree.visits import Visits

TERMS = ("reconstruction", "kl_root", "kl_nodes", "kl_decisions")
THRESHOLDS = st.sampled_from([1e-6, 0.01, 0.2, 0.5, 0.9])


def restricted(model: TreeVAE, exact: TreePosterior, x: torch.Tensor, threshold: float) -> dict[str, torch.Tensor]:
    """The terms of the bound from the full table of visits, a visit at a time, without those hardly reached."""
    visits = exact.visits
    reach, nodes, decisions = visits.log_reach.exp(), exact.kl_nodes(), exact.kl_decisions()
    leaves = visits.at_leaves()
    losses = dict(zip(leaves.tolist(), -model.leaf_log_likelihood(exact, x), strict=True))
    routed = {visit: i for i, visit in enumerate(visits.routed.tolist())}
    found = {term: x.new_zeros(len(x)) for term in TERMS}
    for visit, (image, node) in enumerate(zip(visits.image.tolist(), visits.node.tolist(), strict=True)):
        # The reach shrinks on the way down, so a visit is kept when it reaches the threshold itself.
        if reach[visit] >= threshold:
            found["kl_root" if node == 0 else "kl_nodes"][image] += reach[visit] * nodes[visit]
            if visit in routed:
                found["kl_decisions"][image] += reach[visit] * decisions[routed[visit]]
            if visit in losses:
                found["reconstruction"][image] += reach[visit] * losses[visit]
    return found


@few
@given(topologies(max_steps=7), THRESHOLDS, st.sampled_from([1.0, 6.0]), st.integers(0, 2**32))
def test_what_is_left_out_is_exactly_what_is_hardly_reached(
    tree: TreeTopology, threshold: float, sureness: float, seed: int
) -> None:
    model = louder(build(tree, "mlp", seed=seed), sureness, only="posterior_routers")
    x, noise = observations(model, 4), noise_for(model, 4)
    exact = model.posterior(x, noise=noise)
    found = model.elbo(x, threshold=threshold, noise=noise)
    for term, expected in restricted(model, exact, x, threshold).items():
        torch.testing.assert_close(getattr(found, term), expected, rtol=1e-9, atol=1e-9, msg=term)

    # Each leaf is cut off above or at itself, with less than the threshold, so the lost mass is below this.
    lost = 1 - model.leaf_log_probs(x, threshold=threshold).exp().sum(1)
    assert (lost >= -1e-12).all() and (lost <= threshold * len(tree.leaves) + 1e-12).all()
    # Bernoulli losses and divergences are not negative, so the estimate errs upwards; at most by what was lost.
    full = model.elbo(x, noise=noise)
    visits, leaves = exact.visits, exact.visits.at_leaves()
    losses = -model.leaf_log_likelihood(exact, x)
    worst = visits.table(leaves, losses, visits.plan.leaf_rank, len(tree.leaves), 0.0).max(1).values
    error = full.reconstruction - found.reconstruction
    assert (error >= -1e-9).all() and (error <= lost * worst + 1e-9).all()
    assert (found.elbo >= full.elbo - 1e-9).all()


def test_the_error_vanishes_with_the_threshold() -> None:
    model = build(TreeTopology.balanced(3), "mlp")
    x, noise = observations(model, 6), noise_for(model, 6)
    exact = model.elbo(x, noise=noise).elbo
    errors = [(model.elbo(x, threshold=t, noise=noise).elbo - exact).max().item() for t in (0.3, 0.1, 0.03, 1e-9)]
    assert errors[0] > 1  # nats: far too high, so the test sees something
    assert errors == sorted(errors, reverse=True)
    assert abs(errors[-1]) < 1e-9


def test_leaves_left_out_have_no_probability_and_are_never_decoded() -> None:
    model = build(TreeTopology.balanced(1))
    with torch.no_grad():
        model.banks.posterior_routers.named_weights(0)["logit.bias"].fill_(50.0)
    x = observations(model, 3)
    log_probs = model.leaf_log_probs(x, threshold=0.01)
    assert (log_probs[:, 0] > -1e-9).all() and (log_probs[:, 1] == -float("inf")).all()
    model.elbo(x, threshold=0.01, generator=seeded()).loss().backward()
    gradient = model.banks.decoders.weights_of(2).grad
    assert gradient is None or not gradient.any()
    model.elbo(x, generator=seeded()).loss().backward()
    gradient = model.banks.decoders.weights_of(2).grad
    assert gradient is not None and gradient.any()


def test_leaves_as_probable_as_the_threshold_are_kept() -> None:
    model = build(GROWN)
    x = observations(model, 20)
    probs = model.leaf_log_probs(x).exp()
    threshold = probs.median().item()
    kept = model.leaf_log_probs(x, threshold=threshold - 1e-9).isfinite()
    assert torch.equal(kept, probs >= threshold) and kept.any() and not kept.all()


class Recorder(TreeVAE):
    """Remembers every threshold that routing was asked for."""

    asked: tuple[float, ...] = ()

    def route(self, features: Any, **settings: Any) -> Visits:  # noqa: ANN401
        self.asked = (*self.asked, settings.get("threshold", 0.0))
        return super().route(features, **settings)


def test_what_is_reported_leaves_nothing_out() -> None:
    model = Recorder.for_vectors(features=3, latent=2, width=4, topology=PRUNED)
    assert isinstance(model, Recorder)
    x = torch.randn(4, 3, generator=seeded())
    model.elbo(x)
    model.iwae(x, 3)
    model.leaf_log_probs(x)
    model.cluster(x)
    model.reconstruct(x)
    model.posterior(x)
    assert len(model.asked) >= 6 and set(model.asked) == {0.0}
    model.elbo(x, threshold=0.2)
    assert model.asked[-1] == 0.2


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 2, float("nan")])
def test_a_threshold_is_a_probability(threshold: float) -> None:
    model = build()
    x = observations(model, 2)
    for call in (model.elbo, model.posterior, model.leaf_log_probs):
        with pytest.raises(ValueError, match="threshold is a probability, at least 0 and below 1; found"):
            call(x, threshold=threshold)  # type: ignore[operator]


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("tree", [TreeTopology.balanced(0), PRUNED], ids=["root", "pruned"])
def test_small_batches_and_trees(tree: TreeTopology, n: int) -> None:
    model = build(tree, "maps")
    x, noise = observations(model, n), noise_for(model, n)
    found = model.elbo(x, threshold=1e-12, noise=noise)
    torch.testing.assert_close(found.elbo, model.elbo(x, noise=noise).elbo, rtol=1e-12, atol=1e-12)

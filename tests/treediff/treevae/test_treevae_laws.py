"""What holds for every TreeVAE and every batch: probabilities sum to one, divergences are not negative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, PRUNED, build, few, louder, noise_for, observations
from strategies import topologies
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.tree.probability import path_log_probs

# Weights of a network that has seen too large a step. At 4 some variances are below e^-45; at 10 they are below e^-300,
# and divergences then overflow float32.
SCALES = st.sampled_from([0.0, 0.1, 1.0, 4.0])
SURENESS = st.sampled_from([1.0, 100.0])  # of routers, beyond that
SEEDS = st.integers(0, 2**32)


def kl_bound(model: TreeVAE, size: float) -> float:
    """How far below 0 rounding may push a divergence whose terms are about `size`: some units in the last place."""
    return 64 * torch.finfo(model.dtype).eps * math.prod(model.latent) * (1 + size)


@few
@given(topologies(max_steps=8), SURENESS, SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_probabilities_of_the_leaves_sum_to_one(
    tree: TreeTopology, sureness: float, seed: int, dtype: torch.dtype
) -> None:
    model = louder(build(tree, seed=seed, dtype=dtype), sureness, only="routers")
    log_probs = model.leaf_log_probs(observations(model, 3))
    assert log_probs.shape == (3, len(tree.leaves)) and log_probs.dtype == dtype
    assert (log_probs <= 0).all()
    # One rounding per router on the way to a leaf, each relative to a logit that may be large.
    digits = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(log_probs.logsumexp(1), torch.zeros(3, dtype=dtype), rtol=0, atol=digits)


@few
@given(topologies(max_steps=8), SEEDS)
def test_leaf_probabilities_are_the_products_of_the_decisions(tree: TreeTopology, seed: int) -> None:
    model = build(tree, seed=seed)
    x = observations(model, 3)
    features = model.features(x)
    # Each router as a module of its own; then the tree's incidence matrices, which have tests of their own.
    logits = [model.banks.posterior_routers.module(node)(features[tree.depth(node)]) for node in tree.routed]
    table = torch.stack(logits, 1) if logits else x.new_zeros(3, 0)
    expected = path_log_probs(table, tree)[:, [tree.index[leaf] for leaf in tree.leaves]]
    found = model.leaf_log_probs(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert model.cluster(x).tolist() == [tree.leaves[k] for k in expected.argmax(1)]
    torch.testing.assert_close(model.posterior(x).leaf_log_probs(), found, rtol=0, atol=0)


@few
@given(topologies(max_steps=8), SCALES, SURENESS, SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_no_divergence_is_negative(
    tree: TreeTopology, scale: float, sureness: float, seed: int, dtype: torch.dtype
) -> None:
    model = louder(louder(build(tree, seed=seed, dtype=dtype), scale), sureness, only="routers")
    x = observations(model, 3)
    posterior = model.posterior(x, noise=noise_for(model, 3))
    assert posterior.z.isfinite().all()
    nodes, decisions = posterior.kl_nodes(), posterior.kl_decisions()
    variances = (posterior.logvar.abs().max() + posterior.prior_logvar.abs().max()).item()
    assert nodes.isfinite().all() and decisions.isfinite().all()
    assert nodes.min() >= -kl_bound(model, variances)
    if len(decisions):
        sure = (posterior.visits.logits.abs().max() + posterior.prior_logits.abs().max()).item()
        assert decisions.min() >= -kl_bound(model, sure)
    elbo = model.elbo(x, noise=noise_for(model, 3))
    for term in (elbo.kl_root, elbo.kl_nodes, elbo.kl_decisions):
        assert term.isfinite().all() and term.min() >= -kl_bound(model, variances) * len(tree)


@few
@given(topologies(max_steps=6), SCALES, SURENESS, SEEDS)
def test_gradients_are_finite_however_sure_the_model_is(
    tree: TreeTopology, scale: float, sureness: float, seed: int
) -> None:
    model = louder(louder(build(tree, seed=seed, dtype=torch.float32), scale), sureness, only="routers")
    x = observations(model, 3)
    model.elbo(x, noise=noise_for(model, 3)).loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_routers_that_nearly_rule_a_leaf_out_can_still_learn() -> None:
    model = build(TreeTopology.balanced(1), dtype=torch.float32)
    with torch.no_grad():
        # A logit of 60: the right leaf has a probability of 1e-26, which is 0 beside 1 in float32.
        model.banks.posterior_routers.named_weights(0)["logit.bias"].fill_(60.0)
    x = observations(model, 2)
    log_probs = model.leaf_log_probs(x)
    torch.testing.assert_close(log_probs[:, 1], torch.full((2,), -60.0), rtol=0.05, atol=0)
    log_probs[:, 1].sum().backward()
    gradient = model.banks.posterior_routers.weights_of(0).grad
    assert gradient is not None and gradient.abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 4])
def test_along_a_path_the_posterior_is_that_of_all_paths(n: int) -> None:
    model = build(PRUNED, "maps")
    x, noise = observations(model, n), noise_for(model, n)
    everything = model.posterior(x, noise=noise)
    leaf = torch.tensor(PRUNED.leaves)[torch.arange(n) % len(PRUNED.leaves)]
    along = model.posterior(x, leaf=leaf, noise=noise)
    for node in PRUNED:
        on_path = torch.tensor([node in PRUNED.path(int(own)) for own in leaf])
        z = along.latents(node)
        torch.testing.assert_close(z[on_path], everything.latents(node)[on_path], rtol=1e-12, atol=1e-12)
        assert z[~on_path].isnan().all()
    chosen = (leaf[:, None] == torch.tensor(PRUNED.leaves)).double()
    torch.testing.assert_close(along.leaf_log_probs().exp(), everything.leaf_log_probs().exp() * chosen)


def test_part_of_a_tree_is_that_part_of_the_whole() -> None:
    model = build(GROWN)  # 0 -> 1, 2; 2 -> 3, 4; 3 -> 5, 6
    x, noise = observations(model, 3), noise_for(model, 3)
    whole, part = model.posterior(x, noise=noise), model.posterior(x, nodes=[4, 0, 2], noise=noise)
    for node in (0, 2, 4):
        torch.testing.assert_close(part.latents(node), whole.latents(node), rtol=1e-12, atol=1e-12)
    assert part.latents(5).isnan().all()
    # Both ways to node 4 turn right; the left ones lead out of the part.
    along = model.posterior(x, nodes=[4, 0, 2], leaf=torch.tensor([4, 4, 4])).visits
    assert along.turns_left(torch.zeros(3, dtype=torch.int64)).tolist() == [False] * 6
    column = GROWN.leaves.index(4)
    torch.testing.assert_close(part.leaf_log_probs(), whole.leaf_log_probs()[:, [column]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "maps"])
def test_a_reconstruction_is_the_mean_of_the_leafs_decoder_at_its_latent(kind: str) -> None:
    model = build(PRUNED, kind)
    x = observations(model, 4)
    leaves = torch.tensor(PRUNED.leaves)[[0, 1, 2, 1]]
    found = model.reconstruct(x, leaf=leaves, generator=seeded(3))
    posterior = model.posterior(x, leaf=leaves, generator=seeded(3))
    for i, leaf in enumerate(leaves.tolist()):
        z = posterior.latents(leaf)[i : i + 1]
        expected = torch.sigmoid(model.banks.decoders.module(leaf)(z))
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-10, atol=1e-12)


def test_a_reconstruction_goes_to_the_most_probable_leaf() -> None:
    model = louder(build(GROWN, seed=12), 20.0, only="routers")
    x = observations(model, 12)
    leaf = model.cluster(x)
    assert len(leaf.unique()) > 1
    found = model.reconstruct(x, generator=seeded(4))
    torch.testing.assert_close(found, model.reconstruct(x, leaf=leaf, generator=seeded(4)), rtol=0, atol=0)
    one = model.reconstruct(x, leaf=4, generator=seeded(4))
    torch.testing.assert_close(one, model.reconstruct(x, leaf=torch.full((12,), 4), generator=seeded(4)))


@pytest.mark.parametrize("call", ["elbo", "posterior", "reconstruct", "iwae"])
def test_noise_follows_the_generator_alone(call: str) -> None:
    model = build(GROWN)
    x, state = observations(model, 3), torch.get_rng_state()

    def values(seed: int) -> torch.Tensor:
        found = getattr(model, call)(x, generator=seeded(seed))
        return {"elbo": lambda: found.elbo, "posterior": lambda: found.z}.get(call, lambda: found)()

    assert torch.equal(values(0), values(0))
    assert not torch.isclose(values(0), values(1)).all()
    assert torch.equal(torch.get_rng_state(), state)

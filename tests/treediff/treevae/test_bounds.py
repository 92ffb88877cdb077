"""Bounds on the evidence where the evidence is known: a linear TreeVAE whose prior is a GaussianTree.

Expectations are estimated from many samples with fixed seeds. A comparison allows five standard errors: a right program
fails one in about three million of them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from linear import exact_model, linear_model, solvable_world, spoil
from torch import Tensor
from worlds import UNEVEN, seeded, world

from treediff import TreeTopology, TreeVAE
from treediff.testing import GaussianTree

SOLVABLE = {
    "lone root": TreeTopology.balanced(0),
    "chain": TreeTopology.chain(3),
    "balanced": TreeTopology.balanced(2),
    "uneven with pass-throughs": UNEVEN,
    "root passes through": TreeTopology.balanced(1).split(1).prune(2),
}
TREES = {**SOLVABLE, "grown": TreeTopology.balanced(1).split(1)}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
each_solvable = pytest.mark.parametrize("tree", SOLVABLE.values(), ids=SOLVABLE)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first axis and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def data(known: GaussianTree, n: int) -> Tensor:
    return known.sample(n, generator=seeded(7))[0]


def wide(known: GaussianTree, tree: TreeTopology) -> TreeVAE:
    """A wrong posterior with tails that are heavy enough for the weights to have a variance."""
    model = linear_model(known, seed=1)
    with torch.no_grad():
        for node in tree:
            weights = model.banks.heads.named_weights(node)
            weights["weight"].mul_(0.3)
            weights["weight"][known.latent :] = 0
            weights["bias"][known.latent :] = 1.0 if node != tree.root else 0.3
    return model


@torch.no_grad()
def elbos(model: TreeVAE, x: Tensor, draws: int) -> Tensor:
    """`(draws, B)` single-sample estimates."""
    repeated = x.repeat(draws, 1)
    return model.elbo(repeated, generator=seeded(11)).elbo.view(draws, len(x))


@torch.no_grad()
def iwaes(model: TreeVAE, x: Tensor, k: int, draws: int, chunk: int = 64) -> Tensor:
    return model.iwae(x.repeat(draws, 1), k, generator=seeded(12), chunk=chunk).view(draws, len(x))


@each_tree
def test_elbo_is_below_iwae_is_below_the_evidence(tree: TreeTopology) -> None:
    known = world(tree)
    model, x = wide(known, tree), data(known, 3)
    evidence = known.log_prob(x)
    rungs = [mean_and_error(elbos(model, x, 2000))]
    rungs += [mean_and_error(iwaes(model, x, k, 2000)) for k in (2, 8, 32)]
    for (low, low_error), (high, high_error) in pairwise(rungs):
        assert (low <= high + 5 * (low_error**2 + high_error**2).sqrt()).all()
    for found, error in rungs:
        assert (found <= evidence + 5 * error).all()
    # The comparison has something to tell apart: the posterior is wrong by far, and samples help.
    first, last = rungs[0], rungs[-1]
    assert (evidence - first[0] > 0.3).all() and (last[0] - first[0] > 20 * last[1]).all()


@each_tree
def test_one_sample_of_iwae_has_the_expectation_of_the_elbo(tree: TreeTopology) -> None:
    known = world(tree)
    model, x = wide(known, tree), data(known, 3)
    elbo, elbo_error = mean_and_error(elbos(model, x, 8000))
    found, error = mean_and_error(iwaes(model, x, 1, 8000))
    assert ((elbo - found).abs() <= 5 * (elbo_error**2 + error**2).sqrt()).all()


@each_solvable
def test_the_weights_of_iwae_average_to_the_evidence_itself(tree: TreeTopology) -> None:
    known = solvable_world(tree)
    model, x = spoil(exact_model(known)), data(known, 3)
    ratio, error = mean_and_error((iwaes(model, x, 1, 8000) - known.log_prob(x)).exp())
    assert (error > 0).all() and (error < 0.03).all()  # wrong enough, and narrow enough, to mean something
    assert ((ratio - 1).abs() <= 5 * error).all()


@each_solvable
def test_with_the_true_posterior_every_weight_is_the_evidence(tree: TreeTopology) -> None:
    known = solvable_world(tree)
    model, x = exact_model(known), data(known, 20)
    for k in (1, 3):
        found = model.iwae(x, k, generator=seeded(2))
        torch.testing.assert_close(found, known.log_prob(x), rtol=1e-9, atol=1e-9)


@each_solvable
def test_with_the_true_posterior_the_elbo_averages_to_the_evidence(tree: TreeTopology) -> None:
    known = solvable_world(tree)
    model, x = exact_model(known), data(known, 4)
    found, error = mean_and_error(elbos(model, x, 4000))
    assert (error < 0.1).all()
    assert ((found - known.log_prob(x)).abs() <= 5 * error + 1e-9).all()


@each_solvable
def test_with_the_true_posterior_clusters_are_those_of_bayes(tree: TreeTopology) -> None:
    known = solvable_world(tree)
    model, x = exact_model(known), data(known, 50)
    expected = known.leaf_log_posterior(x)
    torch.testing.assert_close(model.leaf_log_probs(x), expected, rtol=1e-9, atol=1e-9)
    assert model.cluster(x).tolist() == [tree.leaves[k] for k in expected.argmax(1)]


@each_solvable
def test_a_flaw_in_the_true_posterior_shows(tree: TreeTopology) -> None:
    """The tests above can fail: a head that is slightly off is no longer exact, and the elbo lies lower."""
    known = solvable_world(tree)
    model, x = exact_model(known), data(known, 20)
    with torch.no_grad():
        for leaf in tree.leaves:
            model.banks.heads.named_weights(leaf)["bias"][0] += 0.1
    assert (model.iwae(x, 1, generator=seeded(2)) - known.log_prob(x)).abs().max() > 0.01


@pytest.mark.parametrize("k", [1, 5, 12])
def test_chunks_change_memory_and_nothing_else(k: int) -> None:
    known = world(UNEVEN)
    model, x = wide(known, UNEVEN), data(known, 4)
    # Noise is drawn in another order, so it is the distribution that must agree.
    whole, error = mean_and_error(iwaes(model, x, k, 2000))
    parts, other = mean_and_error(iwaes(model, x, k, 2000, chunk=4))
    assert ((whole - parts).abs() <= 5 * (error**2 + other**2).sqrt() + 1e-9).all()


def test_many_samples_find_the_evidence() -> None:
    known = solvable_world(UNEVEN)
    model, x = spoil(exact_model(known)), data(known, 3)
    few, many = (model.iwae(x, k, chunk=10_000, generator=seeded(3)) - known.log_prob(x) for k in (1, 20_000))
    assert few.abs().max() > 0.2
    assert many.abs().max() < 0.03


def test_iwae_can_be_trained_on() -> None:
    known = world(UNEVEN)
    model, x = wide(known, UNEVEN), data(known, 3)
    model.iwae(x, 4, generator=seeded(3)).sum().backward()
    gradient = model.banks.heads.weights_of(0).grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()


def test_errors_teach() -> None:
    model, x = linear_model(world(UNEVEN)), torch.zeros(2, 3).double()
    for samples, chunk in ((0, 64), (4, 0), (-1, 1)):
        with pytest.raises(ValueError, match=f"samples and chunk must be at least 1, found {samples} and {chunk}"):
            model.iwae(x, samples, chunk=chunk)
    with pytest.raises(TypeError, match=r"samples and chunk must be integers, found 2.5 and 64"):
        model.iwae(x, 2.5)  # type: ignore[arg-type]

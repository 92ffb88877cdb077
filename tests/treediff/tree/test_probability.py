"""The algebra of probability against torch.distributions, mpmath and sums written out by hand."""

from __future__ import annotations

import math
import re

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from strategies import quick, topologies
from torch import Tensor, distributions

from treediff.tree import probability
from treediff.tree.topology import TreeTopology

SEEDS = st.integers(0, 2**32)


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def four(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two means and two log-variances, in the order mean, logvar, mean, logvar."""
    a, b, c, d = normal(seed, 4, *shape, scale=3.0, dtype=dtype)
    return a, b, c, d


def as_torch(mean: Tensor, logvar: Tensor) -> distributions.Distribution:
    return distributions.Normal(mean, torch.exp(0.5 * logvar))


# --- Gaussians --------------------------------------------------------------------------------------------


@quick
@given(SEEDS, st.sampled_from([(2, 3), (1, 1), (2, 2, 3, 3), (3, 0)]))
def test_gaussian_kl_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    mean_q, logvar_q, mean_p, logvar_p = four(seed, *shape)
    both = distributions.kl_divergence(as_torch(mean_q, logvar_q), as_torch(mean_p, logvar_p))
    torch.testing.assert_close(
        probability.gaussian_kl(mean_q, logvar_q, mean_p, logvar_p),
        both.flatten(1).sum(1),
        rtol=1e-10,
        atol=1e-12,
    )
    zero = torch.zeros(shape, dtype=torch.float64)
    alone = distributions.kl_divergence(as_torch(mean_q, logvar_q), as_torch(zero, zero)).flatten(1).sum(1)
    torch.testing.assert_close(probability.gaussian_kl(mean_q, logvar_q), alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        probability.gaussian_kl(mean_q, logvar_q, zero),
        probability.gaussian_kl(mean_q, logvar_q),
        rtol=0,
        atol=0,
    )


single = st.floats(-80, 80, width=32)
nudge = st.floats(-(2**-10), 2**-10, width=32)


@quick
@given(single, single, st.lists(nudge, min_size=2, max_size=2))
def test_gaussian_kl_is_not_negative_in_float32(mean: float, logvar: float, nudges: list[float]) -> None:
    # Nearly equal Gaussians: the true value is tiny, so any rounding shows.
    q = torch.tensor([[mean], [logvar]])
    p = q + torch.tensor(nudges)[:, None]
    assert probability.gaussian_kl(q[:1], q[1:], p[:1], p[1:]).item() >= -1e-6


def test_gaussian_kl_keeps_its_digits_where_variances_nearly_agree() -> None:
    zero = torch.zeros(1, 1)
    ratio = torch.full((1, 1), 1e-3)
    found = probability.gaussian_kl(zero, ratio, zero, zero).item()
    r = float(ratio)
    assert found == pytest.approx(0.5 * (math.expm1(r) - r), rel=1e-3)


def test_equal_gaussians_have_no_divergence_however_narrow() -> None:
    mean, logvar = torch.full((1, 2), 3.0), torch.tensor([[-100.0, 80.0]])
    assert probability.gaussian_kl(mean, logvar, mean, logvar).tolist() == [0.0]
    expected = -0.5 * (-100.0 + 80.0 + 2 * math.log(2 * math.pi))
    assert probability.gaussian_log_prob(mean, mean, logvar).item() == pytest.approx(expected)


@quick
@given(SEEDS, st.sampled_from([(2, 3), (1, 1), (2, 2, 3, 3)]))
def test_gaussian_log_prob_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    x, logvar, mean, _ = four(seed, *shape)
    expected = as_torch(mean, logvar).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(probability.gaussian_log_prob(x, mean, logvar), expected, rtol=1e-10, atol=1e-12)


@quick
@given(SEEDS)
def test_merge_equals_the_formula_for_variances_and_is_symmetric(seed: int) -> None:
    mean_a, logvar_a, mean_b, logvar_b = four(seed, 2, 3)
    mean, logvar = probability.precision_weighted_merge(mean_a, logvar_a, mean_b, logvar_b)
    precision_a, precision_b = 1 / logvar_a.exp(), 1 / logvar_b.exp()
    variance = 1 / (precision_a + precision_b)
    torch.testing.assert_close(logvar, variance.log(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, variance * (mean_a * precision_a + mean_b * precision_b), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(probability.precision_weighted_merge(mean_b, logvar_b, mean_a, logvar_a), (mean, logvar))


def test_merge_of_the_sure_and_the_unsure_is_the_sure_one() -> None:
    mean, logvar = probability.precision_weighted_merge(
        torch.tensor(1.0), torch.tensor(-200.0), torch.tensor(9.0), torch.tensor(200.0)
    )
    assert (mean.item(), logvar.item()) == (1.0, -200.0)


def test_reparameterize_shifts_and_scales_the_noise() -> None:
    found = probability.reparameterize(torch.tensor(2.0), torch.tensor(9.0).log(), torch.tensor([-1.0, 0.0, 2.0]))
    assert found.tolist() == pytest.approx([-1, 2, 8])


# --- Bernoulli and softplus -------------------------------------------------------------------------------


@quick
@given(st.floats(-15, 15), st.floats(-15, 15))
def test_bernoulli_kl_equals_torch(a: float, b: float) -> None:
    q, p = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
    expected = distributions.kl_divergence(distributions.Bernoulli(logits=q), distributions.Bernoulli(logits=p))
    torch.testing.assert_close(probability.bernoulli_kl_with_logits(q, p), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [(1e4, -1e4, 1e4), (-1e4, 1e4, 1e4), (1e4, 1e4, 0.0), (-1e4, -1e4, 0.0), (0.0, 1e4, 5e3)],
)
def test_bernoulli_kl_of_the_very_sure(a: float, b: float, expected: float) -> None:
    q, p = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    found = probability.bernoulli_kl_with_logits(q, p)
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-3)
    assert q.grad is not None and p.grad is not None
    # d/da = sigmoid'(a) (a - b), d/db = sigmoid(b) - sigmoid(a)
    slope = 1 / (2 + 2 * math.cosh(min(abs(a), 700.0))) * (a - b)
    assert q.grad.item() == pytest.approx(slope, abs=1e-6)
    assert p.grad.item() == pytest.approx(float(b > 0) - (0.5 if a == 0 else float(a > 0)), abs=1e-6)


def exact_log_softplus(x: float) -> float:
    with mpmath.workdps(60):
        return float(mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(x)))))


AWKWARD = [
    -1e4,
    -104.0,
    -88.0,
    -37.5,
    -37.0,
    -36.5,
    -15.1,
    -15.0,
    -14.9,
    -1.0,
    0.0,
    0.5413,
    1.0,
    20.0,
    21.0,
    1e4,
]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("centre", AWKWARD)
def test_log_softplus_and_its_gradient(centre: float, dtype: torch.dtype, rtol: float) -> None:
    here = torch.tensor(centre, dtype=dtype)
    sides = [torch.nextafter(here, torch.tensor(to, dtype=dtype)) for to in (-math.inf, math.inf)]
    x = torch.stack([sides[0], here, sides[1]]).requires_grad_()
    found = probability.log_softplus(x)
    found.sum().backward()
    expected = [exact_log_softplus(v) for v in x.tolist()]
    np.testing.assert_allclose(found.tolist(), expected, rtol=rtol, atol=rtol)
    assert x.grad is not None
    # The derivative is sigmoid(x) / softplus(x), in logarithms so that it survives x = -1e4.
    slopes = [
        math.exp(v - max(v, 0) - math.log1p(math.exp(-abs(v))) - e) for v, e in zip(x.tolist(), expected, strict=True)
    ]
    np.testing.assert_allclose(x.grad.tolist(), slopes, rtol=max(rtol, 1e-8))


# --- gradients --------------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = tuple(t.requires_grad_() for t in four(0, 2, 3))
    assert torch.autograd.gradcheck(probability.gaussian_kl, inputs)
    assert torch.autograd.gradcheck(probability.gaussian_kl, inputs[:2])
    assert torch.autograd.gradcheck(probability.gaussian_log_prob, inputs[:3])
    assert torch.autograd.gradcheck(probability.precision_weighted_merge, inputs)
    assert torch.autograd.gradcheck(probability.reparameterize, inputs[:3])
    assert torch.autograd.gradcheck(probability.bernoulli_kl_with_logits, inputs[:2])
    around = torch.tensor([-40.0, -37.0, -20.0, -15.0, -14.0, 0.0, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(probability.log_softplus, (around,))
    tree = TreeTopology.balanced(2).split(3).prune(4)
    logits = normal(1, 2, len(tree.routed)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: probability.path_log_probs(x, tree), (logits,))


# --- paths ------------------------------------------------------------------------------------------------


def reach_by_hand(logits: list[float], tree: TreeTopology, node: int) -> float:
    """The product of the probabilities of the turns, from the node upwards."""
    product = 1.0
    while (above := tree.parent(node)) is not None:
        if len(tree.children(above)) == 2:
            left = 1 / (1 + math.exp(-logits[tree.routed.index(above)]))
            product *= left if tree.children(above)[0] == node else 1 - left
        node = above
    return product


@quick
@given(topologies(), SEEDS)
def test_path_log_probs_are_products_along_the_path(tree: TreeTopology, seed: int) -> None:
    logits = normal(seed, 3, len(tree.routed), scale=2.0)
    found = probability.path_log_probs(logits, tree).exp()
    expected = [[reach_by_hand(row, tree, node) for node in tree] for row in logits.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    leaves = probability.leaf_log_probs(logits, tree)
    columns = [tree.ids.index(leaf) for leaf in tree.leaves]
    np.testing.assert_allclose(leaves.exp().numpy(), np.array(expected)[:, columns], rtol=1e-9)
    torch.testing.assert_close(leaves.exp().sum(1), torch.ones(3, dtype=torch.float64))


@quick
@given(topologies(), SEEDS)
def test_leaf_probabilities_sum_to_one_in_float32_however_sure(tree: TreeTopology, seed: int) -> None:
    logits = normal(seed, 3, len(tree.routed), scale=1e4, dtype=torch.float32)
    found = probability.leaf_log_probs(logits, tree)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))


def test_a_pass_through_hands_its_probability_on() -> None:
    tree = TreeTopology.balanced(1).split(1).prune(3)  # 0(1(4) 2)
    found = probability.path_log_probs(torch.tensor([[math.log(3.0)]]), tree).exp()
    assert dict(zip(tree, found[0].tolist(), strict=True)) == pytest.approx({0: 1, 1: 0.75, 4: 0.75, 2: 0.25})


def test_path_log_probs_compile_into_one_graph() -> None:
    tree = TreeTopology.balanced(2)
    logits = normal(0, 2, 3)
    compiled = torch.compile(lambda x: probability.leaf_log_probs(x, tree), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits), probability.leaf_log_probs(logits, tree))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 4), (2, 3, 1)])
def test_path_log_probs_name_the_columns_they_expect(shape: tuple[int, ...]) -> None:
    message = f"expected logits of shape (batch, 3), one column per routed node [0, 1, 2]; found {shape}"
    for function in (probability.path_log_probs, probability.leaf_log_probs):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(torch.zeros(shape), TreeTopology.balanced(2))


# --- sampling ---------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any), st.integers(0, 255), st.integers(-5, 5))
def test_sample_leaf_inverts_the_cumulative_distribution(weights: list[int], draw: int, shift: int) -> None:
    uniform = draw / 256
    expected = next(k for k in range(len(weights)) if uniform * sum(weights) < sum(weights[: k + 1]))
    # A draw on the edge between two leaves may fall to either by rounding.
    edges = np.cumsum(weights) / sum(weights)
    if np.abs(edges[:-1] - uniform).min(initial=1) > 1e-9:
        log_probs = torch.tensor([weights], dtype=torch.float64).log() + shift
        found = probability.sample_leaf(log_probs, torch.tensor([uniform], dtype=torch.float64))
        assert found.tolist() == [expected]


def test_sample_leaf_at_the_edges() -> None:
    quarter = torch.tensor([[0.25, 0.25, 0.0, 0.5]]).log().expand(6, 4)
    draws = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-24])
    assert probability.sample_leaf(quarter, draws).tolist() == [0, 1, 1, 3, 3, 3]
    never_first = torch.tensor([[0.0, 1.0]]).log()
    assert probability.sample_leaf(never_first, torch.zeros(1)).tolist() == [1]
    assert probability.sample_leaf(torch.zeros(2, 1), torch.tensor([0.0, 0.99])).tolist() == [0, 0]


@pytest.mark.parametrize("impossible", [0, 1])
def test_sample_leaf_never_draws_the_impossible_nor_beyond_the_end(impossible: int) -> None:
    last = torch.tensor([1 - 2**-24])  # the largest float32 below 1; sums of probabilities may round to less
    for k in range(1, 100):
        log_probs = torch.tensor([[0.0] * k + [-math.inf] * impossible])
        assert probability.sample_leaf(log_probs, last).tolist() == [k - 1]


def test_sample_leaf_draws_each_leaf_as_often_as_it_should() -> None:
    probabilities, n = torch.tensor([0.0625, 0.5, 0.125, 0.3125]), 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = probability.sample_leaf(probabilities.log().expand(n, 4), uniform).bincount(minlength=4)
    # One right program in a million would fail here; the seed is fixed.
    assert stats.chisquare(counts.numpy(), n * probabilities.double().numpy()).pvalue > 1e-6

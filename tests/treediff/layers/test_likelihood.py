"""Likelihoods against torch.distributions, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from treediff.layers import BernoulliLikelihood, GaussianLikelihood, Likelihood

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output, x = torch.randn(2, 5, 1, 3, 2, generator=generator, dtype=torch.float64)
    return output, x


@given(seeds, st.floats(1e-3, 1e3), st.booleans())
def test_gaussian_is_the_normal_density(seed: int, variance: float, learned: bool) -> None:
    output, x = drawn(seed)
    ours = GaussianLikelihood(variance, learned=learned, dtype=torch.float64).log_prob(output, x)
    torch.testing.assert_close(ours, Normal(output, variance**0.5).log_prob(x).flatten(1).sum(1))


@given(seeds)
def test_bernoulli_is_the_mass_of_bits(seed: int) -> None:
    output, x = drawn(seed)
    bits = (x > 0).double()
    ours = BernoulliLikelihood().log_prob(output, bits)
    torch.testing.assert_close(ours, Bernoulli(logits=output).log_prob(bits).flatten(1).sum(1))


def test_means_are_in_the_range_of_the_data() -> None:
    output, _ = drawn(0)
    assert torch.equal(GaussianLikelihood().mean(output), output.clamp(0, 1))
    assert torch.equal(GaussianLikelihood(data_range=(-1.0, 0.5)).mean(output), output.clamp(-1, 0.5))
    assert torch.equal(GaussianLikelihood(data_range=None).mean(output), output)
    torch.testing.assert_close(BernoulliLikelihood().mean(output), Bernoulli(logits=output).mean)


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan")])
def test_a_variance_is_positive(variance: float) -> None:
    with pytest.raises(ValueError, match=f"variance must be a positive number, found {variance}"):
        GaussianLikelihood(variance)


@pytest.mark.parametrize("data_range", [(1.0, 0.0), (0.5, 0.5)])
def test_a_range_has_two_ends(data_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"data_range must be \(smallest, largest\) or None, found \("):
        GaussianLikelihood(data_range=data_range)


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood()])
def test_output_and_observation_have_one_shape(likelihood: Likelihood) -> None:
    message = r"expected an output of the shape of the observations, found \(2, 3\) for observations of shape \(2, 1\)"
    with pytest.raises(ValueError, match=message):
        likelihood.log_prob(torch.zeros(2, 3), torch.zeros(2, 1))


def test_one_of_your_own_defines_both() -> None:
    class Own(Likelihood):
        pass

    for method in (lambda: Own().log_prob(torch.zeros(1), torch.zeros(1)), lambda: Own().mean(torch.zeros(1))):
        with pytest.raises(TypeError, match=r"Own must define (log_prob\(output, x\)|mean\(output\))"):
            method()

"""The Gaussian steps written out, against plain formulas and autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from treediff.layers.grouped import _gaussians as gaussians
from treediff.tree.probability import gaussian_kl, log_softplus, precision_weighted_merge, reparameterize

SHAPES = st.sampled_from([(3, 4), (0, 4), (1, 2), (2, 4, 2, 3)])
SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def half(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[1] // 2, *shape[2:])


def plain_merge(a: Tensor, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = precision_weighted_merge(*a.chunk(2, 1), *b.chunk(2, 1))
    return reparameterize(mean, logvar, noise), torch.cat([mean, logvar], 1)


def plain_log_variance(x: Tensor) -> Tensor:
    mean, raw = x.chunk(2, 1)
    return torch.cat([mean, log_softplus(raw)], 1)


def values_and_gradients(
    call: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor, weights: int = 7
) -> list[Tensor]:
    """What a function returns, and the gradients of a random sum of it."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    found = call(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    total = sum(((y * normal(weights + i, *y.shape)).sum() for i, y in enumerate(outputs)), torch.zeros(()))
    return [*outputs, *torch.autograd.grad(total, leaves)]


@given(SHAPES, SEEDS)
def test_merge_and_sample(shape: tuple[int, ...], seed: int) -> None:
    a, b, noise = normal(seed, *shape), normal(seed + 1, *shape), normal(seed + 2, *half(shape))
    found = values_and_gradients(lambda a, b: gaussians.merge_and_sample(a, b, noise), a, b)
    torch.testing.assert_close(found, values_and_gradients(lambda a, b: plain_merge(a, b, noise), a, b))


@pytest.mark.parametrize("used", [0, 1])
def test_merge_and_sample_when_only_one_result_is_used(used: int) -> None:
    a, b, noise = normal(0, 3, 4), normal(1, 3, 4), normal(2, 3, 2)
    found = values_and_gradients(lambda a, b: gaussians.merge_and_sample(a, b, noise)[used], a, b)
    torch.testing.assert_close(found, values_and_gradients(lambda a, b: plain_merge(a, b, noise)[used], a, b))


@given(SHAPES, SEEDS)
def test_kl(shape: tuple[int, ...], seed: int) -> None:
    q, p = normal(seed, *shape), normal(seed + 1, *shape)
    found = values_and_gradients(gaussians.kl, q, p)
    plain = values_and_gradients(lambda q, p: gaussian_kl(*q.chunk(2, 1), *p.chunk(2, 1)), q, p)
    torch.testing.assert_close(found, plain)
    (mean_q, logvar_q), (mean_p, logvar_p) = q.chunk(2, 1), p.chunk(2, 1)
    independent = kl_divergence(Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp()))
    torch.testing.assert_close(found[0], independent.flatten(1).sum(1))


@pytest.mark.parametrize("raw", [-1e4, -104.0, -88.0, -15.0, -14.9, 0.0, 3.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_variance_and_its_gradient(raw: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[0.5, raw]], dtype=dtype, requires_grad=True)
    y = gaussians.log_variance(x)
    y.backward(torch.tensor([[2.0, 3.0]], dtype=dtype))
    assert x.grad is not None
    written_out = gaussians.log_variance_gradient(x.detach(), y.detach(), torch.tensor([[2.0, 3.0]], dtype=dtype))
    torch.testing.assert_close(written_out, x.grad, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=0)
    torch.testing.assert_close(y, plain_log_variance(x))


def test_gradients_are_those_of_finite_differences() -> None:
    a, b = (normal(seed, 2, 4).requires_grad_() for seed in (0, 1))
    noise = normal(2, 2, 2)
    assert torch.autograd.gradcheck(lambda a, b: gaussians.merge_and_sample(a, b, noise), (a, b))
    assert torch.autograd.gradcheck(gaussians.kl, (a, b))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    q = normal(0, 2, 4).requires_grad_()
    (first,) = torch.autograd.grad(gaussians.kl(q, 2 * q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()

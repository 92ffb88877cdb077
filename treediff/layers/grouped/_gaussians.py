"""Gaussian steps of a node with both passes written out: `treediff.tree.probability` in fewer operations.

A Gaussian is one tensor here, `(T, 2D, ...)`: the mean, then the log-variance, as `GaussianHead` returns them. On the
few rows of a node autograd's bookkeeping costs more than the arithmetic, so each step is one function of autograd. Each
step has a gradient but no gradient of the gradient; `treediff.tree.probability` has both.

Letters: `T` rows, `D` latent width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from treediff.tree.probability import gaussian_kl, log_softplus, precision_weighted_merge, reparameterize

__all__ = ["LogVariance", "kl", "log_variance", "log_variance_gradient", "merge_and_sample"]


def log_variance(x: Tensor) -> Tensor:
    """Return `(T, 2D, ...)`: the mean unchanged, then `log softplus` of the rest; see `log_softplus`."""
    mean, raw = x.chunk(2, 1)
    return torch.cat([mean, log_softplus(raw)], 1)


def log_variance_gradient(x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` from the gradient of `y = log_variance(x)`."""
    mean, logvar = grad.chunk(2, 1)
    # The derivative of log softplus is sigmoid over softplus, both of which underflow; their logarithms do not.
    slope = torch.exp(F.logsigmoid(x.chunk(2, 1)[1]) - y.chunk(2, 1)[1])
    return torch.cat([mean, logvar * slope], 1)


class LogVariance(nn.Module):
    """Layer that reads the second half of the channels as `softplus^-1` of a variance and returns its logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 2D, ...)` to `(B, 2D, ...)`: the mean unchanged, then the log-variance."""
        return log_variance(x)


def _merge_and_sample(a: Tensor, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    merged = precision_weighted_merge(*a.chunk(2, 1), *b.chunk(2, 1))
    return reparameterize(*merged, noise), torch.cat(merged, 1)


class _MergeAndSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        z, merged = _merge_and_sample(a, b, noise)
        ctx.save_for_backward(a, b, z, merged)
        ctx.set_materialize_grads(False)
        return z, merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_z: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        a, b, z, merged = ctx.saved_tensors
        (mean_a, logvar_a), (mean_b, logvar_b) = a.chunk(2, 1), b.chunk(2, 1)
        grad_mean, grad_logvar = torch.zeros_like(merged).chunk(2, 1) if grad is None else grad.chunk(2, 1)
        if grad_z is not None:
            grad_mean = grad_mean + grad_z
            grad_logvar = torch.addcmul(grad_logvar, grad_z, z - merged.chunk(2, 1)[0], value=0.5)
        weight = torch.sigmoid(logvar_b - logvar_a)
        mean_of_a, logvar_of_a = grad_mean * weight, grad_logvar * weight
        mean_of_b, logvar_of_b = grad_mean - mean_of_a, grad_logvar - logvar_of_a
        # A larger variance of `a` moves the mean away from the mean of `a`, towards the mean of `b`.
        shift = mean_of_b * weight * (mean_a - mean_b)
        of_a = torch.cat([mean_of_a, logvar_of_a - shift], 1)
        return of_a, torch.cat([mean_of_b, logvar_of_b + shift], 1), None


def merge_and_sample(a: Tensor, b: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample of the product of two Gaussians, and the product.

    This is `precision_weighted_merge`, then `reparameterize`.

    Args:
        a: `(T, 2D, ...)`.
        b: `(T, 2D, ...)`.
        noise: `(T, D, ...)` standard normal; noise gets no gradient.

    Returns:
        the sample `(T, D, ...)` and the merged Gaussian `(T, 2D, ...)`.
    """
    if torch.compiler.is_compiling():
        return _merge_and_sample(a, b, noise)
    result: tuple[Tensor, Tensor] = _MergeAndSample.apply(a, b, noise)  # type: ignore[no-untyped-call, unused-ignore]
    return result


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(q, p)
        return gaussian_kl(*q.chunk(2, 1), *p.chunk(2, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        q, p = ctx.saved_tensors
        (mean_q, logvar_q), (mean_p, logvar_p) = q.chunk(2, 1), p.chunk(2, 1)
        grad = grad.view(-1, *[1] * (q.ndim - 1))
        scale = torch.exp(-0.5 * logvar_p)
        distance = (mean_q - mean_p) * scale
        growth = torch.expm1(logvar_q - logvar_p)
        of_mean = grad * distance * scale
        of_q = torch.cat([of_mean, 0.5 * grad * growth], 1)
        return of_q, torch.cat([-of_mean, -0.5 * grad * (growth + distance.square())], 1)


def kl(q: Tensor, p: Tensor) -> Tensor:
    """Compute `gaussian_kl` of Gaussians `(T, 2D, ...)`: `(T,)` in nats."""
    if torch.compiler.is_compiling():
        return gaussian_kl(*q.chunk(2, 1), *p.chunk(2, 1))
    result: Tensor = _KL.apply(q, p)  # type: ignore[no-untyped-call, unused-ignore]
    return result

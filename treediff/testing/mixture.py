"""A mixture of Gaussians with exact density and posteriors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["GaussianMixture"]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of `K` Gaussians with full covariances, in float64.

    Args:
        log_weights: `(K,)`, in nats; `exp` sums to 1.
        means: `(K, F)`.
        covariances: `(K, F, F)`, symmetric and positive definite.

    Raises:
        ValueError: if the shapes do not fit, or a covariance is not positive definite.

    Examples:
        >>> one = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.eye(2)[None])
        >>> one.log_prob(torch.zeros(1, 2))
        tensor([-1.8379], dtype=torch.float64)
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        for name in ("log_weights", "means", "covariances"):
            object.__setattr__(self, name, getattr(self, name).to(torch.float64))
        found = [tuple(t.shape) for t in (self.log_weights, self.means, self.covariances)]
        k, f = found[1] if len(found[1]) == 2 else (-1, -1)
        if found != [(k,), (k, f), (k, f, f)]:
            raise ValueError(f"expected log_weights (K,), means (K, F), covariances (K, F, F); found {found}")
        bad = torch.linalg.cholesky_ex(self.covariances).info.nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"covariances must be positive definite; those of components {bad} are not")

    @cached_property
    def _factors(self) -> Tensor:
        """Lower Cholesky factors `(K, F, F)`."""
        factors: Tensor = torch.linalg.cholesky(self.covariances)
        return factors

    def component_log_prob(self, x: Tensor) -> Tensor:
        """`log N(x; mean_k, covariance_k)` in nats, `(B, F)` to `(B, K)`.

        Raises:
            ValueError: if `x` is not `(B, F)`.
        """
        features = self.means.shape[1]
        if x.ndim != 2 or x.shape[1] != features:
            raise ValueError(f"expected x of shape (batch, {features}), found {tuple(x.shape)}; flatten images first")
        difference = (x.to(torch.float64)[:, None] - self.means).permute(1, 2, 0)
        white: Tensor = torch.linalg.solve_triangular(self._factors, difference, upper=False)
        log_volume = self._factors.diagonal(dim1=1, dim2=2).log().sum(1)
        return -0.5 * (white.square().sum(1).T + features * math.log(2 * math.pi)) - log_volume

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density `log sum_k w_k N(x; mean_k, covariance_k)` in nats, `(B, F)` to `(B,)`."""
        return (self.log_weights + self.component_log_prob(x)).logsumexp(1)

    def log_posterior(self, x: Tensor) -> Tensor:
        """Bayes' rule: log-probability of each component given `x`, `(B, F)` to `(B, K)`; `exp` sums to 1."""
        return (self.log_weights + self.component_log_prob(x)).log_softmax(1)

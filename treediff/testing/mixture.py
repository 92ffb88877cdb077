"""Mixture of Gaussians with exact density and posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from treediff.core.modes import lasting

__all__ = ["GaussianMixture"]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Mixture of `K` Gaussians with full covariances, in float64.

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
            with lasting():
                object.__setattr__(self, name, getattr(self, name).to(torch.float64))
        found = [tuple(t.shape) for t in (self.log_weights, self.means, self.covariances)]
        k, f = found[1] if len(found[1]) == 2 else (-1, -1)
        if found != [(k,), (k, f), (k, f, f)]:
            raise ValueError(f"expected log_weights (K,), means (K, F), covariances (K, F, F); found {found}")
        bad = torch.linalg.cholesky_ex(self.covariances).info.nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"covariances must be positive definite; the covariances of components {bad} are not")

    @cached_property
    @lasting()
    def _factors(self) -> Tensor:
        """Lower Cholesky factors `(K, F, F)`."""
        factors: Tensor = torch.linalg.cholesky(self.covariances)
        return factors

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Compute `log N(x; mean_k, covariance_k)` in nats, `(B, F)` to `(B, K)`.

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
        """Compute the exact log-density `log sum_k w_k N(x; mean_k, covariance_k)` in nats, `(B, F)` to `(B,)`."""
        return (self.log_weights + self.component_log_prob(x)).logsumexp(1)

    def log_posterior(self, x: Tensor) -> Tensor:
        """Compute log-probabilities of the components given `x` (Bayes), `(B, F)` to `(B, K)`; `exp` sums to 1."""
        return (self.log_weights + self.component_log_prob(x)).log_softmax(1)

    def at(self, components: Sequence[int]) -> GaussianMixture:
        """Return the mixture given that `x` comes from one of some components."""
        picked = list(components)
        return GaussianMixture(self.log_weights[picked].log_softmax(0), self.means[picked], self.covariances[picked])

    def noised(self, alpha: float, sigma: float) -> GaussianMixture:
        """Return the distribution of `x_t = alpha x_0 + sigma eps` with standard normal `eps`: again a mixture."""
        eye = torch.eye(self.means.shape[1], dtype=torch.float64)
        return GaussianMixture(self.log_weights, alpha * self.means, alpha**2 * self.covariances + sigma**2 * eye)

    def _pull(self, x: Tensor) -> Tensor:
        """Compute `covariance_k^-1 (x - mean_k)`, `(B, F)` to `(B, K, F)`."""
        difference = (x.to(torch.float64)[:, None] - self.means).permute(1, 2, 0)
        return torch.cholesky_solve(difference, self._factors).permute(2, 0, 1)

    def score(self, x: Tensor) -> Tensor:
        """Compute the log-density's gradient, `(B, F)` to `(B, F)`: `-sum_k P(k | x) covariance_k^-1 (x - mean_k)`."""
        return -(self.log_posterior(x).exp()[:, :, None] * self._pull(x)).sum(1)

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """Compute `E[x_0 | x_t]` of `x_t = alpha x_0 + sigma eps`, `(B, F)` to `(B, F)`.

        Each component gives `mean_k + alpha covariance_k (alpha^2 covariance_k + sigma^2 I)^-1 (x_t - alpha mean_k)`,
        and components are weighted by their posterior given `x_t`.
        """
        noised = self.noised(alpha, sigma)
        posterior = noised.log_posterior(x_t).exp()
        each = self.means + alpha * (self.covariances @ noised._pull(x_t)[..., None]).squeeze(-1)
        return (posterior[:, :, None] * each).sum(1)

"""Gaussian and Bernoulli algebra in log space, and the probabilities of paths through a tree.

Gaussians are diagonal and have a mean and a **log-variance**; binary decisions have a **logit**. No function
here adds an epsilon or clamps, so every gradient is exact. Functions of Gaussians work element by element.
`gaussian_kl` and `gaussian_log_prob` sum over all axes but the first, because a latent may be a vector
`(B, D)` or a map `(B, C, H, W)`.

Letters: `B` batch, `D` latent width, `N` nodes, `I` routed nodes, `K` leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.checks import check_noise
from treediff.tree.topology import TreeTopology

__all__ = [
    "bernoulli_kl_with_logits",
    "gaussian_kl",
    "gaussian_log_prob",
    "leaf_log_probs",
    "log_softplus",
    "path_log_probs",
    "precision_weighted_merge",
    "reparameterize",
    "sample_leaf",
]


def gaussian_kl(
    mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor | None = None, logvar_p: Tensor | None = None
) -> Tensor:
    r"""Compute the KL divergence between diagonal Gaussians, in nats, at least 0 up to rounding.

    `KL = 1/2 sum( exp(lv_q - lv_p) + (mu_q - mu_p)^2 exp(-lv_p) - 1 - (lv_q - lv_p) )`; the default for the
    second Gaussian is the standard normal.

    Args:
        mean_q: `(B, ...)`.
        logvar_q: `(B, ...)`.
        mean_p: `(B, ...)`, or None for zero.
        logvar_p: `(B, ...)`, or None for zero.

    Returns:
        `(B,)`, summed over all other axes. In float32 a divergence of 0 can be rounded to as low as about -1e-6
        per element.

    Examples:
        >>> gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2))
        tensor([1.])
    """
    difference = mean_q if mean_p is None else mean_q - mean_p
    log_ratio = logvar_q if logvar_p is None else logvar_q - logvar_p
    if logvar_p is not None:
        # Scaled before it is squared: 0 difference times an infinite precision would be nan.
        difference = difference * torch.exp(-0.5 * logvar_p)
    # expm1 keeps the digits that exp(x) - 1 loses where the two variances nearly agree.
    return 0.5 * (difference.square() + torch.expm1(log_ratio) - log_ratio).flatten(1).sum(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Compute the log-density `log N(x; mean, exp(logvar))` in nats, `(B, ...)` to `(B,)`, summed over other axes.

    Examples:
        >>> gaussian_log_prob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([-0.9189])
    """
    terms = ((x - mean) * torch.exp(-0.5 * logvar)).square() + logvar + math.log(2 * math.pi)
    return -0.5 * terms.flatten(1).sum(1)


def precision_weighted_merge(
    mean_a: Tensor, logvar_a: Tensor, mean_b: Tensor, logvar_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply two Gaussians and renormalise: precisions add, means are weighted by precision.

    With `w = sigmoid(lv_b - lv_a)`: `mean = w mean_a + (1 - w) mean_b` and
    `logvar = -logaddexp(-lv_a, -lv_b)`. Sources: LadderVAE (arXiv 1602.02282), eq. 9 and 10; TreeVAE's posterior
    of every node but the root.

    Returns:
        mean and log-variance, each of the inputs' shape.

    Examples:
        >>> logvar = torch.tensor(0.0)
        >>> precision_weighted_merge(torch.tensor(0.0), logvar, torch.tensor(2.0), logvar)
        (tensor(1.), tensor(-0.6931))
    """
    weight = torch.sigmoid(logvar_b - logvar_a)
    return torch.lerp(mean_b, mean_a, weight), -torch.logaddexp(-logvar_a, -logvar_b)


def reparameterize(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return a sample `mean + exp(logvar / 2) noise` through which gradients flow; `noise` is standard normal.

    Raises:
        TypeError: if noise is not floating point, or would widen the dtype of the mean.
        ValueError: if noise does not have one number for each number of the sample, so that noise would be shared.
    """
    shape = torch.broadcast_shapes(mean.shape, logvar.shape, noise.shape)
    check_noise(noise, mean.detach().expand(shape), "mean")
    return torch.addcmul(mean, torch.exp(0.5 * logvar), noise)


def bernoulli_kl_with_logits(logits_q: Tensor, logits_p: Tensor) -> Tensor:
    """Compute the KL divergence between Bernoulli variables given by logits, element by element, in nats.

    `KL = sigmoid(a) (a - b) + softplus(b) - softplus(a)`, finite and with a gradient for logits of any size.

    Examples:
        >>> bernoulli_kl_with_logits(torch.tensor(0.0), torch.tensor(0.0))
        tensor(0.)
    """
    return torch.sigmoid(logits_q) * (logits_q - logits_p) + F.softplus(logits_p) - F.softplus(logits_q)


def log_softplus(x: Tensor) -> Tensor:
    """Compute `log(log(1 + exp(x)))` without underflow: `x` where x is very negative, about `log x` for large x.

    The result is the log-variance of a Gaussian head. TreeVAE takes the variance as `softplus`, which grows
    slowly, so that no step of the optimiser can make a variance explode.
    """
    # Below the floor softplus(x) equals exp(x) to the precision of the dtype, and its logarithm is x itself.
    floor = torch.full((), -37.0 if x.dtype == torch.float64 else -15.0, dtype=x.dtype, device=x.device)
    # <= and not <: at x == floor, maximum would pass on half of the gradient.
    return torch.where(x <= floor, x, F.softplus(torch.maximum(x, floor)).log())


def path_log_probs(logits: Tensor, topology: TreeTopology) -> Tensor:
    """Compute the log-probability of reaching every node, from the routers' logits.

    `log P(n) = sum over the routed nodes i on the path to n of logsigmoid(+-logit_i)`, plus for a left turn.
    This takes two matmuls with the tree's incidence matrices. The child of a pass-through node has the same
    probability as that node.

    Args:
        logits: `(B, I)`, one column per node of `topology.routed`; positive means left. Must be finite.
        topology: the tree.

    Returns:
        `(B, N)` in nats, one column per node of `topology.ids`.

    Raises:
        ValueError: if the number of columns is not the number of routed nodes.

    Examples:
        >>> path_log_probs(torch.zeros(1, 1), TreeTopology.balanced(1)).exp()
        tensor([[1.0000, 0.5000, 0.5000]])
    """
    if logits.ndim != 2 or logits.shape[1] != len(topology.routed):
        raise ValueError(
            f"expected logits of shape (batch, {len(topology.routed)}), one column per routed node "
            f"{list(topology.routed)}; found {tuple(logits.shape)}"
        )
    left, right = (torch.from_numpy(turns).to(logits) for turns in topology.incidence())
    return F.logsigmoid(logits) @ left.T + F.logsigmoid(-logits) @ right.T


def leaf_log_probs(logits: Tensor, topology: TreeTopology) -> Tensor:
    """Return the columns of `path_log_probs` for `topology.leaves`: `(B, I)` to `(B, K)`; `exp` sums to 1.

    Examples:
        >>> leaf_log_probs(torch.zeros(1, 1), TreeTopology.balanced(1)).exp()
        tensor([[0.5000, 0.5000]])
    """
    columns = [topology.index[leaf] for leaf in topology.leaves]
    return path_log_probs(logits, topology)[:, columns]


def sample_leaf(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one leaf per row by inverting the cumulative distribution, without a loop or a global seed.

    Args:
        log_probs: `(B, K)`; need not be normalised.
        uniform: `(B,)` numbers in [0, 1).

    Returns:
        `(B,)` column indices.

    Examples:
        >>> sample_leaf(torch.tensor([[0.25, 0.75]]).log().expand(2, 2), torch.tensor([0.2, 0.3]))
        tensor([0, 1])
    """
    cumulative = log_probs.softmax(1).cumsum(1)
    # Divided by the last column, which rounding may leave below 1: a draw must not fall behind the last leaf
    # with a positive probability.
    return (uniform[:, None] >= cumulative / cumulative[:, -1:]).sum(1)

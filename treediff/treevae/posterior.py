"""Posterior of a TreeVAE for a batch, computed in one traversal, and the quantities read from it.

Letters: `B` batch, `T` visits, `R` visits to routed nodes, `L` visits to leaves, `N` nodes, `K` leaves, `D` latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.tree.probability import bernoulli_kl_with_logits, gaussian_kl, gaussian_log_prob
from treediff.tree.visits import Visits

__all__ = ["ELBO", "TreePosterior", "leaf_log_probs_of"]


@dataclass(frozen=True, eq=False)
class TreePosterior:
    """Latents, Gaussians, decisions and reach probabilities of every visit.

    Args:
        visits: the visits of images to nodes, with `log_reach` and the posterior routers' `logits`.
        z: `(T, D, ...)` a sample of each visited node's latent.
        posterior: `(T, 2D, ...)` mean and log-variance of `q(z_i | z_parent, x)`.
        prior: `(T, 2D, ...)` mean and log-variance of `p(z_i | z_parent)`; 0 at the root.
        prior_logits: `(R,)` logits of the prior routers `p(c | z)` at the routed visits.
    """

    visits: Visits
    z: Tensor
    posterior: Tensor
    prior: Tensor
    prior_logits: Tensor

    @property
    def mean(self) -> Tensor:
        """`(T, D, ...)` mean of the posterior."""
        return self.posterior.chunk(2, 1)[0]

    @property
    def logvar(self) -> Tensor:
        """`(T, D, ...)` log-variance of the posterior."""
        return self.posterior.chunk(2, 1)[1]

    @property
    def prior_mean(self) -> Tensor:
        """`(T, D, ...)` mean of the prior."""
        return self.prior.chunk(2, 1)[0]

    @property
    def prior_logvar(self) -> Tensor:
        """`(T, D, ...)` log-variance of the prior."""
        return self.prior.chunk(2, 1)[1]

    def leaf_log_probs(self) -> Tensor:
        """Return `log P(leaf | x)`, `(B, K)` in the order of the topology's leaves; -inf for visits left out."""
        return leaf_log_probs_of(self.visits)

    def latents(self, node: int) -> Tensor:
        """Return the latents `(B, D, ...)` at one node; NaN for images that did not visit the node.

        Raises:
            KeyError: if there is no such node.
        """
        plan = self.visits.plan
        plan.topology.path(node)
        here = self.visits.node == (plan.nodes.index(node) if node in plan.nodes else -1)
        z = self.z.new_full((self.visits.batch, *self.z.shape[1:]), math.nan)
        return z.index_put((self.visits.image[here],), self.z[here])

    def kl_nodes(self) -> Tensor:
        """Return `(T,)` analytic KL of each visit's posterior from its prior, not weighted by reach, in nats."""
        return gaussian_kl(*self.posterior.chunk(2, 1), *self.prior.chunk(2, 1))

    def kl_decisions(self) -> Tensor:
        """Return `(R,)` KL of each decision's posterior from its prior, not weighted by reach, in nats."""
        return bernoulli_kl_with_logits(self.visits.logits, self.prior_logits)

    def log_ratio_nodes(self) -> Tensor:
        """Return `(T,)` `log p(z_i | z_parent) - log q(z_i | z_parent, x)` at the sample, in nats."""
        prior = gaussian_log_prob(self.z, self.prior_mean, self.prior_logvar)
        return prior - gaussian_log_prob(self.z, self.mean, self.logvar)

    def bound(self, log_likelihood: Tensor, *, from_depth: int | None = None) -> ELBO:
        """Return the evidence lower bound of each image; see `TreeVAE.elbo`.

        Args:
            log_likelihood: `(L,)` `log p(x | z_leaf)` in nats at `visits.at_leaves()`.
            from_depth: if given, only decisions at that depth or below count, and KLs of nodes below that depth. This
                is the part of the bound that depends on a split at that depth.
        """
        visits, root = self.visits, self.visits.batch
        reach, leaves = visits.reach(), visits.at_leaves()
        nodes = reach * self.kl_nodes()
        decisions = reach[visits.routed] * self.kl_decisions()
        kl_root, first = nodes[:root], root
        if from_depth is not None:
            first = visits.starts[from_depth + 1]
            decisions = decisions * (visits.routed >= visits.starts[from_depth])
            kl_root = torch.zeros_like(kl_root)
        return ELBO(
            reconstruction=visits.per_image(-reach[leaves] * log_likelihood, leaves),
            kl_root=kl_root,
            kl_nodes=visits.per_image(nodes[first:], torch.arange(first, len(nodes), device=nodes.device)),
            kl_decisions=visits.per_image(decisions, visits.routed),
        )

    def log_weights(self, log_likelihood: Tensor, leaf: Tensor) -> Tensor:
        """Return the log importance weight of each image's path and latents, `(B,)` in nats; see `TreeVAE.iwae`.

        Args:
            log_likelihood: `(L,)` as for `bound`.
            leaf: `(B,)` the rank of the leaf at the end of each image's path.
        """
        visits = self.visits
        sign = torch.where(visits.turns_left(leaf), 1.0, -1.0).to(log_likelihood.dtype)
        decisions = F.logsigmoid(sign * self.prior_logits) - F.logsigmoid(sign * visits.logits)
        return (
            visits.per_image(self.log_ratio_nodes())
            + visits.per_image(decisions, visits.routed)
            + visits.per_image(log_likelihood, visits.at_leaves())
        )


def leaf_log_probs_of(visits: Visits) -> Tensor:
    """Return the log-probabilities `(B, K)` of the leaves, from the visits alone."""
    leaves, plan = visits.at_leaves(), visits.plan
    return visits.table(leaves, visits.log_reach[leaves], plan.leaf_rank, len(plan.leaves), -math.inf)


@dataclass(frozen=True, eq=False)
class ELBO:
    """Evidence lower bound of each image, term by term, in nats, all `(B,)` (TreeVAE, arXiv 2306.08984, eq. 9).

    Args:
        reconstruction: `sum over leaves of P(leaf | x) (-log p(x | z_leaf))`.
        kl_root: `KL(q(z_0 | x) || N(0, I))`.
        kl_nodes: sum over the other nodes of `P(i | x) KL(q(z_i | z_parent, x) || p(z_i | z_parent))`.
        kl_decisions: sum over routed nodes of `P(i | x) KL(q(c_i | x) || p(c_i | z_i))`.
    """

    reconstruction: Tensor
    kl_root: Tensor
    kl_nodes: Tensor
    kl_decisions: Tensor

    @property
    def kl(self) -> Tensor:
        """Sum of the three KL terms."""
        return self.kl_root + self.kl_nodes + self.kl_decisions

    @property
    def elbo(self) -> Tensor:
        """Bound itself; higher is better."""
        return -(self.reconstruction + self.kl)

    def loss(self, kl_weight: float = 1.0) -> Tensor:
        """Return the training loss: the mean over images of `reconstruction + kl_weight * kl`, a scalar."""
        return torch.mean(self.reconstruction + kl_weight * self.kl)

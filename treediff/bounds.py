"""Lower bounds on `log p(x)`, read from a TreeVAE's posterior."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.posterior import ELBO, TreePosterior, leaf_log_probs_of
from treediff.probability import sample_leaf

if TYPE_CHECKING:
    from treediff.treevae import TreeVAE

__all__ = ["elbo_of", "iwae"]


def elbo_of(model: TreeVAE, posterior: TreePosterior, x: Tensor, *, from_depth: int | None = None) -> ELBO:
    """The evidence lower bound from a posterior that was found for `x`; see `TreeVAE.elbo`.

    With `from_depth` only decisions at that depth or below count, and KLs of nodes below it: the part of the bound
    that a split at that depth takes part in.
    """
    visits, root = posterior.visits, posterior.visits.batch
    reach = visits.reach()
    nodes = reach * posterior.kl_nodes()
    decisions = reach[visits.routed] * posterior.kl_decisions()
    leaves = visits.at_leaves()
    log_prob = leaf_log_likelihood(model, posterior, x, leaves)
    kl_root, first = nodes[:root], root
    if from_depth is not None:
        first = visits.starts[from_depth + 1]
        decisions = decisions * (visits.routed >= visits.starts[from_depth])
        kl_root = torch.zeros_like(kl_root)
    return ELBO(
        reconstruction=visits.per_image(-reach[leaves] * log_prob, leaves),
        kl_root=kl_root,
        kl_nodes=visits.per_image(nodes[first:], torch.arange(first, len(nodes), device=nodes.device)),
        kl_decisions=visits.per_image(decisions, visits.routed),
    )


def leaf_log_likelihood(model: TreeVAE, posterior: TreePosterior, x: Tensor, leaves: Tensor) -> Tensor:
    """`log p(x | z_leaf)` in nats at some leaf visits `(L,)`."""
    output = model.decode_visits(posterior, leaves)
    return model.likelihood.log_prob(output, x.index_select(0, posterior.visits.image[leaves]))


def iwae(
    model: TreeVAE, x: Tensor, samples: int, *, chunk: int = 64, generator: torch.Generator | None = None
) -> Tensor:
    """The importance-weighted bound, `(B,)` in nats; see `TreeVAE.iwae`."""
    if not (isinstance(samples, Integral) and isinstance(chunk, Integral)):
        raise TypeError(f"samples and chunk must be integers, found {samples!r} and {chunk!r}")
    if samples < 1 or chunk < 1:
        raise ValueError(f"samples and chunk must be at least 1, found {samples} and {chunk}")
    features = model.features(x)
    everyone = model.route(features)  # once: a decision is the same for every sample
    log_probs = leaf_log_probs_of(everyone)
    total = x.new_full((len(x),), -math.inf)
    for start in range(0, samples, chunk):
        k = min(chunk, samples - start)
        uniform = torch.rand(len(x) * k, generator=generator, dtype=x.dtype, device=x.device)
        leaf = sample_leaf(log_probs.repeat_interleave(k, 0), uniform)
        posterior = model.latents(
            features.repeat_interleave(k, 1), everyone.repeated(k).along(leaf), generator=generator
        )
        weights = _log_weights(model, posterior, x.repeat_interleave(k, 0), leaf).view(len(x), k)
        total = torch.logaddexp(total, weights.logsumexp(1))
    return total - math.log(samples)


def _log_weights(model: TreeVAE, posterior: TreePosterior, x: Tensor, leaf: Tensor) -> Tensor:
    """`(B,)` log importance weights of one path, to leaves by rank, and one set of latents per row."""
    visits = posterior.visits
    sign = torch.where(visits.turns_left(leaf), 1.0, -1.0).to(x.dtype)
    decisions = F.logsigmoid(sign * posterior.prior_logits) - F.logsigmoid(sign * visits.logits)
    leaves = visits.at_leaves()
    return (
        visits.per_image(posterior.log_ratio_nodes())
        + visits.per_image(decisions, visits.routed)
        + visits.per_image(leaf_log_likelihood(model, posterior, x, leaves), leaves)
    )

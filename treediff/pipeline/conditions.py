"""Conditions of the second stage, from images or from samples of a TreeVAE.

Letters: `B` images, `K` leaves, `S` depth of the tree, `N` nodes, `D` latent, `C H W` image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from treediff.core.modes import evaluating
from treediff.core.noise import counter_normal, counter_uniform, seed_from, widest
from treediff.diffusion.condition import TreeCondition
from treediff.tree.plan import TreePlan
from treediff.tree.probability import sample_leaf
from treediff.tree.topology import TreeTopology
from treediff.treevae.model import TreeVAE
from treediff.treevae.posterior import leaf_log_probs_of
from treediff.treevae.prior import TreeSample

__all__ = ["condition_of", "condition_of_sample"]

# Draw numbers of an image; latents have the ids of their nodes, from 0 on.
_LEAF, _PRIOR = -1, -2


@torch.no_grad()
def condition_of(
    model: TreeVAE,
    x: Tensor,
    *,
    leaf: Tensor | str = "sample",
    prior_share: float = 0.0,
    decode: bool = True,
    first_index: int = 0,
    generator: torch.Generator | None = None,
) -> TreeCondition:
    """Return conditions of images by the posterior of a TreeVAE: a leaf, the latents on its path, and a reconstruction.

    Leaf and latents of image `i` depend on the generator's seed and on `first_index + i` only. The model runs in
    evaluation mode, whatever its current mode.

    A second stage that trains on conditions of the posterior and generates from conditions of the prior has not been
    trained on the conditions it gets. With `prior_share` some images get conditions between the two. The root's latent
    and the leaf are still the image's own, and the latents below the root are drawn from `p(z_i | z_parent)`. The
    leaf's decoder makes the condition's image of these latents.

    Args:
        model: the TreeVAE.
        x: `(B, C, H, W)`.
        leaf: 'sample' for a leaf drawn from `P(leaf | x)`, 'argmax' for the most probable one, or `(B,)` leaf ids.
        prior_share: share of the images whose latents below the root come from the prior, from 0 to 1. Each image is
            selected with this probability, independently of the batch.
        decode: whether the condition has the leaf decoder's image. Without the image no decoder runs, which is enough
            for a second stage that is conditioned on nodes or latents only.
        first_index: index of the first image.
        generator: gives the seed.

    Raises:
        ValueError: if `leaf` is another word, the share is out of range, or `x` does not fit the model.
        KeyError: if an id is not the id of a leaf.
    """
    model.check(x)
    if not 0 <= prior_share <= 1:
        raise ValueError(f"prior_share must be between 0 and 1, found {prior_share}")
    seed, index = seed_from(generator), torch.arange(first_index, first_index + len(x), device=x.device)
    with evaluating(model):
        features = model.features(x)
        everywhere = model.route(features)
        plan, log_probs = everywhere.plan, leaf_log_probs_of(everywhere)
        leaves = plan.ids(plan.leaves)
        rank = _leaf_ranks(plan, leaf, log_probs, seed, index)
        visits = everywhere.along(rank)
        node = torch.tensor(plan.nodes, device=x.device)[visits.node]
        noise = counter_normal(seed, index[visits.image], model.latent, draw=node, dtype=features.dtype)
        from_prior = None
        if prior_share:
            from_prior = counter_uniform(seed, index, draw=_PRIOR, dtype=widest(x.device)) < prior_share
        posterior = model.latents(features, visits, noise=noise, from_prior=from_prior)
        image = model.images_of(posterior) if decode else None
    z = posterior.z.new_zeros(len(x), len(plan.levels), *model.latent)
    z[visits.image, plan.depth[visits.node]] = posterior.z
    return TreeCondition(torch.tensor(leaves, device=x.device)[rank], z=z, image=image, weights=log_probs.exp())


def _leaf_ranks(plan: TreePlan, leaf: Tensor | str, log_probs: Tensor, seed: int, index: Tensor) -> Tensor:
    """Return the rank of each image's leaf among the leaves, `(B,)`."""
    if isinstance(leaf, Tensor):
        return plan.leaf_ranks(leaf, len(index))
    if leaf == "argmax":
        return log_probs.argmax(1)
    if leaf != "sample":
        raise ValueError(f"leaf must be 'sample', 'argmax' or (B,) leaf ids, found {leaf!r}")
    return sample_leaf(log_probs, counter_uniform(seed, index, draw=_LEAF, dtype=log_probs.dtype))


def condition_of_sample(sample: TreeSample, topology: TreeTopology) -> TreeCondition:
    """Return the conditions of images that a TreeVAE drew from its prior."""
    missing = topology.max_depth + 1 - sample.z.shape[1]
    # Paths of a sample end at the deepest leaf it could have reached; paths of conditions have the depth of the tree.
    z = torch.cat([sample.z, sample.z.new_zeros(len(sample.z), missing, *sample.z.shape[2:])], 1)
    return TreeCondition(sample.leaf, z=z, image=sample.images)

"""Where images belong, as a TreeVAE sees it: from images or from its samples to the conditions of the second stage.

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

# Draws of an image: its latents are numbered by their nodes, from 0 on.
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
    """Where images belong by the posterior of a TreeVAE: a leaf, the latents on the way to it, and its reconstruction.

    Leaf and latents of image `i` depend on the generator's seed and on `first_index + i` only. Whatever mode the model
    is in, it looks in that of evaluation.

    A second stage that trains on the posterior's conditions and generates from the prior's has never seen what it is
    given. With `prior_share` some images are told what lies between the two: the root's latent and the leaf are still
    those of the image, the latents below the root are drawn from `p(z_i | z_parent)`, and the leaf's decoder makes its
    image of them.

    Args:
        model: the TreeVAE.
        x: `(B, C, H, W)`.
        leaf: 'sample' for a leaf drawn from `P(leaf | x)`, 'argmax' for the most probable one, or `(B,)` leaf ids.
        prior_share: share of the images whose latents below the root come from the prior, from 0 to 1; each image is
            one of them with this probability, whatever the batch.
        decode: whether the condition has the leaf decoder's image; a second stage that is told only nodes or latents
            can do without, and then no decoder runs.
        first_index: index of the first image.
        generator: gives the seed.

    Raises:
        ValueError: if `leaf` is another word, the share is out of range, or `x` is not what the model takes.
        KeyError: if an id is not that of a leaf.
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
    """`(B,)` which of the leaves each image belongs to."""
    if isinstance(leaf, Tensor):
        return plan.leaf_ranks(leaf, len(index))
    if leaf == "argmax":
        return log_probs.argmax(1)
    if leaf != "sample":
        raise ValueError(f"leaf must be 'sample', 'argmax' or (B,) leaf ids, found {leaf!r}")
    return sample_leaf(log_probs, counter_uniform(seed, index, draw=_LEAF, dtype=log_probs.dtype))


def condition_of_sample(sample: TreeSample, topology: TreeTopology) -> TreeCondition:
    """The place of images that a TreeVAE drew from its prior."""
    missing = topology.max_depth + 1 - sample.z.shape[1]
    # A sample is as long as the deepest leaf it could have reached; conditions are as long as the tree is deep.
    z = torch.cat([sample.z, sample.z.new_zeros(len(sample.z), missing, *sample.z.shape[2:])], 1)
    return TreeCondition(sample.leaf, z=z, image=sample.images)

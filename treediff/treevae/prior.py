"""Samples from the prior of a TreeVAE: one path per image, or one root and every leaf below it.

All noise comes from `treediff.core.noise`, keyed by image and node. So an image depends only on the seed, its index and
its path: `sample` into a leaf and the column of that leaf in `sample_leaves` give the same image.

Letters: `B` images, `S` steps from the root to the deepest leaf, `N` nodes, `K` leaves, `D` latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.core.groups import Groups
from treediff.core.noise import counter_normal, counter_uniform, seed_from
from treediff.layers.likelihood import Likelihood
from treediff.tree.plan import TreePlan
from treediff.tree.probability import reparameterize
from treediff.tree.visits import descend
from treediff.treevae.banks import NodeBanks, by_node

__all__ = ["LeafSamples", "TreeSample", "sample", "sample_leaves"]

# Draws are numbered by node id, twice: once for the latent of the node, once for its decision.
_DECISIONS = 1 << 32


@dataclass(frozen=True, eq=False)
class TreeSample:
    """Images drawn from the tree, one path each.

    Args:
        images: `(B, *inputs)`, the mean of the likelihood.
        leaf: `(B,)` node id of the leaf whose decoder made each image.
        path: `(B, S + 1)` node ids from the root on; -1 past the leaf. `S` is the depth of the deepest leaf that can be
            reached, whether or not an image reached it.
        z: `(B, S + 1, D, ...)` the latents along the path; 0 past the leaf.
    """

    images: Tensor
    leaf: Tensor
    path: Tensor
    z: Tensor


@dataclass(frozen=True, eq=False)
class LeafSamples:
    """Images drawn from each root, one per leaf.

    Args:
        images: `(B, K, *inputs)` in the order of the topology's leaves.
        log_probs: `(B, K)` log-probability of each leaf under the prior routers, in nats.
        z: `(B, K, S + 1, D, ...)` the latents along the path to each leaf, `S` steps down at most; 0 past the leaf.
    """

    images: Tensor
    log_probs: Tensor
    z: Tensor


@torch.no_grad()
def sample(
    banks: NodeBanks,
    likelihood: Likelihood,
    latent: tuple[int, ...],
    n: int,
    *,
    node: int | None = None,
    temperature: float = 1.0,
    first_index: int = 0,
    generator: torch.Generator | None = None,
) -> TreeSample:
    """Draw `n` images through `node` (the root by default); see `TreeVAE.sample`."""
    tree = banks.topology
    forced = tree.path(tree.root if node is None else node)
    check_draw(n, temperature, first_index)
    seed, weight = seed_from(generator), next(banks.parameters())
    device, dtype = weight.device, weight.dtype
    plan = banks.plan(None, device)
    ids = torch.tensor(plan.nodes, device=device)
    index = torch.arange(first_index, first_index + n, device=device)
    position = torch.zeros(n, dtype=torch.int64, device=device)
    z = temperature * counter_normal(seed, index, latent, draw=tree.root, dtype=dtype)
    path = [ids[position]]
    latents = [z]
    for depth in range(max(tree.depth(leaf) for leaf in tree.leaves_under(forced[-1]))):
        if depth + 1 < len(forced):
            child = torch.full_like(position, plan.nodes.index(forced[depth + 1]))
        else:
            child = _next_position(banks, plan, position, z, seed, index)
        moving = child >= 0
        rank = child[moving] - plan.levels[depth + 1].start
        prior = by_node(banks.transitions, z[moving], rank, plan.ids(plan.levels[depth + 1]))
        noise = temperature * counter_normal(seed, index[moving], latent, draw=ids[child[moving]], dtype=dtype)
        mean, logvar = prior.chunk(2, 1)
        z = z.masked_scatter(_like(moving, z), reparameterize(mean, logvar, noise))
        position = torch.where(moving, child, position)
        path.append(torch.where(moving, ids[child], -1))
        latents.append(torch.where(_like(moving, z), z, 0))
    output = by_node(banks.decoders, z, plan.leaf_rank[position], plan.ids(plan.leaves))
    images = likelihood.mean(output)
    return TreeSample(images, ids[position], torch.stack(path, 1), torch.stack(latents, 1))


def _next_position(banks: NodeBanks, plan: TreePlan, position: Tensor, z: Tensor, seed: int, index: Tensor) -> Tensor:
    """Return each image's next position by the prior routers; -1 for images at a leaf."""
    left, right = plan.turns[:, position].unbind()
    if not plan.routed:
        return left
    deciding = plan.routed_rank[position] >= 0
    rank = plan.routed_rank[position[deciding]]
    logits = by_node(banks.prior_routers, z[deciding], rank, plan.ids(plan.routed))
    ids = torch.tensor(plan.nodes, device=position.device)[position[deciding]]
    chance = counter_uniform(seed, index[deciding], draw=ids + _DECISIONS, dtype=z.dtype)
    goes_left = torch.ones_like(deciding).masked_scatter(deciding, chance < torch.sigmoid(logits))
    return torch.where(goes_left, left, right)


def check_draw(n: int, temperature: float, first_index: int) -> None:
    """Raise TypeError or ValueError unless the arguments of a draw are valid."""
    # Whole numbers of numpy are accepted; True is no count.
    counts = all(isinstance(i, Integral) and not isinstance(i, bool) for i in (n, first_index))
    if not counts or not isinstance(temperature, Real):
        raise TypeError(
            f"n and first_index must be integers and temperature a number; found n={n!r}, first_index={first_index!r} "
            f"and temperature={temperature!r}"
        )
    if n < 0 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"n and temperature must be at least 0, and temperature finite; found n={n} and temperature={temperature}"
        )


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


@torch.no_grad()
def sample_leaves(
    banks: NodeBanks,
    likelihood: Likelihood,
    latent: tuple[int, ...],
    n: int,
    *,
    temperature: float = 1.0,
    first_index: int = 0,
    generator: torch.Generator | None = None,
) -> LeafSamples:
    """Draw `n` roots and follow each root to every leaf; see `TreeVAE.sample_leaves`."""
    check_draw(n, temperature, first_index)
    seed, weight = seed_from(generator), next(banks.parameters())
    device, dtype = weight.device, weight.dtype
    plan = banks.plan(None, device)
    ids = torch.tensor(plan.nodes, device=device)
    index = torch.arange(first_index, first_index + n, device=device)
    levels = [temperature * counter_normal(seed, index, latent, draw=plan.nodes[0], dtype=dtype)]
    for above, level in pairwise(plan.levels):
        parents = plan.parent[level.start : level.stop] - above.start
        groups = Groups(torch.arange(len(level), device=device).repeat_interleave(n), len(level))
        prior = banks.transitions(
            levels[-1].unflatten(0, (len(above), n))[parents].flatten(0, 1), groups, plan.ids(level)
        )
        draw = ids[groups.index + level.start]
        noise = counter_normal(seed, index.repeat(len(level)), latent, draw=draw, dtype=dtype)
        mean, logvar = prior.chunk(2, 1)
        levels.append(reparameterize(mean, logvar, temperature * noise))
    z = torch.cat(levels)

    def route(image: Tensor, node: Tensor, groups: Groups, nodes: list[int]) -> Tensor:
        return banks.prior_routers(z[node * n + image], groups, nodes)

    visits = descend(plan, n, route, like=z)
    leaves = visits.at_leaves()
    groups = Groups(plan.leaf_rank[visits.node[leaves]], len(plan.leaves))
    images = likelihood.mean(banks.decoders(z[leaves], groups, plan.ids(plan.leaves)))
    log_probs = F.log_softmax(visits.log_reach[leaves].view(len(plan.leaves), n).T, dim=1)
    latents = z.view(len(plan.nodes), n, *latent)
    return LeafSamples(images.unflatten(0, (len(plan.leaves), n)).transpose(0, 1), log_probs, plan.along(latents))

"""Gaussian trees for the tests, and their answers worked out path by path with numpy and scipy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from scipy.special import expit
from torch import Tensor

from treediff.testing import GaussianTree
from treediff.tree.topology import TreeTopology

Array = npt.NDArray[np.float64]
UNEVEN = TreeTopology.balanced(2).split(4).prune(3).prune(5)  # pass-throughs at 1 and 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(tree: TreeTopology, latent: int = 2, features: int = 3, seed: int = 0) -> dict[str, Any]:
    """Every number different, nothing symmetric or orthogonal, so that a transposed matrix shows."""
    generator = seeded(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    below = tree.ids[1:]
    return {
        "topology": tree,
        "weight": {node: draw(latent, latent) for node in below},
        "bias": {node: draw(latent) for node in below},
        "logvar": {node: draw(latent) for node in below},
        "branch_logit": {node: draw().item() for node in tree.routed},
        "decoder_weight": {leaf: draw(features, latent) for leaf in tree.leaves},
        "decoder_bias": {leaf: draw(features) for leaf in tree.leaves},
        "variance": 0.3,
    }


def world(tree: TreeTopology = UNEVEN, latent: int = 2, features: int = 3, seed: int = 0) -> GaussianTree:
    return GaussianTree(**parameters(tree, latent, features, seed))


def moments_of_one_path(known: GaussianTree, leaf: int) -> tuple[Array, Array]:
    """Write x as a sum of independent noises, one per node of the path, each seen through all below it."""
    path = known.topology.path(leaf)
    decoder = known.decoder_weight[leaf].numpy()
    mean = known.decoder_bias[leaf].numpy()
    covariance = known.variance * np.eye(known.features)
    for i, node in enumerate(path):
        seen = decoder
        for later in reversed(path[i + 1 :]):
            seen = seen @ known.weight[later].numpy()
        if i == 0:
            covariance = covariance + seen @ seen.T
        else:
            mean = mean + seen @ known.bias[node].numpy()
            covariance = covariance + seen @ np.diag(np.exp(known.logvar[node].numpy())) @ seen.T
    return mean, covariance


def log_prior_of_one_path(known: GaussianTree, leaf: int) -> float:
    path, total = known.topology.path(leaf), 0.0
    for above, below in pairwise(path):
        if above in known.topology.routed:
            left = expit(known.branch_logit[above].item())
            total += math.log(left if known.topology.children(above)[0] == below else 1 - left)
    return total


def log_joint_by_scipy(known: GaussianTree, x: Tensor) -> Array:
    """The logarithm of P(leaf) p(x | leaf), `(B, K)`, from the path-by-path moments."""
    columns = []
    for leaf in known.topology.leaves:
        normal = stats.multivariate_normal(*moments_of_one_path(known, leaf))
        columns.append(log_prior_of_one_path(known, leaf) + np.atleast_1d(normal.logpdf(x.numpy())))
    return np.stack(columns, 1)

"""Generative trees of clusters, on PyTorch.

`TreeVAE` learns a tree of latent clusters, `TreeGrowth` grows the tree, and all their layers are in `treediff.layers`.
`LeafConditionedDDPM`, built from the parts in `treediff.diffusion`, draws sharp images of any cluster, and
`DiffuseTreeVAE` is both stages as one.
"""

from treediff.core import __version__ as __version__
from treediff.core.ema import EMA
from treediff.diffusion import TreeCondition
from treediff.diffusion.ddpm import LeafConditionedDDPM
from treediff.growth.growth import TreeGrowth
from treediff.growth.policy import LeafStatistics
from treediff.growth.stage import Stage
from treediff.pipeline.density import LeafDensity
from treediff.pipeline.model import DiffuseTreeVAE
from treediff.tree.topology import TreeTopology
from treediff.treevae.contrast import TreeContrast
from treediff.treevae.model import TreeVAE
from treediff.treevae.posterior import ELBO, TreePosterior

__all__ = [
    "ELBO",
    "EMA",
    "DiffuseTreeVAE",
    "LeafConditionedDDPM",
    "LeafDensity",
    "LeafStatistics",
    "Stage",
    "TreeCondition",
    "TreeContrast",
    "TreeGrowth",
    "TreePosterior",
    "TreeTopology",
    "TreeVAE",
]

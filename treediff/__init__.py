"""Trees of clusters that one can generate from, on PyTorch.

`TreeVAE` learns a tree of latent clusters, `TreeGrowth` grows it, and every layer they are made of stands in
`treediff.layers`. `LeafConditionedDDPM` draws sharp images of any cluster, made of the parts in `treediff.diffusion`,
and `DiffuseTreeVAE` is both stages as one.
"""

from treediff.contrast import TreeContrast
from treediff.ddpm import LeafConditionedDDPM
from treediff.density import LeafDensity
from treediff.diffusion import TreeCondition
from treediff.ema import EMA
from treediff.growth import TreeGrowth
from treediff.pipeline import DiffuseTreeVAE
from treediff.policies import LeafStatistics
from treediff.posterior import ELBO, TreePosterior
from treediff.stage import Stage
from treediff.topology import TreeTopology
from treediff.treevae import TreeVAE

__version__ = "0.1.0.dev0"

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

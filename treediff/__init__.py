"""Trees of clusters that one can generate from, on PyTorch.

`TreeVAE` learns a tree of latent clusters, `TreeGrowth` grows it, and every layer they are made of stands in
`treediff.layers`.
"""

from treediff.contrast import TreeContrast
from treediff.growth import TreeGrowth
from treediff.policies import LeafStatistics
from treediff.posterior import ELBO, TreePosterior
from treediff.stage import Stage
from treediff.topology import TreeTopology
from treediff.treevae import TreeVAE

__version__ = "0.1.0.dev0"

__all__ = ["ELBO", "LeafStatistics", "Stage", "TreeContrast", "TreeGrowth", "TreePosterior", "TreeTopology", "TreeVAE"]

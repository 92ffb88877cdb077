"""TreeVAE: a variational autoencoder whose latents form a tree."""

from treediff.treevae.contrast import TreeContrast
from treediff.treevae.model import TreeVAE
from treediff.treevae.posterior import ELBO, TreePosterior
from treediff.treevae.prior import LeafSamples, TreeSample

__all__ = ["ELBO", "LeafSamples", "TreeContrast", "TreePosterior", "TreeSample", "TreeVAE"]

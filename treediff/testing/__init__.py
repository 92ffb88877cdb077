"""Worlds with known answers, to test learners and samplers against.

`GaussianTree` is the generative model of TreeVAE with linear Gaussians everywhere and decisions that do not
depend on the latent. Summing out the latents leaves one Gaussian per leaf, so the data follow a `GaussianMixture`.
Density and posteriors are exact, up to rounding in float64, and so are the score and the denoiser at every noise level
(`ExactDenoiser`). `NaiveTreeVAE` is the plain loop over nodes that the batched model must agree with.

Letters: `B` batch, `N` nodes, `K` leaves or components, `D` latent width, `F` features.
"""

from treediff.testing.denoiser import ExactDenoiser
from treediff.testing.gaussian_tree import GaussianTree
from treediff.testing.hierarchy import same_hierarchy
from treediff.testing.mixture import GaussianMixture
from treediff.testing.naive import NaiveTreeVAE

__all__ = ["ExactDenoiser", "GaussianMixture", "GaussianTree", "NaiveTreeVAE", "same_hierarchy"]

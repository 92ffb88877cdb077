"""Both stages as one: a TreeVAE finds the place, a diffusion model draws what belongs there."""

from treediff.pipeline.conditions import condition_of, condition_of_sample
from treediff.pipeline.density import LeafDensity
from treediff.pipeline.model import DiffuseTreeVAE, Refined

__all__ = ["DiffuseTreeVAE", "LeafDensity", "Refined", "condition_of", "condition_of_sample"]

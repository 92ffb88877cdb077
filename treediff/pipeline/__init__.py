"""Pipeline of both stages: a TreeVAE gives a condition, and a diffusion model generates images under it."""

from treediff.pipeline.conditions import condition_of, condition_of_sample
from treediff.pipeline.density import LeafDensity
from treediff.pipeline.model import DiffuseTreeVAE, Refined

__all__ = ["DiffuseTreeVAE", "LeafDensity", "Refined", "condition_of", "condition_of_sample"]

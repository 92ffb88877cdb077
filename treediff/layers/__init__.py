"""The layers a TreeVAE is made of, each a small module of its own."""

from treediff.layers.annealing import KLAnnealing
from treediff.layers.bank import NodeBank
from treediff.layers.blocks import BottomUpBlock, GaussianHead, LatentTransition, Router
from treediff.layers.contrastive import ProjectionHead, decision_nt_xent, nt_xent
from treediff.layers.decoders import ConvDecoder, MLPDecoder, PatchDecoder, ResidualDecoder
from treediff.layers.encoders import ConvEncoder, MLPEncoder, ResidualBlock, ResidualEncoder
from treediff.layers.grouped import grouped_call, grouped_linear
from treediff.layers.groups import Groups
from treediff.layers.init import initialize
from treediff.layers.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood

__all__ = [
    "BernoulliLikelihood",
    "BottomUpBlock",
    "ConvDecoder",
    "ConvEncoder",
    "GaussianHead",
    "GaussianLikelihood",
    "Groups",
    "KLAnnealing",
    "LatentTransition",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "NodeBank",
    "PatchDecoder",
    "ProjectionHead",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
    "Router",
    "decision_nt_xent",
    "grouped_call",
    "grouped_linear",
    "initialize",
    "nt_xent",
]

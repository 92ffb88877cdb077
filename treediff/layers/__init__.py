"""Layers of a TreeVAE, each a small module of its own."""

from treediff.core.groups import Groups
from treediff.layers.components import PrincipalComponents, UnitLength
from treediff.layers.contrastive import ProjectionHead, decision_nt_xent, nt_xent
from treediff.layers.decoders import ConvDecoder, MLPDecoder, PatchDecoder, ResidualDecoder
from treediff.layers.descriptors import Deskew, GradientHistograms
from treediff.layers.encoders import ConvEncoder, MLPEncoder, ResidualBlock, ResidualEncoder
from treediff.layers.grouped.bank import NodeBank
from treediff.layers.grouped.call import grouped_call, grouped_linear
from treediff.layers.heads import BottomUpBlock, GaussianHead, LatentTransition
from treediff.layers.init import initialize
from treediff.layers.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood
from treediff.layers.resnet import ResNetEncoder
from treediff.layers.router import Router, fit_router

__all__ = [
    "BernoulliLikelihood",
    "BottomUpBlock",
    "ConvDecoder",
    "ConvEncoder",
    "Deskew",
    "GaussianHead",
    "GaussianLikelihood",
    "GradientHistograms",
    "Groups",
    "LatentTransition",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "NodeBank",
    "PatchDecoder",
    "PrincipalComponents",
    "ProjectionHead",
    "ResNetEncoder",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
    "Router",
    "UnitLength",
    "decision_nt_xent",
    "fit_router",
    "grouped_call",
    "grouped_linear",
    "initialize",
    "nt_xent",
]

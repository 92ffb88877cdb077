"""Key encoders: frozen maps from inputs to keys."""

from munkey.encoders.base import KeyEncoder
from munkey.encoders.cache import FeatureCache
from munkey.encoders.conv import ConvEncoder
from munkey.encoders.fitting import fit_encoder
from munkey.encoders.identity import Identity
from munkey.encoders.module import ModuleEncoder
from munkey.encoders.perceptron import PerceptronEncoder
from munkey.encoders.projection import Projection

__all__ = [
    "ConvEncoder",
    "FeatureCache",
    "Identity",
    "KeyEncoder",
    "ModuleEncoder",
    "PerceptronEncoder",
    "Projection",
    "fit_encoder",
]

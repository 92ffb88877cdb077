"""Readouts: from an input and its neighbours to a prediction."""

from munkey.readout.aggregate import Aggregation, Attend, Ensemble, RankMix, Retrieved, SoftmaxMix
from munkey.readout.base import Query, Readout
from munkey.readout.exemplar import ExemplarReadout
from munkey.readout.features import Features, FourierFeatures, ReLUFeatures, UnitFeatures
from munkey.readout.linear import DiscriminantReadout, LinearReadout, RidgeReadout
from munkey.readout.mixture import Mixture
from munkey.readout.module import ModuleReadout
from munkey.readout.transformer import ExemplarTransformer
from munkey.readout.votes import NeighbourVote
from munkey.readout.writer import ValueWriter

__all__ = [
    "Aggregation",
    "Attend",
    "DiscriminantReadout",
    "Ensemble",
    "ExemplarReadout",
    "ExemplarTransformer",
    "Features",
    "FourierFeatures",
    "LinearReadout",
    "Mixture",
    "ModuleReadout",
    "NeighbourVote",
    "Query",
    "RankMix",
    "ReLUFeatures",
    "Readout",
    "Retrieved",
    "RidgeReadout",
    "SoftmaxMix",
    "UnitFeatures",
    "ValueWriter",
]

"""Readouts: from an input and its neighbours to a prediction."""

from munkey.readout.aggregate import Aggregation, Ensemble, RankMix, Retrieved, SoftmaxMix
from munkey.readout.transformer import ExemplarTransformer
from munkey.readout.writer import ValueWriter

__all__ = ["Aggregation", "Ensemble", "ExemplarTransformer", "RankMix", "Retrieved", "SoftmaxMix", "ValueWriter"]

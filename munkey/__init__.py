"""Classifiers that remember by key and forget by key, on PyTorch.

`KeyMemoryTransformer` keeps what is particular to a training instance in a `KeyValueMemory`, whose `KeyStore` erases
forgotten rows.
"""

from munkey.audit.pathways import PathwayAccuracies, pathway_accuracies
from munkey.encoders.base import KeyEncoder
from munkey.encoders.cache import FeatureCache
from munkey.encoders.conv import ConvEncoder
from munkey.encoders.fitting import fit_encoder
from munkey.encoders.identity import Identity
from munkey.encoders.module import ModuleEncoder
from munkey.encoders.perceptron import PerceptronEncoder
from munkey.encoders.projection import Projection
from munkey.memory import KeyValueMemory
from munkey.model import KeyMemoryTransformer
from munkey.readout.aggregate import Attend, Ensemble, RankMix, Retrieved, SoftmaxMix
from munkey.readout.transformer import ExemplarTransformer
from munkey.readout.writer import ValueWriter
from munkey.search.faiss import FaissSearch
from munkey.sharded import ShardedKeyStore
from munkey.store import DurableStore, KeyStore, Receipt, Rows
from munkey.task import Classification, MultiLabel, Regression, Task
from munkey.values import fit_values

__all__ = [
    "Attend",
    "Classification",
    "ConvEncoder",
    "DurableStore",
    "Ensemble",
    "ExemplarTransformer",
    "FaissSearch",
    "FeatureCache",
    "Identity",
    "KeyEncoder",
    "KeyMemoryTransformer",
    "KeyStore",
    "KeyValueMemory",
    "ModuleEncoder",
    "MultiLabel",
    "PathwayAccuracies",
    "PerceptronEncoder",
    "Projection",
    "RankMix",
    "Receipt",
    "Regression",
    "Retrieved",
    "Rows",
    "ShardedKeyStore",
    "SoftmaxMix",
    "Task",
    "ValueWriter",
    "fit_encoder",
    "fit_values",
    "pathway_accuracies",
]

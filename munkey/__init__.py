"""Classifiers that remember by key and forget by key, on PyTorch.

`KeyMemoryTransformer` keeps what is particular to a training instance in a `KeyValueMemory`, whose `KeyStore` erases
what it forgets.
"""

from munkey.aggregation import Ensemble, RankMix, SoftmaxMix
from munkey.conv_encoder import ConvEncoder
from munkey.efficientnet import EfficientNetLite0
from munkey.encoders import KeyEncoder, ModuleEncoder, Projection
from munkey.memory import KeyValueMemory, Retrieved
from munkey.model import KeyMemoryTransformer
from munkey.network import ExemplarTransformer
from munkey.pathways import PathwayAccuracies, pathway_accuracies
from munkey.search.faiss import FaissSearch
from munkey.sharded import ShardedKeyStore
from munkey.store import DurableStore, KeyStore, Receipt, Rows
from munkey.writer import ValueWriter

__all__ = [
    "ConvEncoder",
    "DurableStore",
    "EfficientNetLite0",
    "Ensemble",
    "ExemplarTransformer",
    "FaissSearch",
    "KeyEncoder",
    "KeyMemoryTransformer",
    "KeyStore",
    "KeyValueMemory",
    "ModuleEncoder",
    "PathwayAccuracies",
    "Projection",
    "RankMix",
    "Receipt",
    "Retrieved",
    "Rows",
    "ShardedKeyStore",
    "SoftmaxMix",
    "ValueWriter",
    "pathway_accuracies",
]

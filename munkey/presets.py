"""Presets of `KeyMemoryTransformer`: functions that return the arguments of its constructor."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import nn

from munkey.encoders.base import KeyEncoder, check_encoder
from munkey.memory import KeyValueMemory
from munkey.readout.aggregate import AGGREGATIONS, Aggregation
from munkey.readout.base import Readout
from munkey.readout.features import UnitFeatures
from munkey.readout.linear import DiscriminantReadout, RidgeReadout
from munkey.readout.mixture import Mixture
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.readout.transformer import ExemplarTransformer, TransformerBlock
from munkey.readout.votes import NeighbourVote
from munkey.readout.writer import ValueWriter
from munkey.store.store import KeyStore
from munkey.task import Classification, Task
from treediff.core.checks import check_positive

__all__ = ["DEFAULTS", "OF_NETWORK", "Settings", "feature_parts", "model_parts", "patch_for"]


class Settings(TypedDict, total=False):
    """Settings of the factories of `KeyMemoryTransformer`, besides shapes, task and encoder.

    Attributes:
        mode: 'paper' or 'exact'; 'paper' if not given.
        width: of the transformer; 64.
        depth: number of blocks; 2.
        heads: of the attention; 4.
        dropout: in the blocks, in training only; 0.
        value_width: dimensions of a value; 128, as in the paper.
        aggregation: 'ensemble', 'softmax' or 'rank', or a module; 'ensemble'.
        neighbours: number of retrieved rows; 4, as in the paper.
        metric: 'cosine' or 'dot'; 'cosine'.
        own_token_probability: see `KeyMemoryTransformer`; 1 in paper mode.
        drop_input: share of the instances whose input is hidden in training; 0.2.
        drop_exemplar: share of the instances whose exemplar is hidden in training; 0.2.
        sparse: whether gradients of values are sparse; False.
        seed: of the initial values; 0.
        network: an `ExemplarTransformer` in place of the default network.
        writer: a `ValueWriter` in place of the default writer of exact mode.
    """

    mode: str
    width: int
    depth: int
    heads: int
    dropout: float
    value_width: int
    aggregation: str | Aggregation
    neighbours: int
    metric: str
    own_token_probability: float | None
    drop_input: float
    drop_exemplar: float
    sparse: bool
    seed: int
    network: ExemplarTransformer
    writer: ValueWriter


#: Defaults of the settings.
DEFAULTS: Settings = {
    "mode": "paper",
    "width": 64,
    "depth": 2,
    "heads": 4,
    "dropout": 0.0,
    "value_width": 128,
    "aggregation": "ensemble",
    "neighbours": 4,
    "metric": "cosine",
    "own_token_probability": None,
    "drop_input": 0.2,
    "drop_exemplar": 0.2,
    "sparse": False,
    "seed": 0,
}
#: Arguments of the factories that shape the default network alone; a custom network replaces them.
OF_NETWORK = ("channels", "patch", "tokens", "width", "depth", "heads", "dropout")


def patch_for(height: int, width: int) -> int:
    """Return the greatest patch that divides an image and fits four times into each side; 1 if there is none."""
    both = math.gcd(height, width)
    return max((p for p in range(1, both + 1) if both % p == 0 and p <= min(height, width) // 4), default=1)


def model_parts(
    tokens: type[ImageTokens | VectorTokens],
    inputs: dict[str, Any],
    *,
    task: Task,
    key_encoder: KeyEncoder,
    mode: str,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    value_width: int,
    aggregation: str | Aggregation,
    neighbours: int,
    metric: str,
    own_token_probability: float | None,
    drop_input: float,
    drop_exemplar: float,
    sparse: bool,
    seed: int,
    network: ExemplarTransformer | None = None,
    writer: ValueWriter | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the arguments of `KeyMemoryTransformer`; see `Settings`.

    Args:
        tokens: class of the tokens.
        inputs: arguments of `tokens`, without the width.
        task: kind of label that is predicted.
        key_encoder: from inputs to keys.
        mode: see `Settings`.
        width: see `Settings`.
        depth: see `Settings`.
        heads: see `Settings`.
        dropout: see `Settings`.
        value_width: see `Settings`.
        aggregation: see `Settings`.
        neighbours: see `Settings`.
        metric: see `Settings`.
        own_token_probability: see `Settings`.
        drop_input: see `Settings`.
        drop_exemplar: see `Settings`.
        sparse: see `Settings`.
        seed: see `Settings`.
        network: see `Settings`.
        writer: see `Settings`.
        device: of the model.
        dtype: of weights and memory.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a setting is out of range.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    exact = mode == "exact"
    check_positive(depth=depth, neighbours=neighbours)
    check_encoder(key_encoder)
    if isinstance(aggregation, str) and aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}; found {aggregation!r}")
    labels: dict[str, Any] = {"label_shape": task.label_shape, "label_dtype": task.label_dtype}
    if network is None:
        blocks = [TransformerBlock(width, heads, dropout=dropout, **factory) for _ in range(depth)]
        network = ExemplarTransformer(
            tokens=tokens(**inputs, width=width, **factory),
            blocks=blocks,
            value_width=value_width,
            outputs=task.outputs,
        )
    store = KeyStore(key_encoder.width, value_width, seed=seed, scale=0.0 if exact else 0.02, **labels, **factory)
    store.values.requires_grad_(not exact)
    if writer is None and exact:
        writer = ValueWriter(key_encoder.width, value_width, task, **factory)
    mixed = aggregation if isinstance(aggregation, nn.Module) else AGGREGATIONS[aggregation](neighbours).to(**factory)
    return {
        "key_encoder": key_encoder,
        "memory": KeyValueMemory(store, metric=metric, writer=writer),
        "network": network,
        "task": task,
        "mode": mode,
        "aggregation": mixed,
        "neighbours": neighbours,
        "own_token_probability": own_token_probability,
        "drop_input": drop_input,
        "drop_exemplar": drop_exemplar,
        "sparse": sparse,
    }


def feature_parts(
    task: Task,
    key_encoder: KeyEncoder,
    *,
    neighbours: int,
    temperature: float,
    shrinkage: float,
    metric: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the arguments of `KeyMemoryTransformer` for a model that forgets exactly and learns nothing.

    Arguments and errors are those of `KeyMemoryTransformer.for_features`.
    """
    check_encoder(key_encoder)
    labels: dict[str, Any] = {"label_shape": task.label_shape, "label_dtype": task.label_dtype}
    store = KeyStore(key_encoder.width, 1, scale=0.0, **labels, device=device, dtype=dtype)
    store.values.requires_grad_(False)
    features = UnitFeatures(key_encoder.width)
    votes: Readout = NeighbourVote(task, neighbours, temperature=temperature)
    # Until they are fitted: weights near those that were fitted to features of images and texts.
    if isinstance(task, Classification):
        discriminant = DiscriminantReadout(task, features, shrinkage=shrinkage)
        mixture = Mixture({"votes": votes, "discriminant": discriminant}, {"votes": 0.8, "discriminant": 0.2})
    else:
        mixture = Mixture({"votes": votes, "ridge": RidgeReadout(task, features, shrinkage=shrinkage)})
    return {
        "key_encoder": key_encoder,
        "memory": KeyValueMemory(store, metric=metric),
        "readout": mixture.to(device=device),
        "mode": "exact",
        "neighbours": neighbours,
    }

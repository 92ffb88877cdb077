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
from munkey.readout.exemplar import ExemplarReadout
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

__all__ = [
    "DEFAULTS",
    "OF_MODE",
    "OF_NETWORK",
    "Settings",
    "check_mode",
    "completed",
    "feature_parts",
    "model_parts",
    "patch_for",
]


class Settings(TypedDict, total=False):
    """Settings of the factories of `KeyMemoryTransformer`, besides shapes, task and encoder.

    Attributes:
        mode: 'exact' or 'paper'; 'exact' if not given.
        readout: 'mixture', of votes, a linear head on exact sums and the transformer, or 'transformer' alone; the
            mixture in exact mode, the transformer in paper mode.
        width: of the transformer; 64.
        depth: number of blocks; 2.
        heads: of the attention; 4.
        dropout: in the blocks, in training only; 0.
        value_width: dimensions of a value; 128, as in the paper.
        aggregation: 'attend', 'ensemble', 'softmax' or 'rank', or a module; 'attend' in exact mode, which reads all
            neighbours in one pass, 'ensemble' in paper mode.
        neighbours: number of rows that the transformer reads; 16 in exact mode, 4 in paper mode, as in the paper.
        metric: 'cosine' or 'dot'; 'cosine'.
        own_token_probability: see `ExemplarReadout`; 1 in paper mode, 0 in exact mode.
        stop_gradient: see `ExemplarReadout`; True.
        drop_input: share of the instances whose input is hidden in training; 0.2.
        drop_exemplar: share of the instances whose exemplar is hidden in training; 0.2.
        sparse: whether gradients of values are sparse; False.
        seed: of the initial values; 0.
        network: an `ExemplarTransformer` in place of the default network.
        writer: a `ValueWriter`, or True for the default one, which exact mode always has. In paper mode a writer gives
            an instance that is remembered after training a value at once; without a writer, such a value is noise until
            `munkey.fit_values` fits it. False.
    """

    mode: str
    readout: str | None
    width: int
    depth: int
    heads: int
    dropout: float
    value_width: int
    aggregation: str | Aggregation | None
    neighbours: int | None
    metric: str
    own_token_probability: float | None
    stop_gradient: bool
    drop_input: float
    drop_exemplar: float
    sparse: bool
    seed: int
    network: ExemplarTransformer
    writer: ValueWriter | bool


#: Defaults of the settings.
DEFAULTS: Settings = {
    "mode": "exact",
    "width": 64,
    "depth": 2,
    "heads": 4,
    "dropout": 0.0,
    "value_width": 128,
    "metric": "cosine",
    "stop_gradient": True,
    "drop_input": 0.2,
    "drop_exemplar": 0.2,
    "sparse": False,
    "seed": 0,
}
#: Defaults that depend on the mode.
OF_MODE: dict[str, Settings] = {
    "exact": {"readout": "mixture", "aggregation": "attend", "neighbours": 16, "own_token_probability": 0.0},
    "paper": {"readout": "transformer", "aggregation": "ensemble", "neighbours": 4, "own_token_probability": 1.0},
}
#: Arguments of the factories that shape the default network alone; a custom network replaces them.
OF_NETWORK = ("channels", "patch", "tokens", "width", "depth", "heads", "dropout")


def check_mode(mode: str) -> str:
    """Return the mode; raise ValueError if there is no such mode."""
    if mode not in OF_MODE:
        raise ValueError(f"mode must be 'exact' or 'paper', found {mode!r}")
    return mode


def completed(given: Settings) -> dict[str, Any]:
    """Return all settings, with defaults for those that are not given, or None.

    Raises:
        TypeError: if there is no such setting.
        ValueError: if there is no such mode.
    """
    if unknown := sorted(given.keys() - Settings.__annotations__.keys()):
        names = ", ".join(name for name in Settings.__annotations__ if name not in ("network", "writer"))
        raise TypeError(f"there are no settings {', '.join(unknown)}; there are {names}")
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    mode = check_mode(settings.get("mode", DEFAULTS["mode"]))
    return {**DEFAULTS, **OF_MODE[mode], **settings}


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
    readout: str,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    value_width: int,
    aggregation: str | Aggregation,
    neighbours: int,
    metric: str,
    own_token_probability: float,
    stop_gradient: bool,
    drop_input: float,
    drop_exemplar: float,
    sparse: bool,
    seed: int,
    network: ExemplarTransformer | None = None,
    writer: ValueWriter | bool = False,
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
        readout: see `Settings`.
        width: see `Settings`.
        depth: see `Settings`.
        heads: see `Settings`.
        dropout: see `Settings`.
        value_width: see `Settings`.
        aggregation: see `Settings`.
        neighbours: see `Settings`.
        metric: see `Settings`.
        own_token_probability: see `Settings`.
        stop_gradient: see `Settings`.
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
    if readout not in ("mixture", "transformer"):
        raise ValueError(f"readout must be 'mixture' or 'transformer', found {readout!r}")
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
    of_row = writer if isinstance(writer, ValueWriter) else None
    if of_row is None and (writer or exact):
        of_row = ValueWriter(key_encoder.width, value_width, task, **factory)
    mixed = aggregation if isinstance(aggregation, nn.Module) else AGGREGATIONS[aggregation](neighbours).to(**factory)
    transformer = ExemplarReadout(
        network,
        task=task,
        aggregation=mixed,
        neighbours=neighbours,
        own_token_probability=own_token_probability,
        drop_input=drop_input,
        drop_exemplar=drop_exemplar,
        stop_gradient=stop_gradient,
        sparse=sparse,
    )
    others: dict[str, Readout] = {"transformer": transformer}
    return {
        "key_encoder": key_encoder,
        "memory": KeyValueMemory(store, metric=metric, writer=of_row),
        "readout": mixed_with(others, task, key_encoder.width, device) if readout == "mixture" else transformer,
        "mode": mode,
    }


def mixed_with(
    others: dict[str, Readout], task: Task, width: int, device: torch.device | str | None, **settings: float
) -> Mixture:
    """Return a mixture of `closed_form` and other readouts, whose weight is 0 until the mixture is fitted."""
    closed, weights = closed_form(task, width, **settings)  # type: ignore[arg-type]
    return Mixture({**closed, **others}, {**weights, **dict.fromkeys(others, 0.0)}).to(device=device)


def closed_form(
    task: Task,
    width: int,
    *,
    neighbours: int = 32,
    temperature: float = 0.1,
    shrinkage: float = 0.6,
    balance: float = 0.0,
) -> tuple[dict[str, Readout], dict[str, float]]:
    """Return readouts without weights that are trained, and their weights in a mixture that was not fitted yet.

    Arguments and errors are those of `KeyMemoryTransformer.for_features`.
    """
    features = UnitFeatures(width)
    balance = balance if isinstance(task, Classification) else 0.0
    votes = NeighbourVote(task, neighbours, temperature=temperature, balance=balance)
    if isinstance(task, Classification):  # weights near those that were fitted to features of images and texts
        discriminant = DiscriminantReadout(task, features, shrinkage=shrinkage, balance=balance)
        return {"votes": votes, "discriminant": discriminant}, {"votes": 0.8, "discriminant": 0.2}
    return {"votes": votes, "ridge": RidgeReadout(task, features, shrinkage=shrinkage)}, {"votes": 0.5, "ridge": 0.5}


def feature_parts(
    task: Task,
    key_encoder: KeyEncoder,
    others: dict[str, Readout],
    *,
    neighbours: int,
    temperature: float,
    shrinkage: float,
    balance: float,
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
    settings = {"neighbours": neighbours, "temperature": temperature, "shrinkage": shrinkage, "balance": balance}
    return {
        "key_encoder": key_encoder,
        "memory": KeyValueMemory(store, metric=metric),
        "readout": mixed_with(others, task, key_encoder.width, device, **settings),
    }

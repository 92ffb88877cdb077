"""Good defaults for the parts of a `KeyMemoryTransformer`."""

from __future__ import annotations

import math
from typing import Any, Self, TypedDict, TypeVar, Unpack

import torch

from munkey.encoders.base import KeyEncoder
from munkey.memory import KeyValueMemory
from munkey.readout.aggregate import AGGREGATIONS
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.readout.transformer import ExemplarTransformer, TransformerBlock
from munkey.readout.writer import ValueWriter
from munkey.store.checks import check_width
from munkey.store.store import KeyStore

__all__ = ["Presets", "Settings", "assemble", "patch_for"]


class Settings(TypedDict, total=False):
    """What the factories of `KeyMemoryTransformer` take beyond the shapes.

    Attributes:
        mode: 'paper' or 'exact'; 'paper' if not given.
        width: of the transformer; 64.
        depth: number of its blocks; 2.
        heads: of its attention; 4.
        dropout: in its blocks, in training only; 0.
        value_width: numbers of a value; 128, as in the paper.
        aggregation: 'ensemble', 'softmax' or 'rank'; 'ensemble'.
        neighbours: how many are asked; 4, as in the paper.
        metric: 'cosine' or 'dot'; 'cosine'.
        own_token_probability: see `KeyMemoryTransformer`; 1 in paper mode.
        drop_input: share of the instances whose input is hidden in training; 0.2.
        drop_exemplar: share whose exemplar is hidden; 0.2.
        sparse: whether gradients of values are sparse; False.
        seed: of the first values; 0. Weights come from the global generator, as everywhere in PyTorch.
    """

    mode: str
    width: int
    depth: int
    heads: int
    dropout: float
    value_width: int
    aggregation: str
    neighbours: int
    metric: str
    own_token_probability: float | None
    drop_input: float
    drop_exemplar: float
    sparse: bool
    seed: int


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


Model = TypeVar("Model", bound="Presets")
_OF_MODEL = ("mode", "neighbours", "own_token_probability", "drop_input", "drop_exemplar", "sparse")


def patch_for(height: int, width: int) -> int:
    """The greatest patch that fills an image and fits four times into each side; 1 if there is none."""
    both = math.gcd(height, width)
    return max((p for p in range(1, both + 1) if both % p == 0 and p <= min(height, width) // 4), default=1)


def assemble(
    cls: type[Model],
    inputs: dict[str, Any],
    num_classes: int,
    key_encoder: KeyEncoder,
    given: Settings,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Model:
    """A model of these settings, for images (`channels`, `size`, `patch`) or vectors (`features`, `count`).

    Raises:
        TypeError: if a setting is unknown, or a number is not whole.
        ValueError: if a setting is out of range.
    """
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise TypeError(f"there are no settings {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    settings: Settings = {**DEFAULTS, **given}
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    width, exact = settings["width"], settings["mode"] == "exact"
    check_width(depth=settings["depth"], num_classes=num_classes, neighbours=settings["neighbours"])
    if settings["aggregation"] not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}; found {settings['aggregation']!r}")
    tokens = (ImageTokens if "channels" in inputs else VectorTokens)(**inputs, width=width, **factory)
    scale = 0.0 if exact else 0.02
    store = KeyStore(key_encoder.width, settings["value_width"], seed=settings["seed"], scale=scale, **factory)
    store.values.requires_grad_(not exact)
    writer = ValueWriter(key_encoder.width, settings["value_width"], num_classes, **factory) if exact else None
    blocks = [
        TransformerBlock(width, settings["heads"], dropout=settings["dropout"], **factory)
        for _ in range(settings["depth"])
    ]
    parts: dict[str, Any] = {
        "key_encoder": key_encoder,
        "memory": KeyValueMemory(store, metric=settings["metric"], writer=writer),
        "network": ExemplarTransformer(
            tokens=tokens, blocks=blocks, value_width=settings["value_width"], num_classes=num_classes
        ),
        "aggregation": AGGREGATIONS[settings["aggregation"]](settings["neighbours"]).to(**factory),
    }
    parts |= {name: settings[name] for name in _OF_MODEL}  # type: ignore[literal-required]
    model = cls(**parts)
    model.config = {"inputs": inputs, "num_classes": num_classes, **settings}
    return model


class Presets:
    """Factories of a `KeyMemoryTransformer`."""

    config: dict[str, Any] | None

    @classmethod
    def for_images(
        cls,
        num_classes: int,
        channels: int,
        size: int | tuple[int, int],
        key_encoder: KeyEncoder,
        *,
        patch: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """A small model for images.

        Args:
            num_classes: `n`.
            channels: 1 for grey, 3 for colour.
            size: height and width, or one number for both.
            key_encoder: from images to keys.
            patch: height and width of a patch, must divide the size; about a quarter of the size if not given.
            device: where the model lives.
            dtype: of weights and memory.
            **settings: see `munkey.presets.Settings`.

        Raises:
            TypeError: if a setting is unknown, or a number is not whole.
            ValueError: if a setting is out of range, or exact mode would not be exact.
        """
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {
            "channels": channels,
            "size": [height, width],
            "patch": patch_for(height, width) if patch is None else patch,
        }
        return assemble(cls, inputs, num_classes, key_encoder, settings, device, dtype)

    @classmethod
    def for_vectors(
        cls,
        num_classes: int,
        features: int,
        key_encoder: KeyEncoder,
        *,
        tokens: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """A small model for vectors: rows of a table, features of texts.

        Args:
            num_classes: `n`.
            features: numbers of a vector.
            key_encoder: from vectors to keys.
            tokens: how many tokens are made of a vector.
            device: where the model lives.
            dtype: of weights and memory.
            **settings: see `munkey.presets.Settings`.

        Raises:
            TypeError: if a setting is unknown, or a number is not whole.
            ValueError: if a setting is out of range, or exact mode would not be exact.
        """
        inputs = {"features": features, "count": tokens}
        return assemble(cls, inputs, num_classes, key_encoder, settings, device, dtype)

"""What the classifier refuses, and that nothing is lost then."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from classifiers import CLASSES, SIZE, encoder, filled, images, labels, model
from torch import nn

from munkey import (
    Classification,
    ExemplarTransformer,
    KeyMemoryTransformer,
    KeyStore,
    KeyValueMemory,
    ModuleEncoder,
    Projection,
    ValueWriter,
)
from munkey.readout import ExemplarReadout
from munkey.readout.tokens import VectorTokens
from munkey.readout.transformer import TransformerBlock


def parts(**changes: object) -> dict[str, object]:
    """Parts of a model, some of them changed; what belongs to the readout of a transformer is put there."""
    built = model()
    own = {name: changes.pop(name) for name in list(changes) if name not in ("key_encoder", "memory", "mode")}
    readout = partial(
        ExemplarReadout, **{"network": built.exemplar_readout.network, "own_token_probability": 0.0, **own}
    )  # type: ignore[arg-type]
    return {"key_encoder": built.key_encoder, "memory": built.memory, "mode": "paper", "readout": readout, **changes}


def network(**changes: int) -> ExemplarTransformer:
    tokens = VectorTokens(3, 2, 8)
    widths = {"value_width": 4, "outputs": 3, **changes}
    return ExemplarTransformer(tokens=tokens, blocks=[TransformerBlock(8, 2)], **widths)


def exact_parts(
    scale: float = 0.0, trained: bool = False, fitted_on: str = "other data", **changes: object
) -> dict[str, object]:
    store = KeyStore(5, 4, scale=scale)
    store.values.requires_grad_(trained)
    module = ModuleEncoder(nn.Flatten(), 5, fitted_on=fitted_on)
    memory = KeyValueMemory(store, writer=ValueWriter(5, 4, 3))
    return parts(mode="exact", memory=memory, key_encoder=module, **changes)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (parts(network=network(value_width=7)), ValueError, "the network reads values of width 7, the memory has 4"),
        (parts(neighbours=1.5), TypeError, "neighbours must be a whole number, found 1.5"),
        (parts(key_encoder=Projection.random((5,), 6)), ValueError, "gives keys of width 6, the memory has 5"),
        (parts(mode="both"), ValueError, "mode must be 'exact' or 'paper', found 'both'"),
        (parts(task=Classification(4)), ValueError, "the task Classification(4) needs a network of 4 outputs, found 3"),
        (parts(mode="exact"), ValueError, "mode='exact' needs KeyValueMemory(writer=ValueWriter"),
        (
            exact_parts(scale=0.1),
            ValueError,
            "in exact mode values are written, not learned; make the store with scale=",
        ),
        (exact_parts(trained=True), ValueError, "in exact mode values are written, not learned"),
        (exact_parts(fitted_on="forgettable"), ValueError, "in exact mode the encoder must not have seen what can be"),
        (exact_parts(own_token_probability=0.5), ValueError, "own_token_probability must be 0 in exact mode"),
        (parts(own_token_probability=1.5), ValueError, "own_token_probability must be between 0 and 1, found 1.5"),
        (parts(drop_input=-0.1), ValueError, "drop_input must be between 0 and 1, found -0.1"),
        (parts(drop_input=0.6, drop_exemplar=0.5), ValueError, "must add up to 1 at most, found 0.6 and 0.5"),
    ],
)
def test_bad_parts(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KeyMemoryTransformer(**{**settings, "readout": settings["readout"]()})  # type: ignore[arg-type,operator]


def test_bad_widths_of_a_network() -> None:
    with pytest.raises(ValueError, match="outputs must be at least 1, found 0"):
        network(outputs=0)
    with pytest.raises(TypeError, match=re.escape("value_width must be a whole number, found 1.5")):
        network(value_width=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"aggregation": "mean"},
            ValueError,
            "aggregation must be one of attend, ensemble, softmax, rank; found 'mean'",
        ),
        ({"wide": 3}, TypeError, "there are no settings wide; there are mode, readout, width"),
        ({"readout": "votes"}, ValueError, "readout must be 'mixture' or 'transformer', found 'votes'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, found 0"),
        ({"patch": 0}, ValueError, "patch must be at least 1, found 0"),
        ({"patch": 5}, ValueError, "patches must fill the image; 5 does not divide 8 and 6"),
        ({"width": 8, "heads": 3}, ValueError, "heads"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KeyMemoryTransformer.for_images(classes=CLASSES, channels=1, size=SIZE, key_encoder=encoder(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(images(2)[:, :, :7]), ValueError, "expected images of shape (batch, 1, 8, 6), found (2, 1, 7, 6)"),
        (lambda m: m(images(2) * 255), ValueError, "images must lie in [0.0, 1.0], found values from"),
        (lambda m: m(images(2).tolist()), TypeError, "expected images as a tensor, found list"),
        (lambda m: m.remember([50], images(1) + torch.nan), ValueError, "images must be finite"),
        (lambda m: m.remember([0], images(1)), ValueError, "ids [0] are in the store already"),
        (lambda m: m.loss(images(1), labels(1), ids=[99]), KeyError, "ids [99] are not in the store"),
        (lambda m: m.loss(images(2), labels(2), ids=[1]), ValueError, "expected one id for each of 2 inputs, found 1"),
        (lambda m: m.loss(images(0), labels(0), ids=[]), ValueError, "a loss is the mean over instances; found none"),
        (lambda m: m.loss(images(1), torch.tensor([3]), ids=[1]), ValueError, "expected labels below 3, found 3"),
        (lambda m: m.remember([50], images(1), torch.tensor([7])), ValueError, "expected labels below 3, found 7"),
        (lambda m: m.loss(images(1), torch.tensor([-100]), ids=[1]), ValueError, "a label is at least 0, found -100"),
        (lambda m: m.remember([50], images(1), torch.tensor([-1])), ValueError, "a label is at least 0, found -1"),
        (lambda m: m.loss(images(2), labels(1), ids=[1, 2]), ValueError, "expected one label for each of 2 inputs"),
        (lambda m: m.remember([50, 51], images(2), labels(1)), ValueError, "expected one label for each of 2 inputs"),
        (
            lambda m: m.loss(images(1), torch.rand(1, 3), ids=[1]),
            TypeError,
            "labels must be int64, found torch.float32; number",
        ),
        (lambda m: m.remember([50], images(1), ["a"]), TypeError, "expected labels as numbers, found list"),
        (lambda m: m.loss(images(2), labels(2), ids={1, 2}), TypeError, "ids must come in the order of the inputs"),
        (lambda m: m.remember({50, 51}, images(2)), TypeError, "ids must come in the order of the inputs, found a set"),
        (lambda m: m.remember([50], images(2)), ValueError, "expected one id for each of 2 inputs, found 1"),
        (
            lambda m: m(images(2), exclude_ids={1: 0, 2: 0}),
            TypeError,
            "in the order of the inputs, found a dict, which",
        ),
        (lambda m: m.forget(torch.arange(12) > 5), TypeError, "found torch.bool, a mask; give the ids that it picks"),
        (lambda m: m.forget(list(torch.arange(12) > 5)), TypeError, "found tensor(False); of a mask, give the ids it"),
        (lambda m: m.forget([99]), KeyError, "ids [99] are not in the store; forget can pass over them with missing="),
    ],
)
def test_bad_calls_lose_nothing(call: object, error: type[Exception], message: str) -> None:
    built = filled()
    before = built.memory.store.digest()
    with pytest.raises(error, match=re.escape(message)):
        call(built)  # type: ignore[operator]
    assert built.memory.store.digest() == before

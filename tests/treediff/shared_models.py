"""One model of each class that can be shared, with weights away from where they start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import GROWN, PRUNED, build
from pairs import pair, small
from test_density import filled_density
from torch import nn
from worlds import seeded

from treediff.metrics import FeatureClassifier


def with_density() -> Any:  # noqa: ANN401
    model = pair(PRUNED)
    model.density = filled_density(model.tree_vae)
    return model


# Any, as a model is both a module and something to share.
MODELS: dict[str, Callable[[], Any]] = {
    "tree": lambda: build(GROWN, "maps"),
    "tree of vectors": lambda: build(PRUNED),
    "half precision": lambda: build(GROWN, "conv", dtype=torch.bfloat16),
    "second stage": lambda: small(PRUNED),
    "both stages": lambda: pair(GROWN),
    "both stages and a density": with_density,
    "classifier": lambda: FeatureClassifier(8, 1, 3, features=4, width=8, generator=seeded()),
}


def check_same(found: nn.Module, model: nn.Module) -> None:
    """Every tensor, bit by bit."""
    assert type(found) is type(model)
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys() and len(ours)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype and theirs[name].shape == value.shape
        one, two = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (theirs[name], value))
        assert torch.equal(one, two), name

"""Conditioners with weights away from where they start, and conditions to tell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import GROWN
from pairs import conditions, filled, half_known
from worlds import seeded

from treediff import TreeCondition, TreeTopology
from treediff.diffusion import (
    Conditioner,
    Conditioners,
    LatentEmbedding,
    LeafWeightsEmbedding,
    NodeEmbedding,
    PathEncoder,
    PathTokens,
    ReconstructionConcat,
)

E, LATENT, SIZE = 5, (2, 1, 2), (2, 3, 4)

MAKERS: dict[str, Callable[..., Conditioner]] = {
    "node": lambda tree, **f: NodeEmbedding(tree, E, **f),
    "weights": lambda tree, **f: LeafWeightsEmbedding(tree, E, **f),
    "image": lambda _, **f: ReconstructionConcat(2, (3, 4), **f),
    "image with its noise level": lambda _, **f: ReconstructionConcat(2, (3, 4), E, **f),
    "latent": lambda tree, **f: LatentEmbedding(tree, LATENT, E, **f),
    "path": lambda tree, **f: PathEncoder(tree, LATENT, E, **f),
    "tokens": lambda tree, **f: PathTokens(tree, LATENT, E, **f),
}
MAKERS["all"] = lambda tree, **f: Conditioners(*(MAKERS[name](tree, **f) for name in MAKERS if name != "all"))
each = pytest.mark.parametrize("name", MAKERS)


def make(name: str, tree: TreeTopology = GROWN, seed: int = 0, **factory: Any) -> Conditioner:  # noqa: ANN401
    with torch.random.fork_rng(devices=[]):
        module = MAKERS[name](tree, **{"dtype": torch.float64, **factory})
    filled(module, seed)
    return module


def told(tree: TreeTopology = GROWN, n: int = 8, seed: int = 2, *, level: bool = True) -> TreeCondition:
    """Any nodes; details of every other row."""
    full = conditions(tree, n, seed, latent=LATENT, size=SIZE, dtype=torch.float64, anywhere=True)
    noise_level = torch.rand(n, generator=seeded(seed)) if level else None
    return replace(half_known(full), noise_level=noise_level)

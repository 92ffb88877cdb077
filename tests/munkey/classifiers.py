"""Small models to test."""

from __future__ import annotations

import torch
from stores import seeded
from torch import Tensor

from munkey import KeyMemoryTransformer, Projection

CLASSES, SIZE = 3, (8, 6)


def encoder() -> Projection:
    return Projection.random((1, *SIZE), 5)


def model(seed: int = 0, **settings: object) -> KeyMemoryTransformer:
    """A transformer alone, in paper mode with own values alone unless settings say something else."""
    defaults: dict[str, object] = {"width": 8, "heads": 2, "value_width": 4, "mode": "paper", "readout": "transformer"}
    if settings.get("mode", "paper") == "paper":
        defaults["own_token_probability"] = 1.0
    built = KeyMemoryTransformer.for_images(
        classes=CLASSES,
        channels=1,
        size=SIZE,
        key_encoder=encoder(),
        generator=seeded(seed),
        **{**defaults, **settings},  # type: ignore[arg-type]
    )
    built.memory.store.secret = b"for tests"
    torch.nn.init.constant_(built.memory.null, 0.3)
    return built.eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, *SIZE, generator=seeded(seed))


def labels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=seeded(seed))


def filled(count: int = 12, **settings: object) -> KeyMemoryTransformer:
    built = model(**settings)
    built.remember(range(count), images(count), labels(count))
    return built


def train(built: KeyMemoryTransformer, ids: list[int], steps: int = 3) -> list[torch.optim.Optimizer]:
    """A plain loop; `images` and `labels` of as many as the greatest id asks for."""
    x, y = images(max(ids) + 1), labels(max(ids) + 1)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    built.attach(optimizer) if built.memory.store.values.requires_grad else None
    for step in range(steps):
        optimizer.zero_grad()
        built.loss(x[ids], y[ids], ids=ids, generator=seeded(step)).backward()
        optimizer.step()
    return [optimizer]

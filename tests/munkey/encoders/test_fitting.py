"""Encoders that are fitted to what stays: keys of a class gather, or those of changed copies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import seeded
from torch import Tensor
from torch.nn import functional as F

from munkey import ConvEncoder, Identity, KeyMemoryTransformer, PerceptronEncoder, fit_encoder
from treediff.core.io import read_header

COUNT = 384


def rings(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes that no linear map tells apart: inner and outer points, in columns of other units."""
    generator = seeded(seed)
    y = torch.arange(COUNT) % 2
    x = F.normalize(torch.randn(COUNT, 3, generator=generator), dim=1) * (1 + y[:, None])
    return x * torch.tensor([1.0, 100.0, 0.01]) + 5, y


def nearest(encoder: PerceptronEncoder, x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    keys, queries = (F.normalize(encoder(part), dim=1) for part in (x, test))
    return y[(queries @ keys.T).argmax(1)]


def encoder(x: Tensor, fitted_on: str = "permanent split") -> PerceptronEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PerceptronEncoder.standardising(x, 8, fitted_on=fitted_on, hidden=32)


def test_keys_of_a_class_gather() -> None:
    (x, y), (test, labels) = rings(), rings(1)
    made = encoder(x)
    before = float((nearest(made, x, y, test) == labels).double().mean())
    assert fit_encoder(made, x, y, epochs=40, batch_size=64) is made
    after = float((nearest(made, x, y, test) == labels).double().mean())
    assert after > 0.97 and after > before
    assert not any(weight.requires_grad for weight in made.parameters())


def test_copies_of_an_input_have_similar_keys() -> None:
    x, _ = rings()

    def augment(batch: Tensor, *, generator: torch.Generator) -> Tensor:  # the second column tells nothing
        return batch + torch.tensor([0.0, 300.0, 0.0]) * torch.randn(batch.shape, generator=generator)

    made = encoder(x)

    def alike() -> float:
        one, other = (F.normalize(made(augment(x, generator=seeded(s))), dim=1) for s in (5, 6))
        scores = one @ other.T
        return float((scores.argmax(1) == torch.arange(COUNT)).double().mean())

    before = alike()
    fit_encoder(made, x, augment=augment, epochs=20, batch_size=64, temperature=0.2)
    assert alike() > 1.4 * before


def test_the_same_seed_gives_the_same_encoder_and_nothing_else_is_drawn() -> None:
    x, y = rings()
    state, prints = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        prints.append(fit_encoder(encoder(x), x, y, epochs=1, batch_size=64, generator=seeded(seed)).fingerprint())
    assert prints[0] == prints[1] != prints[2] and torch.equal(torch.get_rng_state(), state)


def test_images_and_progress() -> None:
    seen: list[int] = []

    def progress(steps: range) -> Any:  # noqa: ANN401
        for step in steps:
            seen.append(step)
            yield step

    conv = ConvEncoder(1, 8, "permanent split", hidden=8, stages=2)
    before = conv.fingerprint()
    fit_encoder(conv, torch.rand(40, 1, 8, 8), torch.arange(40) % 3, epochs=2, batch_size=16, progress=progress)
    assert seen == list(range(4)) and conv.fingerprint() != before


def test_a_model_with_a_perceptron_is_one_file(tmp_path: Path) -> None:
    x, y = rings()
    made = fit_encoder(encoder(x), x, y, epochs=2, batch_size=64)
    built = KeyMemoryTransformer.for_features(features=3, classes=2, key_encoder=made)
    built.remember(range(20), x[:20], y[:20])
    built.save(tmp_path / "model")
    again = KeyMemoryTransformer.load(tmp_path / "model")
    assert torch.equal(again(x[20:30]), built(x[20:30]))
    assert read_header(tmp_path / "model", "KeyMemoryTransformer")["key_encoder"]["class"] == "PerceptronEncoder"


def test_a_constant_column_is_left_alone() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    made = PerceptronEncoder.standardising(x, 4, fitted_on="other data")
    assert made.mean.tolist() == [2, 2] and made.spread.tolist() == [1, 1]


X = torch.rand(8, 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": torch.zeros(7).long()}, ValueError, "expected one label for each of 8 inputs, found (7,)"),
        ({"labels": torch.zeros(8)}, TypeError, "labels must be whole numbers, found torch.float32"),
        ({}, ValueError, "without labels, keys are fitted to changed copies of inputs; pass augment=, or labels"),
        ({"batch_size": 9}, ValueError, "expected at least one batch of 9 inputs, found 8; use a smaller batch_size"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, found 0"),
        ({"x": torch.rand(8, 4)}, ValueError, "expected vectors of shape (batch, 3), found (8, 4)"),
        (
            {"encoder": Identity(3, fitted_on="nothing")},
            ValueError,
            "the encoder says fitted_on='nothing'; make it with",
        ),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit_encoder(**{"encoder": encoder(X), "x": X, "batch_size": 4, **given})


def test_bad_inputs_of_encoders() -> None:
    with pytest.raises(ValueError, match=re.escape("expected vectors (N, inputs) with N above 0, found (0, 3)")):
        PerceptronEncoder.standardising(torch.rand(0, 3), 4, fitted_on="other data")
    with pytest.raises(ValueError, match="hidden must be at least 1, found 0"):
        PerceptronEncoder(3, 4, fitted_on="other data", hidden=0)
    with pytest.raises(ValueError, match=re.escape("expected images (B, 3, H, W), found (2, 1, 8, 8)")):
        fit_encoder(ConvEncoder(3, 8, "other data"), torch.rand(2, 1, 8, 8), torch.zeros(2).long(), batch_size=2)

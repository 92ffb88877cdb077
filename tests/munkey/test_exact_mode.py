"""Exact mode: forgetting leaves what never seeing leaves, bit by bit."""

from __future__ import annotations

import pytest
import torch
from classifiers import CLASSES, SIZE, images, labels, model, train
from torch import Tensor, nn

from munkey import KeyMemoryTransformer, ModuleEncoder


def test_in_exact_mode_a_model_that_forgot_is_one_that_never_saw() -> None:
    def trained() -> KeyMemoryTransformer:
        built = model(mode="exact")
        built.remember(range(8), images(12)[:8], labels(12)[:8], permanent=True)
        train(built, list(range(8)))
        return built.eval()

    x, y = images(12), labels(12)
    one, other = trained(), trained()
    one.remember([10, 8, 9], x[[10, 8, 9]], y[[10, 8, 9]])
    one.forget([8])
    one.remember([11], x[[11]], y[[11]])
    one.forget([10])
    other.remember([9], x[[9]], y[[9]])
    other.remember([11], x[[11]], y[[11]])
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    fresh = images(9, seed=4)
    assert torch.equal(one(fresh), other(fresh)) and not torch.equal(one(fresh), trained()(fresh))


def test_exact_mode_goes_on_training_after_it_forgot() -> None:
    x, y, found = images(12), labels(12), []
    for extra in (False, True):
        built = model(mode="exact")
        if extra:
            built.remember([11], x[[11]], y[[11]])
        built.remember(range(8), x[:8], y[:8], permanent=True)
        if extra:
            built.forget([11])
        train(built, list(range(8)))
        if extra:
            built.remember([10], x[[10]], y[[10]])
            built.forget([10])
        train(built, list(range(8)))
        found.append(built.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_exact_mode_refuses() -> None:
    built = model(mode="exact")
    with pytest.raises(ValueError, match="in exact mode a value is written from key and label; pass labels"):
        built.remember([1], images(1))
    built.remember([1, 2], images(2), labels(2), permanent=True)
    built.loss(images(2), labels(2), ids=[1, 2])
    built.remember([3], images(1, seed=9), labels(1))
    built.train()
    with pytest.raises(ValueError, match="but the memory holds 1 rows that can be forgotten"):
        built(images(2))
    with torch.no_grad():
        built(images(2))
    built.eval()
    with pytest.raises(
        ValueError, match="but the memory holds 1 rows that can be forgotten; train first, on instances"
    ):
        built.loss(images(2), labels(2), ids=[1, 2])
    before = built.memory.store.digest()
    with pytest.raises(ValueError, match=r"ids \[2\] are permanent: weights were trained on these"):
        built.forget([3, 2])
    assert built.memory.store.digest() == before
    built.forget([3])
    built.loss(images(2), labels(2), ids=[1, 2])


class Centred(nn.Module):
    """Takes the mean of all it has seen from each input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(48))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.flatten(1).sum(0)
        self.count += len(x)
        return x.flatten(1) - self.total / self.count


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_an_encoder_that_would_keep_forgotten_inputs_is_refused(mode: str) -> None:
    encoder = ModuleEncoder(Centred(), 48, fitted_on="other data")
    built = KeyMemoryTransformer.for_images(
        classes=CLASSES, channels=1, size=SIZE, key_encoder=encoder, mode=mode, width=8, heads=2
    )
    before = encoder.fingerprint()
    with pytest.raises(
        ValueError, match=r"'module\.(count|total)' of the encoder changed while it ran, expected one th"
    ):
        built.remember([1], images(1), labels(1))
    assert encoder.fingerprint() == before and not len(built.memory.store)

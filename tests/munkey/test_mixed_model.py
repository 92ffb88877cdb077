"""A transformer as one of several readouts: trained on what stays, and forgotten to the bit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import CLASSES, SIZE, images, labels, model, train
from stores import seeded
from torch import Tensor, nn

from munkey import (
    Classification,
    Identity,
    KeyMemoryTransformer,
    KeyStore,
    KeyValueMemory,
    Projection,
    Regression,
    Retrieved,
    pathway_accuracies,
)
from munkey.readout import ExemplarReadout, Mixture, ModuleReadout, Query
from munkey.readout.mixture import fitted_weights


def trained(secret: bytes = b"for tests") -> KeyMemoryTransformer:
    """Trained on 8 permanent instances; the mixture is fitted to 8 others."""
    built = model(mode="exact", readout="mixture")
    built.memory.store.secret = secret
    built.remember(range(8), images(16)[:8], labels(16)[:8], permanent=True)
    train(built, list(range(8)))
    built.remember(range(8, 16), images(16)[8:], labels(16)[8:], permanent=True)
    built.fit_readout(images(16)[8:], labels(16)[8:], ids=range(8, 16))
    built.readout.set_weights({"votes": 0.5, "discriminant": 0.2, "transformer": 0.4})  # type: ignore[operator]
    return built.eval()


def test_a_mixture_with_a_transformer_that_forgot_is_one_that_never_saw(tmp_path: Path) -> None:
    x, y = images(30), labels(30)
    one, other = trained(), trained()
    one.remember(range(16, 30), x[16:], y[16:])
    one(images(5, seed=3))
    one.forget([17, 20, 29])
    kept = [i for i in range(28, 15, -1) if i not in (17, 20)]
    other.remember(kept, x[kept], y[kept])
    fresh, alone = images(9, seed=4), trained()
    with torch.no_grad():
        assert torch.equal(one(fresh), other(fresh)) and not torch.equal(one(fresh), alone(fresh))
    assert one.memory.store.digest() == other.memory.store.digest()
    for name, built in (("one", one), ("other", other)):
        built.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    again = KeyMemoryTransformer.load(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(again(fresh), one(fresh)) and again.config == one.config


def test_every_part_counts_and_pathways_are_those_of_the_transformer() -> None:
    built, x = trained(), images(7, seed=3)
    assert isinstance(built.readout, Mixture)
    with torch.no_grad():
        query = Query(built.memory, x, built.key_encoder(x), 32)
        expected = torch.tensordot(built.readout.weights.float(), built.readout.outputs(query), 1)
        torch.testing.assert_close(built(x), expected)
        reader = built.exemplar_readout
        for switched in ({"use_input": False}, {"use_memory": False}):
            alone = reader(Query(built.memory, x, built.key_encoder(x), 32, **switched))
            assert torch.equal(built(x, **switched), alone)
    assert not torch.isnan(torch.tensor(pathway_accuracies(built, x, labels(7)).memory))


def test_a_mixture_that_was_not_fitted_does_not_hear_the_transformer() -> None:
    built = model(mode="exact", readout="mixture")
    built.remember(range(8), images(8), labels(8))
    assert isinstance(built.readout, Mixture) and float(built.readout.weights[-1]) == 0
    with torch.no_grad():
        before = built(images(3, seed=2))
        nn.init.normal_(built.exemplar_readout.network.head.weight)
        assert torch.equal(built(images(3, seed=2)), before)


def network(fitted_on: str = "permanent split") -> ModuleReadout:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ModuleReadout(Classification(3), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), fitted_on=fitted_on)


def by_rule(x: Tensor) -> Tensor:
    return x[:, :3].argmax(1)


def test_a_network_of_ones_own_joins_the_mixture_and_its_weight_is_what_it_is_worth(tmp_path: Path) -> None:
    x, noise = torch.randn(120, 4, generator=seeded()), torch.randint(3, (120,), generator=seeded(1))
    for right in (True, False):
        part = network()
        nn.init.eye_(part.module[1].weight)  # type: ignore[index]
        built = KeyMemoryTransformer.for_features(features=4, classes=3, readouts={"network": part})
        y = by_rule(x) if right else noise
        built.remember(range(60), x[:60], y[:60], permanent=True)
        before = built(x[60:])
        built.remember(range(60, 120), x[60:], y[60:], permanent=True)
        weights = built.fit_readout(x[60:], y[60:], ids=range(60, 120)).weights
        assert (float(weights[2]) > 0.5) == right
        if right:
            built.save(tmp_path / "model")
            again = KeyMemoryTransformer.load(tmp_path / "model", readouts={"network": network()})
            assert torch.equal(again(x), built(x)) and not torch.equal(before, built(x[60:]))
            with pytest.raises(ValueError, match="readouts"):
                KeyMemoryTransformer.load(tmp_path / "model")


def test_of_a_class_that_it_does_not_know_a_network_has_no_opinion() -> None:
    part = ModuleReadout(Classification(3), nn.Linear(4, 3), fitted_on="other data", known=[0, 2])
    with torch.no_grad():
        part.module.weight.copy_(torch.tensor([[3.0, 0, 0, 0], [9.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        part.module.bias.zero_()
    built = KeyMemoryTransformer(
        key_encoder=Identity(4), memory=KeyValueMemory(KeyStore(4, 1)), readout=part, mode="paper"
    )
    assert built(torch.eye(4)[:1]).tolist() == [[3, 3, 1]] and built(-torch.eye(4)[:1]).tolist() == [[-3, -1, -1]]
    with pytest.raises(ValueError, match=re.escape("known classes must be from 0 to 2, found [0, 3]")):
        ModuleReadout(Classification(3), nn.Linear(4, 3), fitted_on="other data", known=[0, 3])
    with pytest.raises(TypeError, match=re.escape("known= names classes, found Regression(3); leave it out")):
        ModuleReadout(Regression(3), nn.Linear(4, 3), fitted_on="other data", known=[0])


def test_a_network_stays_in_eval_mode_and_frozen() -> None:
    part = network().train()
    assert not part.module.training and not any(weight.requires_grad for weight in part.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match="fitted_on must be one of nothing, other data, permanent split, forgettable; fo"
    ):
        network("mine")
    with pytest.raises(
        ValueError, match="a module must not have been trained on what can be forgotten; train it on the"
    ):
        KeyMemoryTransformer.for_features(features=4, classes=3, readouts={"network": network("forgettable")})
    wrong = ModuleReadout(Classification(3), nn.Linear(4, 2), fitted_on="other data")
    built = KeyMemoryTransformer(
        key_encoder=Identity(4), memory=KeyValueMemory(KeyStore(4, 1)), readout=wrong, mode="paper"
    )
    with pytest.raises(ValueError, match=re.escape("expected outputs of shape (2, 3) from the module, found (2, 2)")):
        built(torch.ones(2, 4))
    one = model()
    two = Mixture({name: ExemplarReadout(one.exemplar_readout.network) for name in ("a", "b")})
    with pytest.raises(ValueError, match="values belong to one transformer, found 2 readouts with a transformer"):
        KeyMemoryTransformer(key_encoder=one.key_encoder, memory=one.memory, readout=two, mode="paper")


def test_a_transformer_has_no_opinion_on_classes_without_a_permanent_instance(tmp_path: Path) -> None:
    built, fresh, new = model(mode="exact", readout="mixture"), images(6, seed=3), CLASSES - 1
    y = labels(16) % new
    built.remember(range(16), images(16), y, permanent=True)
    built.remember(range(50, 56), fresh, torch.full((6,), new))
    reader = built.exemplar_readout
    assert reader.known.all()
    built.fit_readout(images(16), y, ids=range(16))
    assert reader.known.tolist() == [True] * new + [False], "what can be forgotten decides nothing"
    with torch.no_grad():
        outputs = reader(Query(built.memory, fresh, built.key_encoder(fresh), 16))
        assert torch.equal(outputs[:, new], outputs[:, :new].amax(1))
        built.readout.set_weights({"votes": 1.0, "discriminant": 0.0, "transformer": 1.0})  # type: ignore[operator]
        assert (built(fresh).argmax(1) == new).all()
    built.save(tmp_path / "model")
    assert torch.equal(KeyMemoryTransformer.load(tmp_path / "model").exemplar_readout.known, reader.known)


class Reversed(nn.Module):
    """An aggregation that makes the worst of a neighbour."""

    def forward(self, found: Retrieved, outputs: Callable[..., Tensor], average: object) -> Tensor:
        return -outputs(found.tokens[:, :1]).squeeze(1)


def test_a_fit_says_if_the_memory_makes_predictions_worse() -> None:
    """The upper half tells the label, keys are of the last pixels, which tell nothing."""
    x, y = images(60), torch.arange(60) % 2
    x[:, :, :4] = y[:, None, None, None]
    noise = Projection(torch.zeros(48), torch.eye(48)[:, -5:], fitted_on="nothing")
    built = KeyMemoryTransformer.for_images(size=SIZE, classes=2, key_encoder=noise, width=16, value_width=8)
    built.remember(range(40), x[:40], y[:40], permanent=True)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
    for step in range(50):
        optimizer.zero_grad()
        built.loss(x[:40], y[:40], ids=range(40), generator=seeded(step)).backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.fit_readout(x[40:], y[40:])
    built.exemplar_readout.aggregation = Reversed()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="the input alone predicts better, with a mean loss of") as found:
        built.fit_readout(x[40:], y[40:])
    assert found[0].filename == __file__


def test_outputs_of_a_part_may_come_from_elsewhere() -> None:
    """As those of networks, each of which learned other folds."""
    built, x, y = trained(), images(30, seed=9), labels(30, seed=9)
    assert isinstance(built.readout, Mixture)
    unsure = 2.0 * torch.nn.functional.one_hot(torch.where(torch.arange(30) % 4 > 0, y, (y + 1) % CLASSES), CLASSES)
    with torch.no_grad():
        outputs = built.readout.outputs(Query(built.memory, x, built.key_encoder(x), 32))
    own = built.fit_readout(x, y).weights.clone()
    found = built.fit_readout(x, y, outputs={"transformer": unsure}).weights
    outputs[2] = unsure
    torch.testing.assert_close(found, fitted_weights(built.task, outputs, y))
    assert float(found[2]) > 0.1 and not torch.equal(own, found)
    message = re.escape("outputs= takes outputs of shape (8, 3) of votes, discriminant, transformer; found (8, ")
    for wrong in ({"network": unsure[:8]}, {"votes": unsure[:8, :1]}):
        with pytest.raises(ValueError, match=message):
            built.fit_readout(images(16)[8:], labels(16)[8:], ids=range(8, 16), outputs=wrong)


def test_a_memory_map_is_remembered_as_the_tensor_of_its_images(tmp_path: Path) -> None:
    pixels = torch.randint(256, (2100, *SIZE), dtype=torch.uint8, generator=seeded(8)).numpy()
    np.save(tmp_path / "images.npy", pixels)
    y = torch.arange(2100) % CLASSES
    one, other = model(mode="exact", readout="mixture"), model(mode="exact", readout="mixture")
    one.remember(range(2100), np.load(tmp_path / "images.npy", mmap_mode="r"), y)
    other.remember(range(2100), torch.from_numpy(pixels)[:, None].float() / 255, y)
    assert one.memory.store.digest() == other.memory.store.digest()
    with pytest.raises(ValueError, match="expected one id for each of 2100 inputs, found 3"):
        one.remember(range(3), pixels, y)
    with pytest.raises(ValueError, match="expected"):
        one.remember(range(3000, 3004), pixels[:4, :5], y[:4])
    assert len(one.memory.store) == 2100

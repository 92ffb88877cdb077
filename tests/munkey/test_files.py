"""A model's file: the same model again, and nothing of what was forgotten."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import CLASSES, SIZE, encoder, filled, images, labels, model, train
from disks import FailingDisk, Killed
from torch import Tensor, nn

from munkey import ConvEncoder, DurableStore, KeyMemoryTransformer, ModuleEncoder, Projection
from munkey import io as files
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.readout.transformer import ExemplarTransformer, TransformerBlock
from munkey.search import Neighbours, Search, Searchable
from treediff.core.io import model_bytes, read_header, read_tensors


def nearest_of_all(store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
    return store.nearest(queries, k, exclude_ids=exclude_ids)


class NearestOfAll:
    __call__ = staticmethod(nearest_of_all)


@pytest.mark.parametrize("settings", [{}, {"mode": "exact"}, {"aggregation": "softmax"}, {"aggregation": "rank"}])
def test_comes_back_as_it_was(tmp_path: Path, settings: dict[str, str]) -> None:
    built = filled(**settings)
    if not settings.get("mode"):
        train(built, list(range(12)))
    built.forget([2, 11])
    built.save(tmp_path / "a.safetensors")
    again = KeyMemoryTransformer.load(tmp_path / "a.safetensors").eval()
    x = images(7, seed=3)
    assert torch.equal(built(x), again(x)) and built.memory.store.digest() == again.memory.store.digest()
    assert again.config == built.config and again.mode == built.mode
    again.remember([2], images(12)[[2]], labels(12)[[2]])
    built.remember([2], images(12)[[2]], labels(12)[[2]])
    assert built.memory.store.digest() == again.memory.store.digest()
    again.save(tmp_path / "b.safetensors")
    built.save(tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_forgetting_and_saving_commute_and_a_file_does_not_know_history(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.safetensors" for n in range(3)]
    one = filled()
    one.save(paths[0])
    one.forget([3, 4])
    one.save(paths[1])
    other = KeyMemoryTransformer.load(paths[0])
    other.forget([4])
    other.forget([3])
    other.save(paths[2])
    assert paths[1].read_bytes() == paths[2].read_bytes()
    fresh = model()
    kept = [i for i in range(11, -1, -1) if i not in (3, 4)]
    fresh.remember(kept, images(12)[kept], labels(12)[kept])
    fresh.save(paths[2])
    assert paths[1].read_bytes() == paths[2].read_bytes()


def test_no_byte_of_what_was_forgotten_is_left(tmp_path: Path) -> None:
    built = filled()
    train(built, list(range(12)))
    path = tmp_path / "a.safetensors"
    built.save(path)
    rows = built.memory.store.get([5])
    marks = [row.detach().numpy().tobytes() for row in (rows.keys[0], rows.values[0])]
    assert all(mark in path.read_bytes() for mark in marks), "the search finds what is there"
    with open(path, "rb") as before:  # the file that is replaced, which a name no longer leads to
        built.forget([5])
        built.save(path)
        assert not any(mark in path.read_bytes() for mark in marks)
        assert not before.read().strip(b"\0")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_an_encoder_that_the_file_does_not_hold_is_passed_again(tmp_path: Path) -> None:
    def own(scale: float = 1.0) -> ModuleEncoder:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        torch.nn.init.constant_(net[1].weight, scale)  # type: ignore[arg-type]
        torch.nn.init.constant_(net[1].bias, 0.5)  # type: ignore[arg-type]
        return ModuleEncoder(net, 5, fitted_on="other data")

    built = KeyMemoryTransformer.for_images(
        classes=CLASSES, channels=1, size=SIZE, key_encoder=own(), width=8, value_width=4, mode="paper"
    ).eval()
    built.remember([1, 2], images(2), labels(2))
    path = tmp_path / "a.safetensors"
    built.save(path)
    assert not any(name.startswith("key_encoder") for name in read_tensors(path))
    again = KeyMemoryTransformer.load(path, key_encoder=own()).eval()
    assert torch.equal(again(images(3, seed=2)), built(images(3, seed=2)))
    with pytest.raises(
        ValueError, match="are from a ModuleEncoder, which the file does not hold; pass it as key_encoder="
    ):
        KeyMemoryTransformer.load(path)
    with pytest.raises(
        ValueError, match=r"are from another encoder, a ModuleEncoder with fingerprint .* found a Module"
    ):
        KeyMemoryTransformer.load(path, key_encoder=own(2.0))
    with pytest.raises(ValueError, match="found a Projection with"):
        KeyMemoryTransformer.load(path, key_encoder=encoder())


def test_a_model_built_from_parts_is_filled(tmp_path: Path) -> None:
    built = filled()
    built.config = None
    path = tmp_path / "a.safetensors"
    built.save(path)
    other = model(seed=5)
    assert KeyMemoryTransformer.load(path, model=other) is other
    assert torch.equal(other(images(3)), built(images(3)))
    with pytest.raises(ValueError, match="was built from parts, which a file does not hold"):
        KeyMemoryTransformer.load(path)
    with pytest.raises(ValueError, match=r"the file does not fit the model at 'readout\."):
        wide = KeyMemoryTransformer.for_images(
            classes=CLASSES + 1, channels=1, size=SIZE, key_encoder=encoder(), width=8, value_width=4, mode="paper"
        )
        KeyMemoryTransformer.load(path, model=wide)


def test_for_vectors_and_a_convolutional_encoder(tmp_path: Path) -> None:
    vectors = KeyMemoryTransformer.for_vectors(
        classes=4, features=6, key_encoder=Projection.random((6,), 3), tokens=2, width=8, value_width=4, mode="paper"
    ).eval()
    vectors.remember([1, 2], torch.randn(2, 6))
    vectors.save(tmp_path / "v.safetensors")
    x = torch.randn(3, 6)
    assert torch.equal(KeyMemoryTransformer.load(tmp_path / "v.safetensors").eval()(x), vectors(x))
    conv = ConvEncoder(channels=1, width=5, fitted_on="other data", hidden=8)
    built = KeyMemoryTransformer.for_images(
        classes=3, channels=1, size=SIZE, key_encoder=conv, width=8, value_width=4, dtype=torch.float32, mode="paper"
    ).eval()
    built.remember([1, 2], images(2))
    built.save(tmp_path / "c.safetensors")
    assert torch.equal(KeyMemoryTransformer.load(tmp_path / "c.safetensors").eval()(images(4)), built(images(4)))


@pytest.mark.parametrize("inputs", ["images", "vectors"])
def test_the_settings_of_a_network_of_ones_own_are_not_in_the_file(tmp_path: Path, inputs: str) -> None:
    path, shape = tmp_path / "a.safetensors", (6,) if inputs == "vectors" else (2, 6, 6)
    arguments: dict[str, Any] = {
        "key_encoder": Projection.random(shape, 3),
        "classes": 4,
        "value_width": 4,
        "mode": "paper",
    }
    factory = KeyMemoryTransformer.for_vectors if inputs == "vectors" else KeyMemoryTransformer.for_images
    arguments |= {"features": 6} if inputs == "vectors" else {"size": 6, "channels": 2}

    def network() -> ExemplarTransformer:
        tokens = VectorTokens(6, 3, 8) if inputs == "vectors" else ImageTokens(6, 2, 2, 8)
        return ExemplarTransformer(tokens=tokens, blocks=[TransformerBlock(8, 2)], value_width=4, outputs=4)

    default = factory(**arguments).config
    built = factory(**arguments, network=network()).eval()
    name = f"for_{inputs}"
    assert (
        default is not None and built.config is not None and built.config["own"] == {"network": "ExemplarTransformer"}
    )
    others = {"tokens"} if inputs == "vectors" else {"patch", "channels"}
    assert default[name].keys() - built.config[name].keys() == {"width", "depth", "heads", "dropout", *others}
    built.remember([1, 2], torch.rand(2, *shape))
    x = torch.rand(3, *shape)
    for config in (built.config, {**built.config, name: default[name]}):  # the second, as files had it before
        built.config = config
        built.save(path)
        found = KeyMemoryTransformer.load(path, network=network()).eval()
        assert torch.equal(found(x), built(x)) and found.config is not None
        assert "width" not in found.config[name]


@pytest.mark.parametrize("search", [nearest_of_all, functools.partial(nearest_of_all), NearestOfAll()])
def test_a_search_of_ones_own_is_named(tmp_path: Path, search: Search) -> None:
    built, path = filled(), tmp_path / "a.safetensors"
    built.memory.search = search
    built.save(path)
    name = {True: "nearest_of_all"}.get(search is nearest_of_all, type(search).__name__)
    assert read_header(path, "KeyMemoryTransformer")["search"] == name
    with pytest.raises(ValueError, match=f"was searched by {name}, which the file does not hold; pass a function that"):
        KeyMemoryTransformer.load(path)
    assert KeyMemoryTransformer.load(path, search=lambda store: search).memory.search is search


def test_damage_is_seen(tmp_path: Path) -> None:
    path, built = tmp_path / "a.safetensors", filled()
    built.save(path)
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        KeyMemoryTransformer.load(tmp_path / "cut")
    (tmp_path / "flipped").write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(ValueError, match="is damaged: its content is not what was saved; take a backup"):
        KeyMemoryTransformer.load(tmp_path / "flipped")
    (tmp_path / "foreign").write_bytes(model_bytes("TreeVAE", {"a": torch.zeros(1)}, {}))
    with pytest.raises(ValueError, match="holds a TreeVAE, expected a KeyMemoryTransformer"):
        KeyMemoryTransformer.load(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError, match="no model file at"):
        KeyMemoryTransformer.load(tmp_path / "nowhere")


def test_a_file_tells_nothing_of_history_in_its_header(tmp_path: Path) -> None:
    built = filled()
    built.save(tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors", "KeyMemoryTransformer")
    assert set(header) == {"class", "config", "digest", "dtype", "format", "key_encoder", "store"}
    assert re.fullmatch("[0-9a-f]{64}", header["digest"]) and json.dumps(header)


def test_a_file_that_cannot_be_written_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    built, whole = filled(), []
    for forgotten in (False, True):
        built.forget([1] if forgotten else [])
        built.save(tmp_path / "model.safetensors")
        whole.append((tmp_path / "model.safetensors").read_bytes())
    for killed in (False, True):
        for at in range(40):
            folder = tmp_path / f"{killed} {at}"
            folder.mkdir()
            path = folder / "a.safetensors"
            path.write_bytes(whole[0])
            disk = FailingDisk(at, None if killed else OSError(errno.ENOSPC, "full"))
            try:
                files.save(built, path, disk=disk)
            except (OSError, Killed):
                disk.die()
                assert path.read_bytes() in whole
                assert killed or os.listdir(folder) == ["a.safetensors"], "no part of a file is left"
                built.save(path)
            assert path.read_bytes() == whole[1] and os.listdir(folder) == ["a.safetensors"]
    assert disk.steps < 40


def test_a_memory_that_is_followed_is_not_loaded_into(tmp_path: Path) -> None:
    built = filled()
    built.save(tmp_path / "a.safetensors")
    other = filled(seed=3)
    optimizers = train(other, list(range(12)), steps=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="an optimiser or an average follows the model's memory; load first"):
        KeyMemoryTransformer.load(tmp_path / "a.safetensors", model=other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    other.memory.store.detach(*optimizers)
    KeyMemoryTransformer.load(tmp_path / "a.safetensors", model=other)
    other.memory.store = DurableStore.create(tmp_path / "store", 5, 4, secret=b"another")
    with pytest.raises(ValueError, match="the model's memory lives in a file with another secret; load into"):
        KeyMemoryTransformer.load(tmp_path / "a.safetensors", model=other)
    other.memory.store.close()

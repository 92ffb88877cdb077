"""A model with a memory in a folder and on a hub: what comes back, what is wiped, and what has to be said first."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import CLASSES, SIZE, filled, images, labels, model, train
from hubs import FakeHub, Pushed
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_encoders import ENCODERS, module
from torch import nn

from munkey import ConvEncoder, KeyEncoder, KeyMemoryTransformer, ModuleEncoder, Projection, ShardedKeyStore

THREE = ["README.md", "config.json", "model.safetensors"]


def with_conv() -> KeyMemoryTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = ConvEncoder(channels=1, width=5, fitted_on="other data", hidden=8)
        built = KeyMemoryTransformer.for_images(CLASSES, 1, SIZE, conv, width=8, value_width=4)
    built.remember([1, 2], images(2), labels(2))
    return built


def trained() -> KeyMemoryTransformer:
    built = filled()
    train(built, list(range(12)))
    built.forget([2, 11])
    return built


MODELS: dict[str, Callable[[], KeyMemoryTransformer]] = {
    "paper": trained,
    "exact": lambda: filled(mode="exact"),
    "softmax": lambda: filled(aggregation="softmax"),
    "rank": lambda: filled(aggregation="rank"),
    "float64": lambda: filled().double(),
    "nothing": model,
    "conv": with_conv,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_same(found: nn.Module, built: nn.Module) -> None:
    ours, theirs = built.state_dict(), found.state_dict()
    assert type(found) is type(built) and ours.keys() == theirs.keys() and len(ours)
    assert all(torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype for name, value in ours.items())


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(name: str, tmp_path: Path) -> None:
    built = MODELS[name]()
    built.save_pretrained(tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == THREE
    path = tmp_path / "model" / "model.safetensors"
    built.save(tmp_path / "file")
    assert path.read_bytes() == (tmp_path / "file").read_bytes()
    assert load_file(path).keys() == built.state_dict().keys()
    for where in (tmp_path / "model", str(path)):
        found = KeyMemoryTransformer.from_pretrained(where)
        check_same(found, built)
        assert found.config == built.config and found.memory.store.secret == built.memory.store.secret
        assert found.memory.store.digest() == built.memory.store.digest()
    found.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "module"])
def test_encoders_are_shared_alone(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name]()
    encoder.save_pretrained(tmp_path)
    found = type(encoder).from_pretrained(tmp_path)
    check_same(found, encoder)
    assert found.fingerprint() == encoder.fingerprint()
    assert load_file(tmp_path / "model.safetensors").keys() == encoder.state_dict().keys()
    other = Projection if name == "conv" else ConvEncoder
    with pytest.raises(ValueError, match=f"config.json' is of a {type(encoder).__name__}, expected a {other.__name__}"):
        other.from_pretrained(tmp_path)


def test_an_encoder_around_a_module_is_made_anew(tmp_path: Path) -> None:
    module().save_pretrained(tmp_path)
    message = (
        r"no file holds the module of a ModuleEncoder; make the module and ModuleEncoder\(module, width=5, fitted_on"
    )
    for load in (ModuleEncoder.from_pretrained, lambda folder: ModuleEncoder.load(folder / "model.safetensors")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_encoder_and_model_are_passed_on(tmp_path: Path) -> None:
    def own() -> KeyEncoder:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        torch.nn.init.constant_(net[1].weight, 0.5)  # type: ignore[arg-type]
        torch.nn.init.constant_(net[1].bias, 0.5)  # type: ignore[arg-type]
        return ModuleEncoder(net, 5, fitted_on="other data")

    built = KeyMemoryTransformer.for_images(CLASSES, 1, SIZE, own(), width=8, value_width=4)
    built.remember([1, 2], images(2), labels(2))
    built.save_pretrained(tmp_path)
    check_same(KeyMemoryTransformer.from_pretrained(tmp_path, key_encoder=own()), built)
    with pytest.raises(ValueError, match="which the file does not hold; pass it as key_encoder="):
        KeyMemoryTransformer.from_pretrained(tmp_path)
    other = KeyMemoryTransformer.for_images(CLASSES, 1, SIZE, own(), width=8, value_width=4)
    assert KeyMemoryTransformer.from_pretrained(tmp_path, model=other) is other
    check_same(other, built)


# --- what is forgotten --------------------------------------------------------------------------------------


def test_saving_again_wipes_what_was_forgotten(tmp_path: Path) -> None:
    built = filled()
    train(built, list(range(12)))
    built.save_pretrained(tmp_path)
    before = contents(tmp_path)
    rows = built.memory.store.get([5])
    marks = [row.detach().numpy().tobytes() for row in (rows.keys[0], rows.values[0])]
    assert all(mark in before["model.safetensors"] for mark in marks), "the search finds what is there"
    with open(tmp_path / "model.safetensors", "rb") as replaced:
        built.forget([5])
        built.save_pretrained(tmp_path)
        assert not replaced.read().strip(b"\0")
    after = contents(tmp_path)
    assert after.keys() == before.keys() and not any(mark in data for mark in marks for data in after.values())
    assert 5 not in KeyMemoryTransformer.from_pretrained(tmp_path).memory.store
    for name in ("config.json", "README.md"):
        assert after[name] == before[name], "it tells nothing of the rows, so there is nothing in it to forget"


def test_what_stands_beside_the_file_has_no_secret_and_no_digest(tmp_path: Path) -> None:
    built = filled()
    built.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() == {"class", "config", "dtype", "format", "key_encoder", "store"}
    assert config["store"] == {"seed": 0, "scale": 0.02} and config["config"] == built.config
    for name in ("config.json", "README.md"):
        assert built.memory.store.secret.hex() not in (tmp_path / name).read_text()
    (tmp_path / "config.json").write_text(json.dumps({**config, "store": {"seed": 1, "scale": 0.02}}))
    with pytest.raises(ValueError, match=r"says something else than the model's file at 'store': \{'seed': 1"):
        KeyMemoryTransformer.from_pretrained(tmp_path)


def test_a_copy_may_have_a_secret_of_its_own(tmp_path: Path) -> None:
    """What docs/sharing.md says: nobody who has the copy can test receipts of the original."""
    built = filled()
    built.save(tmp_path / "mine")
    copy = KeyMemoryTransformer.load(tmp_path / "mine")
    copy.memory.store.secret = secrets.token_bytes(32)
    copy.save_pretrained(tmp_path / "shared")
    data = b"".join(contents(tmp_path / "shared").values())
    assert built.memory.store.secret not in data and built.memory.store.secret.hex().encode() not in data
    found = KeyMemoryTransformer.from_pretrained(tmp_path / "shared")
    check_same(found, built)
    assert found.forget([3]).before != built.forget([3]).before
    built.memory.store.secret = found.memory.store.secret
    built.memory.store.distrust_digest()
    assert found.memory.store.digest() == built.memory.store.digest()


# --- a memory on many ranks ---------------------------------------------------------------------------------


def test_a_memory_that_is_spread_is_no_single_file(tmp_path: Path, pushed: Pushed) -> None:
    built = filled()
    built.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    built.memory.store = ShardedKeyStore.of(built.memory.store)
    message = r"is spread over ranks and saved as a folder of many files, expected one file; call save\(folder\) on all"
    with pytest.raises(ValueError, match=message):
        built.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        built.push_to_hub("user/name", private=True)
    assert contents(tmp_path / "model") == before and pushed.calls == []
    built.save(tmp_path / "ranks")
    with pytest.raises(
        FileNotFoundError, match=r"it holds lock, manifest.json, model-.*\); .* What save wrote is read"
    ):
        KeyMemoryTransformer.from_pretrained(tmp_path / "ranks")
    KeyMemoryTransformer.load(tmp_path / "ranks").save_pretrained(tmp_path / "gathered")  # what the message says
    assert contents(tmp_path / "gathered") == before


# --- on a hub -----------------------------------------------------------------------------------------------


def test_it_must_be_said_who_may_see_the_memory(tmp_path: Path, pushed: Pushed) -> None:
    built = filled()
    message = (
        "publishes the memory: keys, values and labels of 12 instances, and the store's secret. .* private=True or"
    )
    with pytest.raises(ValueError, match=message):
        built.push_to_hub("user/name")
    with pytest.raises(ValueError, match=message):
        built.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert pushed.calls == [] and os.listdir(tmp_path) == []
    for private in (True, False):
        built.push_to_hub("user/name", private=private)
        assert pushed.of("create_repo") == {"repo_id": "user/name", "private": private, "exist_ok": True}
        pushed.calls.clear()
    ENCODERS["random"]().push_to_hub("user/name")  # holds no rows


def test_a_memory_comes_back_from_a_repository(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built, other = filled(), model(seed=5)
    built.save_pretrained("commit")
    hub.commit(Path("commit"))
    check_same(KeyMemoryTransformer.from_pretrained("user/name", cache_dir="cache"), built)
    found = KeyMemoryTransformer.from_pretrained("user/name", cache_dir="cache", local_files_only=True, model=other)
    assert found is other
    check_same(other, built)


@pytest.mark.parametrize("fails", [False, True])
def test_the_file_that_was_pushed_is_wiped(fails: bool, tmp_path: Path, pushed: Pushed) -> None:
    """Not only removed: it holds the rows."""
    built = filled()
    built.save(tmp_path / "file")
    kept: list[Any] = []

    def look(folder: Path) -> None:
        kept.append(open(folder / "model.safetensors", "rb"))
        if fails:
            raise OSError("no connection")

    pushed.then = look
    if fails:
        with pytest.raises(OSError, match="no connection"):
            built.push_to_hub("user/name", private=True)
    else:
        built.push_to_hub("user/name", private=True)
    assert pushed.folder["model.safetensors"] == (tmp_path / "file").read_bytes()
    with kept[0] as file:
        data = file.read()
    assert len(data) == (tmp_path / "file").stat().st_size and not data.strip(b"\0")
    assert not os.path.exists(kept[0].name) and not os.path.exists(os.path.dirname(kept[0].name))


def test_the_card_warns(tmp_path: Path) -> None:
    filled().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "treediff" and card.data.tags == ["treediff", "munkey", "KeyMemoryTransformer"]
    assert "from munkey import KeyMemoryTransformer\n" in card.text
    assert re.search("holds the memory: keys, values, labels .* stays in the history of this repository", card.text)

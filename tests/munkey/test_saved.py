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
from treediff.core.hub import pull, push, write_folder

THREE = ["README.md", "config.json", "model.safetensors"]


def with_conv() -> KeyMemoryTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = ConvEncoder(channels=1, width=5, fitted_on="other data", hidden=8)
        built = KeyMemoryTransformer.for_images(
            classes=CLASSES, channels=1, size=SIZE, key_encoder=conv, width=8, value_width=4, mode="paper"
        )
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
    write_folder(built, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == THREE
    path = tmp_path / "model" / "model.safetensors"
    built.save(tmp_path / "file")
    assert path.read_bytes() == (tmp_path / "file").read_bytes()
    assert load_file(path).keys() == built.state_dict().keys()
    for where in (tmp_path / "model", str(path)):
        found = pull(KeyMemoryTransformer, where)
        check_same(found, built)
        assert found.config == built.config and found.memory.store.secret == built.memory.store.secret
        assert found.memory.store.digest() == built.memory.store.digest()
    write_folder(found, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "module"])
def test_encoders_are_shared_alone(name: str, tmp_path: Path) -> None:
    encoder = ENCODERS[name]()
    write_folder(encoder, tmp_path)
    found = pull(type(encoder), tmp_path)
    check_same(found, encoder)
    assert found.fingerprint() == encoder.fingerprint()
    assert load_file(tmp_path / "model.safetensors").keys() == encoder.state_dict().keys()
    other = Projection if name == "conv" else ConvEncoder
    with pytest.raises(ValueError, match=f"holds a {type(encoder).__name__}, expected a {other.__name__}"):
        pull(other, tmp_path)


def test_an_encoder_around_a_module_is_made_anew(tmp_path: Path) -> None:
    write_folder(module(), tmp_path)
    message = (
        r"no file holds the module of a ModuleEncoder; make the module and ModuleEncoder\(module, width=5, fitted_on"
    )
    for load in (
        lambda folder: pull(ModuleEncoder, folder),
        lambda folder: ModuleEncoder.load(folder / "model.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_encoder_and_model_are_passed_on(tmp_path: Path) -> None:
    def own() -> KeyEncoder:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        torch.nn.init.constant_(net[1].weight, 0.5)  # type: ignore[arg-type]
        torch.nn.init.constant_(net[1].bias, 0.5)  # type: ignore[arg-type]
        return ModuleEncoder(net, 5, fitted_on="other data")

    built = KeyMemoryTransformer.for_images(
        classes=CLASSES, channels=1, size=SIZE, key_encoder=own(), width=8, value_width=4, mode="paper"
    )
    built.remember([1, 2], images(2), labels(2))
    write_folder(built, tmp_path)
    check_same(pull(KeyMemoryTransformer, tmp_path, key_encoder=own()), built)
    with pytest.raises(ValueError, match="which the file does not hold; pass it as key_encoder="):
        pull(KeyMemoryTransformer, tmp_path)
    other = KeyMemoryTransformer.for_images(
        classes=CLASSES, channels=1, size=SIZE, key_encoder=own(), width=8, value_width=4, mode="paper"
    )
    assert pull(KeyMemoryTransformer, tmp_path, model=other) is other
    check_same(other, built)


# --- what is forgotten --------------------------------------------------------------------------------------


def test_saving_again_wipes_what_was_forgotten(tmp_path: Path) -> None:
    built = filled()
    train(built, list(range(12)))
    write_folder(built, tmp_path)
    before = contents(tmp_path)
    rows = built.memory.store.get([5])
    marks = [row.detach().numpy().tobytes() for row in (rows.keys[0], rows.values[0])]
    assert all(mark in before["model.safetensors"] for mark in marks), "the search finds what is there"
    with open(tmp_path / "model.safetensors", "rb") as replaced:
        built.forget([5])
        write_folder(built, tmp_path)
        assert not replaced.read().strip(b"\0")
    after = contents(tmp_path)
    assert after.keys() == before.keys() and not any(mark in data for mark in marks for data in after.values())
    assert 5 not in pull(KeyMemoryTransformer, tmp_path).memory.store
    for name in ("config.json", "README.md"):
        assert after[name] == before[name], "it tells nothing of the rows, so there is nothing in it to forget"


def test_what_stands_beside_the_file_has_no_secret_and_no_digest(tmp_path: Path) -> None:
    built = filled()
    write_folder(built, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"class": "KeyMemoryTransformer", "config": built.config}
    for name in ("config.json", "README.md"):
        assert built.memory.store.secret.hex() not in (tmp_path / name).read_text()


def test_a_copy_may_have_a_secret_of_its_own(tmp_path: Path) -> None:
    """What docs/sharing.md says: nobody who has the copy can test receipts of the original."""
    built = filled()
    built.save(tmp_path / "mine")
    copy = KeyMemoryTransformer.load(tmp_path / "mine")
    copy.memory.store.secret = secrets.token_bytes(32)
    write_folder(copy, tmp_path / "shared")
    data = b"".join(contents(tmp_path / "shared").values())
    assert built.memory.store.secret not in data and built.memory.store.secret.hex().encode() not in data
    found = pull(KeyMemoryTransformer, tmp_path / "shared")
    check_same(found, built)
    assert found.forget([3]).before != built.forget([3]).before
    built.memory.store.secret = found.memory.store.secret
    built.memory.store.distrust_digest()
    assert found.memory.store.digest() == built.memory.store.digest()


# --- a memory on many ranks ---------------------------------------------------------------------------------


def test_a_memory_that_is_spread_is_no_single_file(tmp_path: Path, pushed: Pushed) -> None:
    built = filled()
    write_folder(built, tmp_path / "model")
    before = contents(tmp_path / "model")
    built.memory.store = ShardedKeyStore.of(built.memory.store)
    message = r"is spread over ranks and saved as a folder of many files, expected one file; call save\(folder\) on all"
    with pytest.raises(ValueError, match=message):
        write_folder(built, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        push(built, "user/name", private=True)
    assert contents(tmp_path / "model") == before and pushed.calls == []
    built.save(tmp_path / "ranks")
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors in the folder"):
        pull(KeyMemoryTransformer, tmp_path / "ranks")
    write_folder(KeyMemoryTransformer.load(tmp_path / "ranks"), tmp_path / "gathered")  # what the message says
    assert contents(tmp_path / "gathered") == before


# --- on a hub -----------------------------------------------------------------------------------------------


def test_it_must_be_said_who_may_see_the_memory(pushed: Pushed) -> None:
    built = filled()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'private'"):
        push(built, "user/name")  # type: ignore[call-arg]
    assert pushed.calls == []
    for private in (True, False):
        push(built, "user/name", private=private)
        assert pushed.of("create_repo") == {"repo_id": "user/name", "private": private, "exist_ok": True}
        pushed.calls.clear()


def test_a_memory_comes_back_from_a_repository(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    built, other = filled(), model(seed=5)
    write_folder(built, "commit")
    hub.commit(Path("commit"))
    check_same(pull(KeyMemoryTransformer, "user/name", cache_dir="cache"), built)
    found = pull(KeyMemoryTransformer, "user/name", cache_dir="cache", local_files_only=True, model=other)
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
            push(built, "user/name", private=True)
    else:
        push(built, "user/name", private=True)
    assert pushed.folder["model.safetensors"] == (tmp_path / "file").read_bytes()
    with kept[0] as file:
        data = file.read()
    assert len(data) == (tmp_path / "file").stat().st_size and not data.strip(b"\0")
    assert not os.path.exists(kept[0].name) and not os.path.exists(os.path.dirname(kept[0].name))


def test_the_card_warns(tmp_path: Path) -> None:
    write_folder(filled(), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "treediff" and card.data.tags == ["treediff", "munkey", "KeyMemoryTransformer"]
    assert "from munkey import KeyMemoryTransformer\n" in card.text
    assert re.search("holds the memory: keys, values, labels .* stays in the history of this repository", card.text)

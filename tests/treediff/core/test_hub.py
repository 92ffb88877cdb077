"""A model in a folder: the file that `save` writes, and what is said of it beside it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hubs import cut_off
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear import linear_model
from models import build
from safetensors import safe_open
from safetensors.torch import load_file
from shared_models import MODELS, check_same
from strategies import quick, topologies
from torch import Tensor
from worlds import UNEVEN, world

from treediff import TreeTopology, TreeVAE
from treediff.core import io as treediff_io

each_model = pytest.mark.parametrize("name", MODELS)
THREE = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- round trips --------------------------------------------------------------------------------------------


@each_model
def test_a_folder_holds_the_models_own_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    assert model.save_pretrained(tmp_path / "deep" / "model") is None
    folder = tmp_path / "deep" / "model"
    assert sorted(os.listdir(folder)) == THREE
    model.save(tmp_path / "file")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "file").read_bytes()

    plain = load_file(folder / "model.safetensors")
    state: dict[str, Tensor] = model.state_dict()
    assert plain.keys() == state.keys() and all(torch.equal(plain[key], value) for key, value in state.items())

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["treediff"])
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert text == json.dumps(header, indent=2, sort_keys=True) + "\n"


@each_model
def test_a_round_trip_is_bit_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # nothing here needs it
    model, state = MODELS[name](), torch.get_rng_state()
    cls = type(model)
    model.save_pretrained(tmp_path / "model")
    found = cls.from_pretrained(tmp_path / "model")
    check_same(found, model)
    check_same(cls.from_pretrained(str(tmp_path / "model")), model)
    check_same(cls.from_pretrained(tmp_path / "model" / "model.safetensors"), model)
    found.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")
    found.save_pretrained(tmp_path / "model")  # over the old one
    assert contents(tmp_path / "again") == contents(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


@settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(topologies(max_steps=8), st.integers(0, 2**32))
def test_a_round_trip_of_any_tree(tmp_path: Path, tree: TreeTopology, seed: int) -> None:
    """Into one folder, so that each takes the place of another one."""
    model = build(tree, seed=seed)
    with torch.no_grad():
        model.heads.weights_of(tree.root)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    model.save_pretrained(tmp_path / "model")
    found = TreeVAE.from_pretrained(tmp_path / "model")
    check_same(found, model)
    assert found.topology == tree
    assert sorted(os.listdir(tmp_path / "model")) == THREE


def test_what_load_takes_is_passed_on(tmp_path: Path) -> None:
    model, other = linear_model(world(UNEVEN)), linear_model(world(TreeTopology.chain(3)), seed=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was built from parts, which a file does not hold"):
        TreeVAE.from_pretrained(tmp_path)
    assert TreeVAE.from_pretrained(tmp_path, model=other) is other
    check_same(other, model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'map_location'"):
        TreeVAE.from_pretrained(tmp_path, map_location="cpu")


def test_a_relative_name_is_a_folder_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = build()
    model.save_pretrained("user/name")
    for name in ("user/name", "./user/name", "user/name/", "user/name/model.safetensors"):
        check_same(TreeVAE.from_pretrained(name), model)


def test_an_interruption_leaves_one_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = build(), build(seed=1)
    replace, made = os.replace, []

    def stop_at(step: int) -> Callable[..., None]:
        def fail(source: str, target: str) -> None:
            made.append(target)
            if len(made) > step:
                raise OSError("the disk is full")
            replace(source, target)

        return fail

    for step, whole in enumerate([old, new]):  # before model.safetensors is in its place, and before config.json is
        made.clear()
        monkeypatch.setattr(treediff_io.os, "replace", stop_at(step))
        with pytest.raises(OSError, match="the disk is full"):
            new.save_pretrained(folder)
        monkeypatch.undo()
        check_same(TreeVAE.from_pretrained(folder), whole)
        assert sorted(os.listdir(folder)) == ["README.md", "model.safetensors"]
    new.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == THREE


# --- the model card -----------------------------------------------------------------------------------------


def test_the_card_says_how_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, build_model in MODELS.items():
        model, folder = build_model(), Path("user/name")
        model.save_pretrained(folder)
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "treediff" and card.data.license is None
        assert card.data.tags == ["treediff", type(model).__name__]
        code = re.search("```python\n(.*?)```", card.text, re.DOTALL)
        assert code
        scope: dict[str, Any] = {}
        exec(code.group(1), scope)
        check_same(scope["model"], model)
        assert "classifier" not in name or "from treediff.metrics import FeatureClassifier" in card.text
        (folder / "README.md").unlink()


def test_a_class_of_ones_own_is_shared_too(tmp_path: Path) -> None:
    class Mine(TreeVAE):
        pass

    model = Mine.for_images(size=8, latent=4)
    model.save_pretrained(tmp_path)
    check_same(Mine.from_pretrained(tmp_path), model)
    with pytest.raises(ValueError, match=r"config\.json' is of a Mine, expected a TreeVAE"):
        TreeVAE.from_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["treediff", __name__.partition(".")[0], "Mine"]
    assert f"from {__name__} import Mine\n" in card.text


def test_a_card_that_is_there_stays(folder: Path) -> None:
    (folder / "README.md").write_text("my own")
    build(seed=1).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "my own"

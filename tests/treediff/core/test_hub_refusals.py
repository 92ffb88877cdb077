"""Folders and names that must be refused, with a message that says why, and without asking a hub."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from hubs import cut_off
from models import GROWN, build
from shared_models import MODELS, check_same

from treediff import LeafConditionedDDPM, TreeVAE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    message = f"there is no model.safetensors in the folder {str(tmp_path)!r} (it holds nothing); expected what"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        TreeVAE.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds pytorch_model.bin\); expected what save_pretrained writes"):
        TreeVAE.from_pretrained(tmp_path)


def test_the_file_counts_and_needs_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    check_same(TreeVAE.from_pretrained(folder), build())


def test_another_class(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json' is of a TreeVAE, expected a LeafConditionedDDPM"):
        LeafConditionedDDPM.from_pretrained(folder)
    MODELS["second stage"]().save_pretrained(tmp_path / "second")
    os.replace(tmp_path / "second" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors' holds a LeafConditionedDDPM, expected a TreeVAE"):
        TreeVAE.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"config.json' is of a TreeVAE, expected a LeafConditionedDDPM"):
        LeafConditionedDDPM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json' is not JSON (JSONDecodeError: "),
        ("{", "the model's file is what counts: remove config.json, or save the model again"),
        ("\udcff", "config.json' is not JSON (UnicodeDecodeError: "),
        ("[" * 100_000, "config.json' is not JSON (RecursionError: "),
        ("[1]", "config.json' names no class, as save_pretrained does, expected a TreeVAE"),
        ('{"model_type": "bert"}', "config.json' names no class, as save_pretrained does, expected a TreeVAE"),
        ('{"class": 3}', "config.json' names no class, as save_pretrained does, expected a TreeVAE"),
        ('{"class": "Forest"}', "config.json' is of a Forest, expected a TreeVAE"),
    ],
)
def test_a_config_that_is_damaged_or_foreign(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)):
        TreeVAE.from_pretrained(folder)


@pytest.mark.parametrize("key", ["config", "dtype", "format", "topology"])
def test_a_config_that_contradicts_the_file(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    for changed, found in (({**config, key: "another"}, "'another'"), ({**config}, "None")):
        if found == "None":
            del changed[key]
        (folder / "config.json").write_text(json.dumps(changed))
        message = f"config.json' says something else than the model's file at {key!r}: {found}, the file has "
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            TreeVAE.from_pretrained(folder)
        assert "remove config.json, or save the model again" in str(error.value)


def test_a_config_may_say_more(folder: Path) -> None:
    """Tools of the hub add keys of their own."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "tree", "license": "mit"}))
    check_same(TreeVAE.from_pretrained(folder), build())


def test_a_damaged_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        TreeVAE.from_pretrained(folder)


NOWHERE = "and it is not the name of a repository, which is text like 'user/name'; nothing was downloaded"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model",
        "./model",
        "../model",
        "~/model",
        "/user/name",
        "user/name/",
        "user/name/model",
        "user/model.safetensors",
        "user/name.git",
        "user/na--me",
        "user/na..me",
        "user/.name",
        "user/name\n",
        "us er/name",
        "us\u00e9r/name",
        r"user\name",
        Path("user/name"),
    ],
)
def test_what_looks_like_a_path_is_never_downloaded(
    name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # so that it would be another error
    monkeypatch.chdir(tmp_path)
    for revision in (None, "main"):
        message = f"there is no folder or file {os.fspath(name)!r}, {NOWHERE}"
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            TreeVAE.from_pretrained(name, revision=revision)


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    for name in ("user/name", "User_1/na-me.v2", "a/b"):
        with pytest.raises(ImportError) as error:
            TreeVAE.from_pretrained(name)
        assert f"there is no folder or file {name!r}, and fetching a repository of that name" in str(error.value)
        assert str(error.value).endswith("pip install 'treediff[hub]'")
    with pytest.raises(ImportError, match=r"pushing a model needs huggingface_hub .* pip install 'treediff\[hub\]'"):
        build().push_to_hub("user/name")
    with pytest.raises(ImportError, match="pushing a model needs huggingface_hub"):
        build().save_pretrained(tmp_path / "model", push_to_hub=True)
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"expected a folder, found the file .* save\(path\) writes a single"):
        build(GROWN).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_settings_of_a_push_need_a_push(tmp_path: Path) -> None:
    message = "private, repo_id, token say how to push the model; add push_to_hub=True, or leave them out"
    with pytest.raises(TypeError, match=message):
        build().save_pretrained(tmp_path / "model", private=True, token="secret", repo_id="user/name")
    assert os.listdir(tmp_path) == []

"""Sharing a model: the folder that model hubs expect, and huggingface_hub's own code before a hub without a network."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from hubs import COMMITS, FakeHub, Pushed, cut_off
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError
from models import PRUNED, build
from shared_models import MODELS, check_same

from treediff import TreeVAE
from treediff.core.hub import pull, push, write_folder

each_model = pytest.mark.parametrize("name", MODELS)
THREE = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder is here that a name could be taken for."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# --- folders ------------------------------------------------------------------------------------------------


@each_model
def test_a_folder_holds_the_models_own_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    model, folder = MODELS[name](), tmp_path / "deep" / "model"
    write_folder(model, folder)
    assert sorted(os.listdir(folder)) == THREE
    model.save(tmp_path / "file")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "file").read_bytes()
    for source in (folder, str(folder), folder / "model.safetensors"):
        check_same(pull(type(model), source), model)
    about = json.loads((folder / "config.json").read_text())
    assert about == {"class": type(model).__name__, "config": getattr(model, "config", None)}


def test_a_card_is_written_once(tmp_path: Path) -> None:
    write_folder(build(), tmp_path, repo_id="me/mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "treediff" and card.data.tags == ["treediff", "TreeVAE"]
    assert "from treediff import TreeVAE\n" in card.text and 'hub.pull(TreeVAE, "me/mine")' in card.text
    (tmp_path / "README.md").write_text("mine")
    write_folder(build(seed=1), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_arguments_of_load_are_passed_on(tmp_path: Path) -> None:
    write_folder(build(seed=1), tmp_path)
    own = build(PRUNED, seed=2)
    assert pull(TreeVAE, tmp_path, model=own) is own
    check_same(own, build(seed=1))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        NotADirectoryError, match=r"expected a folder, found the file .*file'; model.save writes one file"
    ):
        write_folder(build(), tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors in the folder"):
        pull(TreeVAE, tmp_path)
    write_folder(MODELS["second stage"](), tmp_path)
    with pytest.raises(ValueError, match="holds a LeafConditionedDDPM, expected a TreeVAE"):
        pull(TreeVAE, tmp_path)


# --- repositories -------------------------------------------------------------------------------------------


def commit(hub: FakeHub, seed: int, *names: str) -> TreeVAE:
    model = build(seed=seed)
    write_folder(model, f"commit-{seed}")
    hub.commit(Path(f"commit-{seed}"), COMMITS[seed], *names)
    return model


def test_a_repository_is_fetched_and_read(hub: FakeHub, tmp_path: Path) -> None:
    one, cache = commit(hub, 0, "v1"), tmp_path / "cache"
    check_same(pull(TreeVAE, "user/name", cache_dir=cache, token="secret"), one)
    assert hub.asked == ["HEAD main model.safetensors", f"GET {COMMITS[0]} model.safetensors"] or all(
        line.endswith("model.safetensors") for line in hub.asked
    ), "the model's file, and nothing else"
    assert hub.tokens == {"Bearer secret"}
    hub.asked.clear()
    check_same(pull(TreeVAE, "user/name", cache_dir=cache, local_files_only=True), one)
    assert hub.asked == []
    two = commit(hub, 1)
    check_same(pull(TreeVAE, "user/name", cache_dir=cache), two)
    for revision in ("v1", COMMITS[0]):
        check_same(pull(TreeVAE, "user/name", cache_dir=cache, revision=revision), one)


def test_errors_of_the_hub_come_as_they_are(hub: FakeHub, tmp_path: Path) -> None:
    commit(hub, 0)
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found for url"):
        pull(TreeVAE, "user/name", revision="v2", cache_dir=tmp_path)
    with pytest.raises(LocalEntryNotFoundError, match="outgoing traffic has been disabled"):
        pull(TreeVAE, "user/name", local_files_only=True, cache_dir=tmp_path)
    del hub.files[COMMITS[0]]["model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError, match="Entry Not Found for url"):
        pull(TreeVAE, "user/name", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "name",
    ["name", "a/b/c", "./user/name", "/user/name", "user/name.safetensors", "user--x/name", "user/..name", "é/n"],
)
def test_what_is_no_repository_is_not_looked_for(name: str, hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"it is not the name of a repository, .* nothing was downloaded"):
        pull(TreeVAE, name)
    with pytest.raises(FileNotFoundError, match="it is not the name of a repository"):
        pull(TreeVAE, Path("user/name"))
    assert hub.asked == []


def test_a_folder_that_is_here_comes_first(hub: FakeHub, tmp_path: Path) -> None:
    one = commit(hub, 0)
    os.mkdir("user")
    with pytest.raises(FileNotFoundError, match="there is a folder 'user' here, but no 'user/name'; nothing was"):
        pull(TreeVAE, "user/name")
    check_same(pull(TreeVAE, "user/name", revision="main", cache_dir=tmp_path / "cache"), one)


# --- pushing ------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("there", [True, False])
def test_a_model_is_pushed(name: str, there: bool, pushed: Pushed, tmp_path: Path) -> None:
    model = MODELS[name]()
    pushed.there = {"README.md"} if there else set()
    kept: list[Path] = []
    pushed.then = kept.append
    where = push(model, "name", private=True, token="secret", revision="dev", create_pr=True)
    assert where == "https://hub.example/me/name/commit/1" and pushed.tokens == ["secret"]
    assert pushed.of("create_repo") == {"repo_id": "name", "private": True, "exist_ok": True}
    sent = pushed.of("upload_folder")
    assert sent["repo_id"] == "me/name" and sent["revision"] == "dev" and sent["create_pr"] is True
    assert sent["commit_message"] == f"Upload {type(model).__name__}"
    assert sent["allow_patterns"] == ["model.safetensors", "config.json", *([] if there else ["README.md"])]
    model.save(tmp_path / "file")
    assert pushed.folder["model.safetensors"] == (tmp_path / "file").read_bytes()
    assert b'"me/name"' in pushed.folder["README.md"]
    assert not kept[0].exists(), "nothing is left of the copy"


@pytest.mark.parametrize("way", ["push", "pull"])
def test_without_huggingface_hub(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'treediff[hub]'")):
        push(build(), "user/name", private=True) if way == "push" else pull(TreeVAE, "user/name")

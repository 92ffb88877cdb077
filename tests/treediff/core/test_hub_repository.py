"""Fetching and pushing, by huggingface_hub's own code in front of a hub without a network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hubs import COMMITS, FakeHub, Pushed
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RevisionNotFoundError
from models import PRUNED, build
from shared_models import MODELS, check_same

from treediff import TreeVAE
from treediff.core.hub import Pretrained
from treediff.core.hub_repository import CARD_FILE, CONFIG_FILE, MODEL_FILE

BOTH = ["HEAD main config.json", "GET main config.json"]
BOTH += [f"{method} {COMMITS[0]} model.safetensors" for method in ("HEAD", "GET")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no folder is here that a name could be taken for."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": tmp_path / "cache"}


def commit(hub: FakeHub, model: Pretrained, number: int = 0, *names: str) -> None:
    folder = Path(f"commit-{number}")
    model.save_pretrained(folder)
    hub.commit(folder, COMMITS[number], *names)


# --- fetching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_repository_is_fetched_and_read(name: str, hub: FakeHub, cache: dict[str, Any]) -> None:
    model = MODELS[name]()
    commit(hub, model)
    check_same(type(model).from_pretrained("user/name", **cache), model)
    assert hub.asked == BOTH, "config.json and model.safetensors, and nothing else"
    hub.asked.clear()
    check_same(type(model).from_pretrained("user/name", local_files_only=True, **cache), model)
    assert hub.asked == []
    check_same(type(model).from_pretrained("user/name", **cache), model)
    assert hub.asked == BOTH[:1], "where main stands is looked up; of that commit all is in the cache"
    hub.asked.clear()
    check_same(type(model).from_pretrained("user/name", force_download=True, **cache), model)
    assert hub.asked == BOTH


def test_settings_are_passed_on(hub: FakeHub, cache: dict[str, Any]) -> None:
    one, two = build(seed=1), build(PRUNED, seed=2)
    commit(hub, one, 0, "v1")
    commit(hub, two, 1)
    check_same(TreeVAE.from_pretrained("user/name", token="secret", **cache), two)
    assert hub.tokens == {"Bearer secret"}
    hub.tokens.clear()
    for revision in ("v1", COMMITS[0]):
        check_same(TreeVAE.from_pretrained("user/name", revision=revision, token=False, **cache), one)
    assert hub.tokens == {None}
    check_same(TreeVAE.from_pretrained("user/name", revision="v1", model=build(), **cache), one)
    assert sorted(os.listdir(cache["cache_dir"] / "models--user--name" / "snapshots")) == list(COMMITS)


def test_a_push_in_between_mixes_nothing(hub: FakeHub, cache: dict[str, Any]) -> None:
    one, two = build(seed=1), build(PRUNED, seed=2)
    commit(hub, two, 1)
    commit(hub, one, 0)
    hub.then = lambda: hub.branches.update(main=COMMITS[1])
    check_same(TreeVAE.from_pretrained("user/name", **cache), one)
    assert hub.asked == BOTH
    check_same(TreeVAE.from_pretrained("user/name", **cache), two)


def test_a_cache_on_disk_is_enough(hub: FakeHub, tmp_path: Path) -> None:
    """The layout that huggingface_hub documents, written by hand."""
    model, place = build(), tmp_path / "cache" / "models--user--name"
    model.save_pretrained(place / "snapshots" / COMMITS[0])
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMITS[0])
    check_same(TreeVAE.from_pretrained("user/name", cache_dir=tmp_path / "cache", local_files_only=True), model)
    assert hub.asked == []


def test_another_class_is_refused_before_its_weights_are_fetched(hub: FakeHub, cache: dict[str, Any]) -> None:
    commit(hub, MODELS["second stage"]())
    with pytest.raises(ValueError, match=r"config\.json' is of a LeafConditionedDDPM, expected a TreeVAE"):
        TreeVAE.from_pretrained("user/name", **cache)
    commit(hub, build(), 1)
    hub.files[COMMITS[1]]["config.json"] = b"{"
    with pytest.raises(ValueError, match=r"config\.json' is not JSON"):
        TreeVAE.from_pretrained("user/name", **cache)
    assert not any("model.safetensors" in line for line in hub.asked)


def test_a_config_that_contradicts_the_fetched_file(hub: FakeHub, cache: dict[str, Any]) -> None:
    commit(hub, build())
    files = hub.files[COMMITS[0]]
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), "dtype": "float16"}).encode()
    with pytest.raises(ValueError, match="says something else than the model's file at 'dtype': 'float16'"):
        TreeVAE.from_pretrained("user/name", **cache)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_repository_that_lacks_a_file(missing: str, hub: FakeHub, cache: dict[str, Any]) -> None:
    commit(hub, build())
    del hub.files[COMMITS[0]][missing]
    with pytest.raises(RemoteEntryNotFoundError, match=f"Entry Not Found for url: .*{missing}"):
        TreeVAE.from_pretrained("user/name", **cache)


def test_errors_of_the_hub_come_as_they_are(hub: FakeHub, cache: dict[str, Any]) -> None:
    commit(hub, build())
    with pytest.raises(RevisionNotFoundError, match="Revision Not Found for url"):
        TreeVAE.from_pretrained("user/name", revision="v2", **cache)
    with pytest.raises(LocalEntryNotFoundError, match="outgoing traffic has been disabled"):
        TreeVAE.from_pretrained("user/name", local_files_only=True, **cache)


def test_a_folder_that_is_here_comes_first(hub: FakeHub, cache: dict[str, Any]) -> None:
    model, other = build(seed=1), build(seed=2)
    commit(hub, model)
    Path("user").mkdir()
    message = "there is a folder 'user' here, but no 'user/name'; nothing was downloaded. If you mean a repository"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        TreeVAE.from_pretrained("user/name", **cache)
    assert hub.asked == []
    check_same(TreeVAE.from_pretrained("user/name", revision="main", **cache), model)
    other.save_pretrained("user/name")
    hub.asked.clear()
    check_same(TreeVAE.from_pretrained("user/name", revision="main", **cache), other)
    assert hub.asked == []


# --- pushing ------------------------------------------------------------------------------------------------


def test_three_files_are_pushed(pushed: Pushed) -> None:
    model = build()
    assert model.push_to_hub("user/name") == "https://hub.example/user/name/commit/1"
    model.save_pretrained("local")
    assert pushed.folder.keys() == {MODEL_FILE, CONFIG_FILE, CARD_FILE}
    assert pushed.of("upload_folder")["allow_patterns"] == [MODEL_FILE, CONFIG_FILE, CARD_FILE]
    for name in (MODEL_FILE, CONFIG_FILE):
        assert pushed.folder[name] == Path("local", name).read_bytes()
    card = ModelCard(pushed.folder[CARD_FILE].decode())
    assert card.data.library_name == "treediff" and 'TreeVAE.from_pretrained("user/name")' in card.text


def test_the_full_name_of_a_repository_of_ones_own(pushed: Pushed) -> None:
    build().push_to_hub("name")
    assert pushed.of("upload_folder")["repo_id"] == pushed.of("file_exists")["repo_id"] == "me/name"
    assert 'from_pretrained("me/name")' in pushed.folder[CARD_FILE].decode()


def test_a_card_on_the_hub_stays(pushed: Pushed) -> None:
    pushed.there.add(CARD_FILE)
    build().push_to_hub("user/name", branch="other")
    assert pushed.of("file_exists") == {"repo_id": "user/name", "filename": CARD_FILE, "revision": "other"}
    assert pushed.of("upload_folder")["allow_patterns"] == [MODEL_FILE, CONFIG_FILE]


def test_a_folder_can_be_saved_and_pushed_at_once(pushed: Pushed) -> None:
    folder = Path("deep", "model")
    folder.mkdir(parents=True)
    (folder / CARD_FILE).write_text("my own")
    (folder / "notes.txt").write_text("not to be pushed")
    model = build()
    found = model.save_pretrained(folder, push_to_hub=True, private=True, token="secret", commit_message="First.")
    assert found == "https://hub.example/me/model/commit/1"
    assert pushed.of("create_repo") == {"repo_id": "model", "private": True, "exist_ok": True}
    assert pushed.of("upload_folder")["commit_message"] == "First." and pushed.tokens == ["secret"]
    assert pushed.of("upload_folder")["allow_patterns"] == [MODEL_FILE, CONFIG_FILE, CARD_FILE]
    assert pushed.folder[CARD_FILE] == b"my own"
    check_same(TreeVAE.from_pretrained(folder), model)


def test_nothing_is_left_of_the_folder_that_is_pushed(pushed: Pushed) -> None:
    seen: list[Path] = []

    def fail(folder: Path) -> None:
        seen.append(folder)
        raise OSError("no connection")

    pushed.then = fail
    with pytest.raises(OSError, match="no connection"):
        build().push_to_hub("user/name")
    assert len(seen) == 1 and not seen[0].exists()

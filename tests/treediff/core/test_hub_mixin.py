"""The methods that share a model, held against those of huggingface_hub's own mixin."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Self

import pytest
from hubs import Pushed
from huggingface_hub import ModelCard, ModelHubMixin, constants, hub_mixin
from models import build
from shared_models import check_same
from torch import nn

from treediff import TreeVAE
from treediff.core.hub import Pretrained
from treediff.core.hub_repository import CARD_FILE, CONFIG_FILE, MODEL_FILE


class Mixed(ModelHubMixin):
    """What huggingface_hub makes of a class that leaves files to a TreeVAE."""

    def __init__(self, tree: TreeVAE) -> None:
        self.tree = tree

    def _save_pretrained(self, save_directory: Path) -> None:
        self.tree.save(save_directory / constants.SAFETENSORS_SINGLE_FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any], **_: Any) -> Self:  # noqa: ANN401
        made = cls(TreeVAE.load(Path(model_id) / constants.SAFETENSORS_SINGLE_FILE))
        assert made.tree.config == config["config"]
        return made


# What the mixin takes and this library does not: its own file is the configuration, and the card is one to edit.
LEFT_OUT = {
    "save_pretrained": {"config", "model_card_kwargs"},
    "from_pretrained": set(),
    "push_to_hub": {"config", "model_card_kwargs", "allow_patterns", "ignore_patterns", "delete_patterns"},
}


@pytest.mark.parametrize("method", LEFT_OUT)
def test_signatures_are_those_of_the_mixin(method: str) -> None:
    ours, theirs = (inspect.signature(getattr(cls, method)).parameters for cls in (Pretrained, ModelHubMixin))
    rest = {name for name, parameter in theirs.items() if parameter.kind is parameter.VAR_KEYWORD}
    assert ours.keys() - {"pushing", "loading"} == theirs.keys() - rest - LEFT_OUT[method]
    for name in ours.keys() & theirs.keys():
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default), name


def test_names_of_files_are_those_of_the_mixin(tmp_path: Path) -> None:
    model = build()
    Mixed(model).save_pretrained(tmp_path / "theirs", config={})
    model.save_pretrained(tmp_path / "ours")
    assert os.listdir(tmp_path / "ours") and sorted(os.listdir(tmp_path / "ours")) == sorted(
        os.listdir(tmp_path / "theirs")
    )
    names = (constants.SAFETENSORS_SINGLE_FILE, constants.CONFIG_NAME, constants.REPOCARD_NAME)
    assert (MODEL_FILE, CONFIG_FILE, CARD_FILE) == names
    one, two = (ModelCard.load(tmp_path / whose / CARD_FILE).data.to_dict() for whose in ("ours", "theirs"))
    assert one.keys() <= two.keys() | {"library_name"}


def test_the_mixin_reads_what_this_library_writes(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    found = Mixed.from_pretrained(tmp_path)
    check_same(found.tree, model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "commit_message": "First.",
            "private": True,
            "token": "secret",
            "branch": "other",
            "create_pr": True,
        },
    ],
)
def test_the_hub_is_told_what_the_mixin_tells_it(pushed: Pushed, settings: dict[str, Any]) -> None:
    told = {}
    for name, model in {"ours": build(), "theirs": Mixed(build())}.items():
        model.push_to_hub("user/name", **settings)
        told[name] = {call: pushed.of(call) for call in ("create_repo", "upload_folder")}
        pushed.calls.clear()
    assert len(set(pushed.tokens)) == 1
    assert told["ours"]["create_repo"] == told["theirs"]["create_repo"]
    ours, theirs = told["ours"]["upload_folder"], told["theirs"]["upload_folder"]
    assert {**ours, "allow_patterns": None} == {
        name: value for name, value in theirs.items() if name not in ("ignore_patterns", "delete_patterns")
    }


def test_the_cache_is_asked_as_the_mixin_asks_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first of the two files; the second follows from it."""
    asked: list[dict[str, Any]] = []

    def found(repo_id: str, filename: str, **settings: Any) -> str:  # noqa: ANN401
        asked.append({"repo_id": repo_id, "filename": filename, **settings})
        raise LookupError("enough")

    monkeypatch.setattr(hub_mixin, "hf_hub_download", found)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", found)
    settings: dict[str, Any] = {"revision": "v1", "cache_dir": str(tmp_path), "force_download": True}
    settings |= {"token": "secret", "local_files_only": True}
    for chosen in ({}, settings):
        for cls in (TreeVAE, Mixed):
            with pytest.raises(LookupError, match="enough"):
                cls.from_pretrained("user/name", **chosen)
        ours, theirs = asked
        assert ours == theirs and ours["filename"] == "config.json"
        asked.clear()


def test_models_are_no_subclasses_of_the_mixin() -> None:
    """So that importing them needs no extra; see `treediff.core.hub`."""
    assert issubclass(TreeVAE, Pretrained) and not issubclass(TreeVAE, ModelHubMixin)
    assert isinstance(build(), nn.Module)

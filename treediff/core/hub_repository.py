"""What is said to Hugging Face's hub, by huggingface_hub, which is imported here and only when it is needed."""

from __future__ import annotations

import os
import re
import sys
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["CARD_FILE", "CONFIG_FILE", "MODEL_FILE", "Upload", "card", "check_repository", "download"]

#: How the files of a model are called on the hub.
MODEL_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"

Path = str | os.PathLike[str]
_PART = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}(?<!\.safetensors)(?<!\.git)", re.ASCII)


def check_repository(given: Path, revision: str | None) -> None:
    """Raise FileNotFoundError unless a name, which is no path of anything here, can only mean a repository."""
    name = os.fspath(given)
    if not isinstance(given, str) or not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"there is no folder or file {name!r}, and it is not the name of a repository, which is text like "
            "'user/name'; nothing was downloaded"
        )
    user = name.partition("/")[0]
    if os.path.isdir(user) and revision is None:
        raise FileNotFoundError(
            f"there is a folder {user!r} here, but no {name!r}; nothing was downloaded. If you mean a repository of "
            "that name, say of which revision, as in revision='main'"
        )


def download(repo_id: str, file: str, **settings: Any) -> str:  # noqa: ANN401
    """The path of a file of a repository in the cache, where it is put if it is not there.

    Args:
        repo_id: 'user/name'.
        file: its name.
        **settings: of `huggingface_hub.hf_hub_download`.

    Raises:
        ImportError: if huggingface_hub is missing. Its errors come as they are.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder or file {repo_id!r}, and fetching a repository of that name needs huggingface_hub "
            f"({error}): pip install 'treediff[hub]'"
        ) from None
    path: str = hf_hub_download(repo_id, file, **settings)
    return path


class Upload:
    """A repository to write to; it is made if there is none.

    Args:
        repo_id: 'user/name', or 'name' for one of your own.
        commit_message: what the commit says.
        private: whether a new repository is private.
        token: who pushes.
        branch: where to commit.
        create_pr: whether to open a pull request instead.

    Attributes:
        repo_id: 'user/name'.

    Raises:
        ImportError: if huggingface_hub is missing. Its errors come as they are.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> None:
        self._api = _api(token)
        self._settings: dict[str, Any] = {"commit_message": commit_message, "revision": branch, "create_pr": create_pr}
        self.repo_id = self._api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id

    def send(self, folder: str) -> str:
        """Upload a model's files, its card only where there is none; returns the address of the commit."""
        files = [MODEL_FILE, CONFIG_FILE]
        if not self._api.file_exists(self.repo_id, CARD_FILE, revision=self._settings["revision"]):
            files.append(CARD_FILE)  # else somebody may have written into it, a licence for one
        sent = self._api.upload_folder(
            repo_id=self.repo_id, repo_type="model", folder_path=folder, allow_patterns=files, **self._settings
        )
        return str(sent)


def _api(token: str | None) -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            f"pushing a model needs huggingface_hub ({error}): pip install 'treediff[hub]'. save_pretrained writes the "
            "same folder without it"
        ) from None
    return HfApi(token=token)


def card(model: type, note: str, repo_id: str) -> str:
    """A short model card: what the hub reads, how the model is loaded, and a note."""
    name, package = model.__name__, model.__module__.partition(".")[0]
    tags = ["treediff", *({package} - {"treediff", "__main__"}), name]
    modules = accumulate(model.__module__.split("."), "{}.{}".format)  # the outermost is the public one
    found = (module for module in modules if getattr(sys.modules.get(module), name, None) is model)
    where = next(found, model.__module__)
    lines = ["---", "library_name: treediff", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    lines += [f"A `{name}`, saved by `{package}`. It is loaded by", "", "```python", f"from {where} import {name}", ""]
    lines += [f'model = {name}.from_pretrained("{repo_id}")  # or the path of a folder with these files', "```", ""]
    lines += [note, ""] if note else []
    return "\n".join(lines)

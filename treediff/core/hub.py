"""Sharing of models: a folder in the layout of model hubs, and the transfer to and from Hugging Face's hub.

    model.safetensors     the model, the very file that its `save` writes
    config.json           the model's configuration, for people and for the hub
    README.md             a model card, written where there is none

A model is read from model.safetensors alone. huggingface_hub is imported only when a repository is named.
"""

from __future__ import annotations

import json
import os
import re
import sys
from itertools import accumulate
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

from treediff.core.io import write_file

__all__ = ["Savable", "pull", "push", "write_folder"]

Path = str | os.PathLike[str]
_MODEL, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_PART = r"[A-Za-z0-9_](?:[\w.-]*\w)?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}(?<!\.safetensors)(?<!\.git)", re.ASCII)


class Savable(Protocol):
    """Model or encoder with `save` and `load`; attributes `config`, `card_note` and `check_sharing` are used."""

    def save(self, path: Path) -> None:
        """Write one file."""

    @classmethod
    def load(cls, path: Path) -> Any:  # noqa: ANN401 - an object of the class
        """Read a file of `save`; may take more arguments by name."""


Model = TypeVar("Model", bound=Savable)


def write_folder(model: Savable, folder: Path, *, repo_id: str = "user/name") -> None:
    """Write a model, its configuration, and a model card to a folder; an existing card stays.

    Args:
        model: a model with `save`.
        folder: made if there is none.
        repo_id: name in the card of the repository that the model is loaded from.

    Raises:
        NotADirectoryError: if `folder` is a file.
        ValueError: if the model cannot be saved as one file.

    Examples:
        >>> import os, tempfile
        >>> from treediff import TreeVAE
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_folder(TreeVAE.for_images(size=8, latent=4), folder)
        ...     print(sorted(os.listdir(folder)), pull(TreeVAE, folder).latent)
        ['README.md', 'config.json', 'model.safetensors'] (4,)
    """
    if os.path.isfile(folder):
        raise NotADirectoryError(f"expected a folder, found the file {os.fspath(folder)!r}; model.save writes one file")
    getattr(model, "check_sharing", lambda: None)()
    os.makedirs(folder, exist_ok=True)
    path, config, readme = (os.path.join(folder, name) for name in (_MODEL, _CONFIG, _CARD))
    model.save(path)
    about = {"class": type(model).__name__, "config": getattr(model, "config", None)}
    write_file(config, f"{json.dumps(about, indent=2, sort_keys=True)}\n".encode())
    if not os.path.exists(readme):
        write_file(readme, _card(type(model), repo_id).encode())


def push(
    model: Savable,
    repo_id: str,
    *,
    private: bool,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload a model to a repository on Hugging Face's hub; a missing repository is made.

    A model card that the repository has stays unchanged. All readers of the repository can read all content of the
    file, and the repository's history keeps all content that is replaced later. For a model with a memory, this content
    includes the rows of all instances.

    Args:
        model: a model with `save`.
        repo_id: 'user/name', or 'name' for a repository of the account.
        private: whether a new repository is private; an existing repository is not changed.
        token: of the account; by default the token that `hf auth login` keeps.
        revision: branch to commit to; the main branch by default.
        create_pr: whether to open a pull request instead.
        commit_message: of the commit.

    Returns:
        the address of the commit.

    Raises:
        ImportError: if huggingface_hub is missing. Errors of huggingface_hub are passed on unchanged.
        ValueError: if the model cannot be saved as one file.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            f"pushing a model needs huggingface_hub ({error}): pip install 'treediff[hub]'. write_folder writes "
            "the same folder without it"
        ) from None
    with TemporaryDirectory() as folder:
        getattr(model, "check_sharing", lambda: None)()  # before a repository is made
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        write_folder(model, folder, repo_id=repo_id)
        files = [_MODEL, _CONFIG]
        if not api.file_exists(repo_id, _CARD, revision=revision):
            files.append(_CARD)  # an existing card may have been edited, for example to add a licence
        message = commit_message or f"Upload {type(model).__name__}"
        sent: dict[str, Any] = {"folder_path": folder, "allow_patterns": files, "commit_message": message}
        sent |= {"revision": revision, "create_pr": create_pr}
        try:
            return str(api.upload_folder(repo_id=repo_id, repo_type="model", **sent))
        finally:
            path = os.path.join(folder, _MODEL)
            with open(path, "r+b") as file:  # the file is a copy of rows that may be forgotten later
                file.write(bytes(os.path.getsize(path)))


def pull(
    cls: type[Model],
    source: Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    **loading: Any,  # noqa: ANN401 - each class has its own
) -> Model:
    """Read a model from a folder, a file, or a repository on Hugging Face's hub.

    A name is taken for a repository only if it reads 'user/name', is no path, and there is no folder 'user' here.

    Args:
        cls: class of the model, with `load`.
        source: a folder that `write_folder` wrote, a file that `save` wrote, or 'user/name'; a `pathlib.Path` is never
            a repository.
        revision: branch, tag or commit. With a revision, 'user/name' is a repository even if a folder 'user' is here.
        token: of the account.
        cache_dir: folder that keeps fetched files; huggingface_hub's own folder by default.
        local_files_only: whether to search the cache only.
        **loading: further arguments of `cls.load`.

    Raises:
        FileNotFoundError: if there is no such folder or file, and the name is not a repository's; or if a folder
            lacks model.safetensors.
        ImportError: if a repository is named and huggingface_hub is missing. Errors of huggingface_hub are passed on.
        ValueError: as `cls.load` does.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        name = os.path.join(name, _MODEL)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"there is no {_MODEL} in the folder {os.path.dirname(name)!r}")
    elif not os.path.isfile(name):
        _check_repository(source, revision)
        try:
            from huggingface_hub import hf_hub_download
        except ImportError as error:
            raise ImportError(
                f"there is no folder or file {name!r}, and fetching a repository of that name needs huggingface_hub "
                f"({error}): pip install 'treediff[hub]'"
            ) from None
        settings: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        name = hf_hub_download(name, _MODEL, revision=revision, **settings)
    found: Model = cls.load(name, **loading)
    return found


def _check_repository(source: Path, revision: str | None) -> None:
    """Raise FileNotFoundError unless a name, which is no existing path, can only mean a repository."""
    name = os.fspath(source)
    if not isinstance(source, str) or not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"there is no folder or file {name!r}, and it is not the name of a repository, which is text like "
            "'user/name'; nothing was downloaded"
        )
    user = name.partition("/")[0]
    if os.path.isdir(user) and revision is None:
        raise FileNotFoundError(
            f"there is a folder {user!r} here, but no {name!r}; nothing was downloaded. For a repository of that name, "
            "give a revision, as in revision='main'"
        )


def _card(model: type, repo_id: str) -> str:
    """Return a short model card: metadata for the hub, code that loads the model, and a note of its class."""
    name, package = model.__name__, model.__module__.partition(".")[0]
    tags = ["treediff", *({package} - {"treediff", "__main__"}), name]
    modules = accumulate(model.__module__.split("."), "{}.{}".format)  # the outermost module is the public one
    found = (module for module in modules if getattr(sys.modules.get(module), name, None) is model)
    lines = ["---", "library_name: treediff", "tags:", *(f"- {tag}" for tag in tags), "---", "", f"# {name}", ""]
    lines += [f"A `{name}`, saved by `{package}`. It is loaded by", "", "```python", "from treediff.core import hub"]
    lines += [
        f"from {next(found, model.__module__)} import {name}",
        "",
        f'model = hub.pull({name}, "{repo_id}")',
        "```",
        "",
    ]
    note = getattr(model, "card_note", "")
    return "\n".join([*lines, note, ""] if note else lines)

"""Sharing a model: the folder that model hubs expect, and the way to Hugging Face's hub and back.

    model.safetensors     the model, the very file that its `save` writes
    config.json           what the header of that file says, for people and for the hub
    README.md             a model card, written if there is none

The file alone counts: a config.json that says something else is refused, not followed.

The methods have the names, arguments and layout of huggingface_hub's `ModelHubMixin`, but are not made by it. A class
that inherits from the mixin needs huggingface_hub at import; the mixin also keeps the arguments of `__init__` as a
second configuration, and its version for PyTorch falls back to pickle. So huggingface_hub is imported only when a
repository is named, and tests hold these methods against the mixin.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from treediff.core.hub_repository import CARD_FILE, CONFIG_FILE, MODEL_FILE, Upload, card, check_repository, download
from treediff.core.io import read_header, write_file

__all__ = ["Pretrained"]

Path = str | os.PathLike[str]


class Pretrained(ABC):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, for a class that has `save` and `load`.

    Attributes:
        card_note: what the model card warns of.

    Examples:
        >>> import os, tempfile
        >>> from treediff import TreeVAE
        >>> model = TreeVAE.for_images(size=8, latent=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     print(sorted(os.listdir(folder)), TreeVAE.from_pretrained(folder).latent)
        ['README.md', 'config.json', 'model.safetensors'] (4,)
    """

    card_note: ClassVar[str] = ""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write one file; each class has its own."""

    @classmethod
    @abstractmethod
    def load(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Read what `save` wrote; each class has its own."""

    def save_pretrained(
        self,
        save_directory: Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **pushing: Any,  # noqa: ANN401
    ) -> str | None:
        """Write the model to a folder.

        Whatever interrupts, the folder holds the old model or the new one. A model card that is there stays.

        Args:
            save_directory: the folder, made if there is none.
            push_to_hub: whether to upload the folder's three files as well.
            repo_id: where to, 'user/name'; by default a repository of your own with the name of the folder.
            **pushing: settings of `push_to_hub`.

        Returns:
            the address of the commit if the model was pushed, else None.

        Raises:
            NotADirectoryError: if `save_directory` is a file.
            TypeError: if there are settings of `push_to_hub`, but nothing is to be pushed.
            ImportError: if the model is to be pushed and huggingface_hub is missing.
        """
        folder, upload = os.fspath(save_directory), None
        if os.path.isfile(folder):
            raise NotADirectoryError(f"expected a folder, found the file {folder!r}; save(path) writes a single file")
        self._check_sharing(push=push_to_hub, private=pushing.get("private"))
        if push_to_hub:
            upload = Upload(repo_id or os.path.basename(os.path.abspath(folder)), **pushing)
        elif pushing or repo_id is not None:
            given = sorted([*pushing, *(["repo_id"] if repo_id is not None else [])])
            raise TypeError(f"{', '.join(given)} say how to push the model; add push_to_hub=True, or leave them out")
        self._write(folder, "user/name" if upload is None else upload.repo_id)
        return None if upload is None else upload.send(folder)

    def _write(self, folder: str, repo_id: str) -> None:
        os.makedirs(folder, exist_ok=True)
        model, config, readme = (os.path.join(folder, name) for name in (MODEL_FILE, CONFIG_FILE, CARD_FILE))
        if os.path.exists(config):  # first, as it is of the old model, and a folder without one can be loaded
            os.remove(config)
        self.save(model)
        text = json.dumps(self._shown(read_header(model, type(self).__name__)), indent=2, sort_keys=True)
        write_file(config, f"{text}\n".encode())
        if not os.path.exists(readme):
            write_file(readme, card(type(self), self.card_note, repo_id).encode())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **loading: Any,  # noqa: ANN401
    ) -> Self:
        """Read a model from a folder, from a file, or from a repository on the hub.

        From a repository config.json and model.safetensors are fetched, both of one commit, and nothing else. A name
        is looked for on the hub only if it reads 'user/name' and is neither a path nor in a folder that is here.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, a file that `save` wrote, or
                'user/name'. A `pathlib.Path` is never a repository.
            force_download: whether to fetch again what is in the cache; this and what follows is for repositories.
            token: who asks; by default what `hf auth login` keeps, False for nobody.
            cache_dir: where fetched files are kept; huggingface_hub's own place by default.
            local_files_only: whether to look in the cache only.
            revision: branch, tag or commit. With one, a name 'user/name' is a repository even if a folder 'user' is
                here.
            **loading: passed on to `load`.

        Raises:
            FileNotFoundError: if there is no such folder or file, and the name is not that of a repository; if a folder
                lacks model.safetensors.
            ImportError: if a repository is named and huggingface_hub is missing.
            ValueError: if config.json is damaged, of another class, or says something else than the file; and as `load`
                does. Errors of huggingface_hub come as they are.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(name):
            return cls.load(name, **loading)
        if not os.path.isdir(name):
            check_repository(pretrained_model_name_or_path, revision)
            settings: dict[str, Any] = {"force_download": force_download, "token": token, "cache_dir": cache_dir}
            settings |= {"local_files_only": local_files_only}
            config = download(name, CONFIG_FILE, revision=revision, **settings)
            _read_config(config, cls.__name__)  # before a large file is fetched that is of no use
            # Files are kept in a folder named after their commit; by its name no push in between mixes two models.
            commit = os.path.basename(os.path.dirname(config))
            name = os.path.dirname(download(name, MODEL_FILE, revision=commit, **settings))
        return cls.load(cls._model_in(name), **loading)

    @classmethod
    def _model_in(cls, folder: str) -> str:
        """The file of the model in a folder, once it is sure that config.json agrees with it."""
        model, config = os.path.join(folder, MODEL_FILE), os.path.join(folder, CONFIG_FILE)
        if not os.path.isfile(model):
            found = ", ".join(sorted(os.listdir(folder))[:5]) or "nothing"
            raise FileNotFoundError(
                f"there is no {MODEL_FILE} in the folder {folder!r} (it holds {found}); expected what save_pretrained "
                "writes. What save wrote is read by from_pretrained(file) or load"
            )
        if os.path.isfile(config):
            told = _read_config(config, cls.__name__)
            for key, value in sorted(cls._shown(read_header(model, cls.__name__)).items()):
                if key not in told or told[key] != value:
                    raise ValueError(
                        f"{config!r} says something else than the model's file at {key!r}: {told.get(key)!r}, the file "
                        f"has {value!r}. The file is what counts: remove {CONFIG_FILE}, or save the model again"
                    )
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the model to a repository, which is made if there is none.

        A model card that the repository has stays as it is.

        Args:
            repo_id: 'user/name'.
            commit_message: what the commit says.
            private: whether a new repository is private; None for the default of the account, which is mostly public.
                A repository that exists stays what it is.
            token: who pushes; by default what `hf auth login` keeps.
            branch: where to commit; the main branch by default.
            create_pr: whether to open a pull request instead.

        Returns:
            the address of the commit.

        Raises:
            ImportError: if huggingface_hub is missing. Its errors come as they are.
        """
        settings: dict[str, Any] = {"commit_message": commit_message, "private": private, "token": token}
        settings |= {"branch": branch, "create_pr": create_pr}
        with self._scratch() as folder:
            return str(self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **settings))

    # --- what a class may change --------------------------------------------------------------------------

    @classmethod
    def _shown(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json tells of the header of a file."""
        return dict(header)

    def _check_sharing(self, *, push: bool, private: bool | None) -> None:  # noqa: B027, a hook
        """Raise if the model cannot be saved or must not be pushed like this; nothing is written before."""

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        """A folder for the files on their way to the hub."""
        with TemporaryDirectory() as folder:
            yield folder


def _read_config(path: str, expected_class: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path!r} is not JSON ({type(error).__name__}: {error}); the model's file is what counts: remove "
            f"{CONFIG_FILE}, or save the model again"
        ) from None
    found = config.get("class") if isinstance(config, dict) else None
    if found != expected_class:
        whose = f"is of a {found}" if isinstance(found, str) else "names no class, as save_pretrained does"
        raise ValueError(f"{path!r} {whose}, expected a {expected_class}")
    return dict(config)

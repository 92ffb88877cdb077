"""What a `KeyMemoryTransformer` has to do with files, folders and model hubs.

Its file holds the memory. On a hub that has a meaning of its own: whoever can read the repository can read every row,
and the hub's history keeps a row that the model has forgotten.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, cast

from munkey import files
from munkey.encoders.base import KeyEncoder
from munkey.sharded import ShardedKeyStore
from munkey.store.file.disk import Disk, wipe
from treediff.core.hub import Pretrained
from treediff.core.hub_repository import MODEL_FILE

__all__ = ["Saved"]


class Saved(Pretrained):
    """`save` and `load`, and what `Pretrained` makes of them.

    `save_pretrained` wipes the file that it replaces, as `save` does, and config.json tells nothing of the rows nor the
    store's secret. The model's file does; see `push_to_hub`.
    """

    card_note: ClassVar[str] = (
        "The file holds the memory: keys, values, labels and ids of the instances that the model was given, and the "
        "secret of its store. What is deleted from the memory later stays in the history of this repository."
    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, memory and, if it is one of the library's own, the key encoder to one file.

        What was stored and forgotten leaves no trace in it: the same content gives the same bytes. A file that was
        there before stays whole until the new one is, and is then overwritten.

        Raises:
            OSError: if the file cannot be written; the old one is whole.
        """
        files.save(self._savable(), path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        key_encoder: KeyEncoder | None = None,
        model: Self | None = None,
        receipts: str | os.PathLike[str] | Literal[False] | None = None,
    ) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            key_encoder: the encoder that the keys are from; needed unless it is one of the library's own.
            model: a model that was built from parts the same way, to be filled.
            receipts: a log; what it says is gone is forgotten again, see `KeyStore.keep_receipts`. A model whose memory
                kept a log is loaded with it, or, if that is meant, without: False.

        Raises:
            FileNotFoundError: if there is no such file, or no such log.
            ValueError: if it is damaged or of another kind, does not fit, its keys are from another encoder, or a log
                is missing.
        """
        return files.load(cls, path, key_encoder, model, receipts)  # type: ignore[type-var]

    def _savable(self) -> files.Savable:
        return cast("files.Savable", self)

    # --- on a hub -----------------------------------------------------------------------------------------

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **settings: Any) -> str:  # noqa: ANN401
        """Upload the model to a repository, and with it the memory.

        Whoever can read the repository can read ids, keys, values and labels of all instances that are remembered, and
        the store's secret, by which receipts can be tested against candidate images. What is forgotten later stays in
        the history of the repository, in copies, and in the cache of whoever fetched it: it cannot be called back.

        Args:
            repo_id: 'user/name'.
            private: whether a new repository is private; must be said. A repository that exists stays what it is.
            **settings: `commit_message`, `token`, `branch`, `create_pr`, as for `treediff.core.hub.Pretrained.push_to_hub`.

        Returns:
            the address of the commit.

        Raises:
            ImportError: if huggingface_hub is missing. Its errors come as they are.
            ValueError: if `private` is not given, or the memory is spread over ranks.
        """
        return super().push_to_hub(repo_id, private=private, **settings)

    @classmethod
    def _shown(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """All but the store's secret and what follows from the rows, so that config.json has nothing to forget."""
        store = {name: value for name, value in header["store"].items() if name != "secret"}
        return {**{name: value for name, value in header.items() if name != "digest"}, "store": store}

    def _check_sharing(self, *, push: bool, private: bool | None) -> None:
        store = self._savable().memory.store
        if isinstance(store, ShardedKeyStore):
            raise ValueError(
                "the memory is spread over ranks and saved as a folder of many files, expected one file; call "
                "save(folder) on all ranks, and then load(folder).save_pretrained(...) in one process"
            )
        if push and private is None:
            raise ValueError(
                f"pushing publishes the memory: keys, values and labels of {len(store)} instances, and the store's "
                "secret. The history of the hub keeps what is forgotten later. Say who may see it: private=True or "
                "private=False; a repository that exists stays as it is"
            )

    @contextmanager
    def _scratch(self) -> Iterator[str]:
        with super()._scratch() as folder:
            try:
                yield folder
            finally:
                path = os.path.join(folder, MODEL_FILE)
                if os.path.exists(path):
                    wipe(Disk(), path)

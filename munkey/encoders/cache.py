"""Features of a slow encoder on disk, from which forgetting erases.

Letters: `B` inputs, `D` width of a key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Self

from torch import Tensor

from munkey.encoders.base import KeyEncoder
from munkey.store.change import Change, Removed
from munkey.store.checks import ids_of_inputs, ordered_ids
from munkey.store.durable import DurableStore
from munkey.store.follower import Follower
from munkey.store.store import KeyStore

__all__ = ["FeatureCache"]

Path = str | os.PathLike[str]
_ROWS = 256  # that are encoded before they are written
_STORE, _ABOUT = "features", "encoder.json"


class FeatureCache(Follower):
    """Keys by id, computed once and kept in a folder; a store that the cache follows erases from it.

    The cache is for features that are used again, such as those that several classifiers or whitenings are fitted to.
    It is a `DurableStore` of its own. When an instance is forgotten by a store that the cache follows, its features are
    overwritten on the medium before the store changes. If that fails, nothing is forgotten, and the error says why.

    Args:
        folder: folder of the cache, which is made if it is missing.
        encoder: computes the keys.

    Raises:
        ValueError: if the folder holds features of another encoder.
        BlockingIOError: if another process has the cache open.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from munkey import Projection
        >>> encoder, x = Projection.random((4,), 3), torch.rand(2, 4)
        >>> with FeatureCache(tempfile.mkdtemp(), encoder) as cache:
        ...     features, again = cache([7, 8], x), cache([7, 8])
        ...     cache.forget([7])
        ...     len(cache)
        1
        >>> torch.equal(features, again)
        True
    """

    def __init__(self, folder: Path, encoder: KeyEncoder) -> None:
        self.encoder = encoder
        os.makedirs(folder, exist_ok=True)
        path, about = (os.path.join(os.fspath(folder), name) for name in (_STORE, _ABOUT))
        own = encoder.fingerprint()
        if not os.path.exists(about):
            with open(about, "x", encoding="utf-8") as file:
                json.dump({"fingerprint": own}, file)
        with open(about, encoding="utf-8") as file:
            found = json.load(file)["fingerprint"]
        if found != own:
            raise ValueError(
                f"{os.fspath(folder)!r} holds features of an encoder with fingerprint {found[:12]}, found one with "
                f"{own[:12]}; name another folder"
            )
        self._store = DurableStore.open(path) if os.path.exists(path) else self._new(path)

    def _new(self, path: str) -> DurableStore:
        return DurableStore.create(path, self.encoder.width, 1, scale=0.0, dtype=self.encoder.dtype)

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, instance: int) -> bool:
        return instance in self._store

    def __call__(
        self,
        ids: Iterable[int] | Tensor,
        x: Tensor | None = None,
        *,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """Return keys `(B, D)`, computed for the ids that are not in the cache, and kept.

        Args:
            ids: `(B,)` one id for each input, all different.
            x: `(B, ...)` inputs; not needed if all ids are in the cache.
            progress: wraps the batches, such as `tqdm`.

        Raises:
            KeyError: if an id is not in the cache, and there are no inputs.
            ValueError: if there is not one id for each input, or an id is repeated.
        """
        wanted = ordered_ids(ids) if x is None else ids_of_inputs(ids, x)
        missing = [place for place, instance in enumerate(wanted) if instance not in self._store]
        if missing and x is None:
            raise KeyError(f"{len(missing)} of the ids are not in the cache; pass their inputs")
        for start in progress(range(0, len(missing), _ROWS)):
            places = missing[start : start + _ROWS]
            keys = self.encoder.keys(x[places])  # type: ignore[index]
            self._store.add([wanted[place] for place in places], keys)
            keys.zero_()  # a copy of rows that may be forgotten later
        return self._store.get(wanted).keys

    def forget(self, ids: Iterable[int] | Tensor) -> None:
        """Overwrite the features of instances, on the medium, too; ids that are not in the cache are left out."""
        self._store.forget(ids, missing="ignore")

    def follow(self, store: KeyStore) -> None:
        """Forget what a store forgets, such as `model.memory.store`, until `close`."""
        store.follow(self)

    def write_ahead(self, change: Change) -> None:
        """Erase the features of removed instances; if the store then keeps these, features are computed again."""
        if isinstance(change, Removed):
            self.forget(change.ids)

    def close(self) -> None:
        """Close the file. A store that the cache follows does not forget any more, until `unfollow`."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

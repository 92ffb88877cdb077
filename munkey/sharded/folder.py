"""Folder with the rows of a `ShardedKeyStore`, which any number of ranks can load.

    manifest.json                                    settings, digest, and for each file its rows and their hash
    rows-00000-of-00004-<digest>.safetensors         ids, views, labels, permanent, keys, values, by id and view
    ...
    model-<digest>.safetensors                       of a model with such a memory, all but its rows
    lock                                             empty; locked during a save

A file holds the ids that `munkey.sharded.placement` gives to its rank, for its number of ranks. File names depend on
the content. A save writes new files, then replaces the manifest atomically, and then overwrites and removes the files
of earlier saves. After any interruption the folder holds the old content or the new content. The manifest has a
checksum, and names the files that its save replaced. The next `load` wipes the named files that an interruption left,
and nothing else, unless a save is under way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from munkey.sharded.placement import may_share, owners
from munkey.sharded.ranks import Ranks
from munkey.store.digest import checksum, hash_rows, sum_of
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk, give_back, read_whole, while_whole, wipe, wipe_leftovers, write_whole
from munkey.store.schema import COLUMNS, Rows
from munkey.store.store import KeyStore
from treediff.core.io import dtype_name, dtype_named, model_bytes, read_header, read_tensors

__all__ = ["Shard", "load", "model_file", "save"]

_MANIFEST, _FORMAT, _CLASS = "manifest.json", 1, "ShardedKeyStore"
_LOCK = "lock"
#: Names of the files that a save writes, also while they are written or replaced.
_OURS = re.compile(
    r"(rows-\d{5}-of-\d{5}-[0-9a-f]{16}|model-[0-9a-f]{16})\.safetensors((\.[0-9a-f]{16})?\.munkey-(partial|old))?"
    r"|manifest\.json(\.[0-9a-f]{16})?\.munkey-(partial|old)"
)
_NUMBERED = re.compile(r"\.[0-9a-f]{16}$")


@dataclass(frozen=True)
class Shard:
    """The rows of one rank.

    Args:
        local: the rows.
        digest: function that returns the digest of the rows of all ranks.
    """

    local: KeyStore
    digest: Callable[[], str]


def save(shard: Shard, ranks: Ranks, folder: str, disk: Disk, model: bytes | None = None) -> None:
    """Save a store, see `ShardedKeyStore.save`; rank 0 also writes the file of its `model`, if given."""
    first = ranks.rank == 0
    guard = ranks.agree(lambda: _prepared(folder, disk, model) if first else -1)
    try:
        _save(shard, ranks, folder, disk, model)
    finally:
        if first:
            give_back(disk, guard)


def _save(shard: Shard, ranks: Ranks, folder: str, disk: Disk, model: bytes | None) -> None:
    local, first = shard.local, ranks.rank == 0
    local.distrust_digest()  # values may have changed in ways that PyTorch does not count
    name = f"rows-{ranks.rank:05d}-of-{ranks.size:05d}-{local.digest()[:16]}.safetensors"
    ranks.agree(lambda: write_whole(disk, os.path.join(folder, name), _shard(local)))
    about = {"file": name, "rows": local.used, "hash": f"{local.total():064x}"}
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "class": _CLASS,
        "widths": local.widths,
        "dtype": dtype_name(local.keys.dtype),
        "trained": local.values.requires_grad,
        "seed": local.seed,
        "scale": local.scale,
        "secret": local.secret.hex(),
        "digest": shard.digest(),
        "shards": ranks.gather(about),
        "replaces": ranks.gather(_others(folder, {}) if first else [])[0],
    }
    if (local.labels.shape[1:], local.labels.dtype) != ((), torch.int64):
        manifest["labels"] = [dtype_name(local.labels.dtype), list(local.labels.shape[1:])]
    if model is not None:
        weights = manifest["model"] = f"model-{checksum(model)[:16].decode()}.safetensors"
        ranks.agree(lambda: write_whole(disk, os.path.join(folder, weights), model) if first else None)
    manifest["checksum"] = _checksum(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    ranks.agree(lambda: write_whole(disk, os.path.join(folder, _MANIFEST), text) if first else None)
    ranks.agree(lambda: _wipe(disk, folder, _others(folder, manifest)) if first else None)


def _checksum(manifest: dict[str, Any]) -> str:
    named = {name: value for name, value in manifest.items() if name != "checksum"}
    return checksum(json.dumps(named, sort_keys=True).encode()).decode()


def _prepared(folder: str, disk: Disk, model: bytes | None) -> int:
    """Make a folder if there is none, check that it can be saved to, and return its lock."""
    os.makedirs(folder, exist_ok=True)
    if model is None and os.path.exists(os.path.join(folder, _MANIFEST)) and "model" in _manifest(folder):
        raise ValueError(
            f"{folder!r} holds a model, whose weights would be lost; save the model, or choose another folder"
        )
    guard = _guard(folder, disk)
    if guard < 0:
        raise BlockingIOError(f"another process saves to {folder!r} at this moment; save to another folder, or later")
    return guard


def _guard(folder: str, disk: Disk) -> int:
    """Return the lock of a folder; -1 if another process holds the lock. The locked file still has its name."""
    path = os.path.join(folder, _LOCK)
    while True:
        guard = disk.open(path, create=True)
        if not disk.lock(guard):
            disk.close(guard)
            return -1
        if disk.is_of(guard, path):
            return guard
        give_back(disk, guard)


def model_file(folder: str) -> str:
    """Return the path of the model file in a folder.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: as for `ShardedKeyStore.load`.
    """
    manifest = _manifest(folder)
    if "model" not in manifest:
        raise FileNotFoundError(f"{folder!r} holds rows, but no model; load them with ShardedKeyStore.load")
    return os.path.join(folder, manifest["model"])


def _shard(local: KeyStore) -> bytes:
    order = local.order()
    with Scratch() as scratch:  # copies of rows that may be forgotten later
        columns = {name: scratch(column[order]) for name, column in zip(COLUMNS, local.columns, strict=True)}
        return model_bytes(_CLASS, columns, {})


def _others(folder: str, manifest: dict[str, Any]) -> list[str]:
    """Return the files of saves that a manifest does not name."""
    named = {shard["file"] for shard in manifest.get("shards", ())} | {manifest.get("model")}
    return [name for name in sorted(os.listdir(folder)) if _OURS.fullmatch(name) and name not in named]


def _wipe(disk: Disk, folder: str, names: list[str]) -> None:
    """Overwrite and remove files of earlier saves."""
    for name in names:
        whole, _, kind = os.path.join(folder, name).partition(".munkey-")
        if kind:  # may be a second name of a file that stays, or a file that is being written
            wipe_leftovers(disk, whole.removesuffix("." + whole[-16:]) if _NUMBERED.search(whole) else whole)
        elif not os.path.islink(whole):
            wipe(disk, whole)
    disk.sync_folder(os.path.join(folder, _MANIFEST))


def _wipe_replaced(disk: Disk, folder: str, manifest: dict[str, Any]) -> None:
    """Wipe the files that an interrupted save replaced and left, unless a save is under way."""
    named = set(manifest.get("replaces", ()))
    left = [name for name in _others(folder, manifest) if name in named]
    if not left:
        return
    guard = _guard(folder, disk)
    if guard < 0:
        return
    try:
        if _manifest(folder) == manifest:  # the manifest may have been replaced since it was read
            _wipe(disk, folder, left)
    finally:
        give_back(disk, guard)


def load(folder: str, ranks: Ranks, disk: Disk) -> tuple[KeyStore, str]:
    """Return the rows of this rank, and the expected digest of the rows of all ranks; see `ShardedKeyStore.load`."""
    manifest = ranks.agree(lambda: _manifest(folder))
    ranks.same("manifest", manifest["digest"])
    ranks.agree(lambda: _check_files(folder, manifest))
    ranks.agree(lambda: _wipe_replaced(disk, folder, manifest) if ranks.rank == 0 else None)
    kind, shape = manifest.get("labels", ["int64", []])
    local = KeyStore(
        *manifest["widths"],
        label_shape=shape,
        label_dtype=torch.float32 if kind == "float32" else torch.int64,
        seed=manifest["seed"],
        scale=manifest["scale"],
        secret=bytes.fromhex(manifest["secret"]),
        dtype=dtype_named(manifest["dtype"], folder),
    )
    local.values.requires_grad_(manifest["trained"])
    ranks.agree(lambda: _take_all(local, folder, manifest, ranks))
    return local, manifest["digest"]


def _take_all(local: KeyStore, folder: str, manifest: dict[str, Any], ranks: Ranks) -> None:
    try:
        _take(local, folder, manifest["shards"], ranks)
    except (OSError, ValueError):
        if _manifest(folder) != manifest:
            raise ValueError(f"{folder!r} was saved to while it was loaded; load it again") from None
        raise


def _check_files(folder: str, manifest: dict[str, Any]) -> None:
    """Raise FileNotFoundError if a file is missing, before anything is wiped."""
    for name in [shard["file"] for shard in manifest["shards"]] + [manifest.get("model")]:
        path = os.path.join(folder, name or _MANIFEST)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path!r}, which the manifest names, is missing; restore a backup")


def _manifest(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, _MANIFEST)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {_MANIFEST} in {folder!r}; is it a folder that ShardedKeyStore.save wrote?")
    try:
        manifest: dict[str, Any] = json.loads(read_whole(Disk(), path).decode())
        if manifest["class"] != _CLASS:
            raise KeyError("class")
        if manifest["format"] != _FORMAT:
            raise ValueError(
                f"{path!r} has format version {manifest['format']}, this munkey reads version {_FORMAT}; install the "
                "release that wrote it"
            )
        # The first release wrote no checksum.
        if ("replaces" in manifest or "checksum" in manifest) and manifest.get("checksum") != _checksum(manifest):
            raise ValueError(f"{path!r} is damaged: its checksum is another one; restore a backup")
        missing = {"widths", "dtype", "trained", "seed", "scale", "secret", "digest", "shards"} - manifest.keys()
        if missing:
            raise KeyError(*sorted(missing))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path!r} is no manifest of a store ({error!r}); restore a backup") from None
    return manifest


def _take(local: KeyStore, folder: str, shards: list[dict[str, Any]], ranks: Ranks) -> None:
    """Read the files that may hold rows of this rank."""
    for number, shard in enumerate(shards):
        if may_share(ranks.rank, ranks.size, number, len(shards)):
            path = os.path.join(folder, shard["file"])
            with Scratch() as scratch:  # copies of rows that may be forgotten later
                rows = Rows(*map(scratch, _read(local, path, shard)))
                mine = owners(rows.ids, ranks.size) == ranks.rank
                if mine.any():
                    local.append(Rows(*(scratch(column[mine]) for column in rows)))
    wrong = local.misfit()
    if wrong:
        raise ValueError(f"{folder!r} holds no store that this library wrote: {wrong}")


def _read(local: KeyStore, path: str, shard: dict[str, Any]) -> list[Tensor]:
    def read(_: int) -> list[Tensor]:
        read_header(path, _CLASS)
        tensors = read_tensors(path)
        return [tensors[name].clone() for name in COLUMNS if name in tensors]  # tensors may be views of the file

    columns = while_whole(Disk(), path, read)
    if len(columns) != len(COLUMNS) or sum_of(hash_rows(local.secret, columns)) != int(shard["hash"], 16):
        raise ValueError(f"{path!r} is damaged: its rows are not those that were saved; restore a backup")
    return columns

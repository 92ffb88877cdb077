"""A folder with the rows of a `ShardedKeyStore`, which any number of ranks can load.

    manifest.json                                    settings, digest, and for each file its rows and their hash
    rows-00000-of-00004-<digest>.safetensors         ids, views, labels, permanent, keys, values, by id and view
    ...
    model-<digest>.safetensors                       of a model with such a memory, all but its rows
    lock                                             empty; held by whoever saves

A file holds the ids that `munkey.sharded.placement` gives to its rank of so many. Names tell content: a save writes new
files, then puts a new manifest in the place of the old one, at once, and then overwrites and removes what it does not
name. Whatever interrupts, the folder holds the old content or the new one; the next `load` wipes what was left, unless
somebody saves at the time.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from munkey.digest import checksum, rows_hash
from munkey.disk import Disk, wipe, wipe_leftovers, write_whole
from munkey.sharded.placement import may_share, owners
from munkey.sharded.ranks import Ranks
from munkey.store import KeyStore
from treediff.io import dtype_name, dtype_named, model_bytes, read_header, read_tensors

if TYPE_CHECKING:
    from munkey.sharded.store import ShardedKeyStore

__all__ = ["load", "model_file", "save"]

_MANIFEST, _FORMAT, _CLASS = "manifest.json", 1, "ShardedKeyStore"
_LOCK = "lock"
#: What a save writes, and how it is called while it is written or replaced.
_OURS = re.compile(
    r"(rows-\d{5}-of-\d{5}-[0-9a-f]{16}|model-[0-9a-f]{16})\.safetensors(\.munkey-(partial|old))?"
    r"|manifest\.json\.munkey-(partial|old)"
)
_COLUMNS = ("ids", "views", "labels", "permanent", "keys", "values")


def save(store: ShardedKeyStore, folder: str, disk: Disk, model: bytes | None = None) -> None:
    """See `ShardedKeyStore.save`; with the file of a model beside the rows, of which that of rank 0 is kept."""
    first = store.ranks.rank == 0
    guard = store.ranks.agree(lambda: _prepared(folder, disk, model) if first else -1)
    try:
        _save(store, folder, disk, model)
    finally:
        if first:
            disk.close(guard)


def _save(store: ShardedKeyStore, folder: str, disk: Disk, model: bytes | None) -> None:
    ranks, local, first = store.ranks, store.local, store.ranks.rank == 0
    local.forget_total()  # values may have been changed past PyTorch's counting
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
        "digest": store.digest(),
        "shards": ranks.gather(about),
    }
    if model is not None:
        weights = manifest["model"] = f"model-{checksum(model)[:16].decode()}.safetensors"
        ranks.agree(lambda: write_whole(disk, os.path.join(folder, weights), model) if first else None)
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    ranks.agree(lambda: write_whole(disk, os.path.join(folder, _MANIFEST), text) if first else None)
    ranks.agree(lambda: _wipe_others(disk, folder, manifest) if first else None)


def _prepared(folder: str, disk: Disk, model: bytes | None) -> int:
    """The lock of a folder, once it is there and can be saved to."""
    os.makedirs(folder, exist_ok=True)
    if model is None and os.path.exists(os.path.join(folder, _MANIFEST)) and "model" in _manifest(folder):
        raise ValueError(
            f"{folder!r} holds a model, whose weights would be lost; save the model, or choose another folder"
        )
    guard = disk.open(os.path.join(folder, _LOCK), create=True)
    if not disk.lock(guard):
        disk.close(guard)
        raise BlockingIOError(f"another process saves to {folder!r} at this moment; save to another folder, or later")
    return guard


def model_file(folder: str) -> str:
    """The file of the model in a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: as for `ShardedKeyStore.load`.
    """
    manifest = _manifest(folder)
    if "model" not in manifest:
        raise FileNotFoundError(f"{folder!r} holds rows, but no model; load them with ShardedKeyStore.load")
    return os.path.join(folder, manifest["model"])


def _shard(local: KeyStore) -> bytes:
    order = local.order()
    columns = {name: column[order] for name, column in zip(_COLUMNS, local.columns, strict=True)}
    data = model_bytes(_CLASS, columns, {})
    for column in columns.values():
        column.zero_()  # a copy of rows that may be forgotten later
    return data


def _others(folder: str, manifest: dict[str, Any]) -> list[str]:
    """Files of saves which the manifest does not name."""
    named = {shard["file"] for shard in manifest["shards"]} | {manifest.get("model")}
    return [name for name in sorted(os.listdir(folder)) if _OURS.fullmatch(name) and name not in named]


def _wipe_others(disk: Disk, folder: str, manifest: dict[str, Any]) -> None:
    """Overwrite and remove what the manifest does not name."""
    for name in _others(folder, manifest):
        whole, _, kind = os.path.join(folder, name).partition(".munkey-")
        if kind:  # perhaps another name of a file that stays
            wipe_leftovers(disk, whole)
        else:
            wipe(disk, whole)
    disk.sync_folder(os.path.join(folder, _MANIFEST))


def _wipe_leftovers(disk: Disk, folder: str, manifest: dict[str, Any]) -> None:
    """Wipe what an interrupted save left, if nobody saves."""
    if not _others(folder, manifest):
        return
    guard = disk.open(os.path.join(folder, _LOCK), create=True)
    try:
        if disk.lock(guard):
            _wipe_others(disk, folder, _manifest(folder))  # which may have been replaced since it was read
    finally:
        disk.close(guard)


def load(folder: str, ranks: Ranks, disk: Disk) -> tuple[KeyStore, str]:
    """The rows of this rank, and the digest that all together must have; see `ShardedKeyStore.load`."""
    manifest = ranks.agree(lambda: _manifest(folder))
    ranks.same("manifest", manifest["digest"])
    ranks.agree(lambda: _wipe_leftovers(disk, folder, manifest) if ranks.rank == 0 else None)
    local = KeyStore(
        *manifest["widths"],
        seed=manifest["seed"],
        scale=manifest["scale"],
        secret=bytes.fromhex(manifest["secret"]),
        dtype=dtype_named(manifest["dtype"], folder),
    )
    local.values.requires_grad_(manifest["trained"])
    ranks.agree(lambda: _take(local, folder, manifest["shards"], ranks))
    return local, manifest["digest"]


def _manifest(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, _MANIFEST)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no {_MANIFEST} in {folder!r}; is it a folder that ShardedKeyStore.save wrote?")
    try:
        with open(path, encoding="utf-8") as file:
            manifest: dict[str, Any] = json.load(file)
        if manifest["class"] != _CLASS:
            raise KeyError("class")
        if manifest["format"] != _FORMAT:
            raise ValueError(
                f"{path!r} has format version {manifest['format']}, this munkey reads version {_FORMAT}; install the "
                "release that wrote it"
            )
        missing = {"widths", "dtype", "trained", "seed", "scale", "secret", "digest", "shards"} - manifest.keys()
        if missing:
            raise KeyError(*sorted(missing))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path!r} is no manifest of a store ({error!r}); restore a backup") from None
    return manifest


def _take(local: KeyStore, folder: str, shards: list[dict[str, Any]], ranks: Ranks) -> None:
    """Read files in which there may be rows of this rank."""
    for number, shard in enumerate(shards):
        if may_share(ranks.rank, ranks.size, number, len(shards)):
            columns = _read(local, os.path.join(folder, shard["file"]), shard)
            mine = owners(columns[0], ranks.size) == ranks.rank
            local.append(*(column[mine] for column in columns))
            for column in columns:
                column.zero_()  # a copy of rows that may be forgotten later


def _read(local: KeyStore, path: str, shard: dict[str, Any]) -> list[Tensor]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path!r}, which the manifest names, is missing; restore a backup")
    read_header(path, _CLASS)
    tensors = read_tensors(path)
    columns = [tensors[name] for name in _COLUMNS if name in tensors]
    if len(columns) != len(_COLUMNS) or rows_hash(local.secret, columns) != int(shard["hash"], 16):
        raise ValueError(f"{path!r} is damaged: its rows are not those that were saved; restore a backup")
    return columns

"""A `KeyMemoryTransformer` as one file.

The file holds weights, memory and, if it is one of the library's own, the key encoder. The same content gives the same
bytes, whatever was stored and forgotten before. The file that it takes the place of is overwritten. A model with its
memory on several ranks is a folder, see `munkey.sharded.files`.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from munkey.conv_encoder import ConvEncoder
from munkey.store.digest import add_tensors
from munkey.store.file.disk import Disk, write_whole
from munkey.store.durable import DurableStore
from munkey.efficientnet import EfficientNetLite0
from munkey.encoders import KeyEncoder, Projection
from munkey.presets import Settings, assemble
from munkey.sharded import ShardedKeyStore
from munkey.sharded import folder as folders
from munkey.store.store import KeyStore
from treediff.io import dtype_name, dtype_named, load_into, model_bytes, read_header, read_tensors, require_config

if TYPE_CHECKING:
    from munkey.model import KeyMemoryTransformer

__all__ = ["load", "save"]

Path = str | os.PathLike[str]

#: Encoders that are made again when a model is loaded; any other one is passed.
_OWN: dict[str, type[KeyEncoder]] = {
    "ConvEncoder": ConvEncoder,
    "EfficientNetLite0": EfficientNetLite0,
    "Projection": Projection,
}
_ENCODER, _ROWS = "key_encoder.", "memory.store."


def save(model: KeyMemoryTransformer, path: Path, disk: Disk | None = None) -> None:
    """Write a model to a file; see `KeyMemoryTransformer.save`."""
    disk, encoder, store, name = disk or Disk(), model.key_encoder, model.memory.store, os.fspath(path)
    about: dict[str, Any] = {"class": type(encoder).__name__, "config": encoder.config}
    about |= {"fingerprint": encoder.fingerprint()}
    header = {
        "config": model.config,
        "dtype": dtype_name(store.values.dtype),
        "key_encoder": about,
        "store": {"seed": store.seed, "scale": store.scale, "secret": store.secret.hex()},
    }
    absent = _absent(encoder, rows=isinstance(store, ShardedKeyStore))
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(absent)}
    header["digest"] = _digest(store.secret, state)
    data = model_bytes(type(model).__name__, state, header)
    if isinstance(store, ShardedKeyStore):
        folders.save(folders.Shard(store.local, store.digest), store.ranks, name, disk, data)
    else:
        write_whole(disk, name, data)


def _absent(encoder: KeyEncoder, *, rows: bool) -> tuple[str, ...]:
    """How the names begin of tensors that are not in the file."""
    return (() if encoder.in_file else (_ENCODER,)) + ((_ROWS,) if rows else ())


def load(
    cls: type[KeyMemoryTransformer],
    path: Path,
    key_encoder: KeyEncoder | None,
    model: KeyMemoryTransformer | None,
) -> KeyMemoryTransformer:
    """Read a model from a file; see `KeyMemoryTransformer.load`."""
    rows = ShardedKeyStore.load(path) if os.path.isdir(path) else None
    path = path if rows is None else folders.model_file(os.fspath(path))
    header = read_header(path, cls.__name__)
    key_encoder = _encoder(header, path, key_encoder if model is None else model.key_encoder)
    secret = bytes.fromhex(header["store"]["secret"])
    if _digest(secret, read_tensors(path)) != header["digest"]:
        raise ValueError(f"{os.fspath(path)!r} is damaged: its tensors are not those that were saved; take a backup")
    if model is None:
        config = dict(require_config(header, path))
        inputs, classes = config.pop("inputs"), config.pop("num_classes")
        settings: Settings = config  # type: ignore[assignment]
        model = assemble(cls, inputs, classes, key_encoder, settings, None, dtype_named(header["dtype"], path))
    store = model.memory.store
    if rows is not None:
        model.memory.store.check_replaceable()
    _check_memory(store, secret, in_folder=rows is not None)
    if rows is not None:  # of a lone process all rows, in an ordinary store
        model.memory.store = rows.local if rows.ranks.size == 1 else cast("KeyStore", rows)
    try:
        load_into(model, path, rows=_ROWS, without=_absent(key_encoder, rows=rows is not None))
    except BaseException:
        model.memory.store = store
        raise
    if rows is None:
        store.seed, store.scale, store.secret = header["store"]["seed"], header["store"]["scale"], secret
    return model


def _encoder(header: dict[str, Any], path: Path, given: KeyEncoder | None) -> KeyEncoder:
    """The encoder that the keys are from."""
    about = header["key_encoder"]
    if given is None and about["class"] in _OWN:
        made = _OWN[about["class"]].from_config(about["config"]).to(dtype_named(header["dtype"], path))
        if made.in_file:  # its weights are still to come
            return made
        given = made
    if given is None:
        raise ValueError(
            f"the keys in {os.fspath(path)!r} are from a {about['class']}, which the file does not hold; pass it as "
            "key_encoder="
        )
    if given.fingerprint() != about["fingerprint"]:
        raise ValueError(
            f"the keys in {os.fspath(path)!r} are from another encoder, a {about['class']} with fingerprint "
            f"{about['fingerprint'][:12]}, found a {type(given).__name__} with {given.fingerprint()[:12]}"
        )
    return given


def _check_memory(store: KeyStore, secret: bytes, *, in_folder: bool) -> None:
    """Raise ValueError if a model's memory cannot be filled from a file."""
    if store.followed:
        raise ValueError("an optimiser or an average follows the model's memory; load first, then attach, or detach it")
    if isinstance(store, DurableStore) and store.secret != secret:
        raise ValueError(
            "the model's memory lives in a file with another secret; load into a model with a KeyStore in memory"
        )
    if store.log is not None and not in_folder and store.secret != secret:
        raise ValueError(
            "the model's memory keeps a log of receipts under another secret; load without model=, and keep another log"
        )
    if isinstance(store, ShardedKeyStore) and not in_folder:
        raise ValueError("the model's memory is spread over ranks; load the file without model=, then call shard()")


def _digest(secret: bytes, state: dict[str, Tensor]) -> str:
    """A keyed digest of tensors by name."""
    digest = hashlib.blake2b(key=secret, digest_size=32)
    add_tensors(digest.update, state)
    return digest.hexdigest()

"""A `KeyMemoryTransformer` as one file.

The file holds weights, memory and, if it is one of the library's own, the key encoder. The same content gives the same
bytes, whatever was stored and forgotten before. The file that it takes the place of is overwritten.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from munkey.conv_encoder import ConvEncoder
from munkey.digest import add_tensors
from munkey.disk import Disk, replacing
from munkey.durable import DurableStore
from munkey.efficientnet import EfficientNetLite0
from munkey.encoders import KeyEncoder, Projection
from munkey.presets import Settings, assemble
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
    state = model.state_dict()
    if not encoder.in_file:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(_ENCODER)}
    header["digest"] = _digest(store.secret, state)
    data = model_bytes(type(model).__name__, state, header)
    with replacing(disk, name) as file:
        disk.write(file, 0, data)
    disk.close(file)


def load(
    cls: type[KeyMemoryTransformer],
    path: Path,
    key_encoder: KeyEncoder | None,
    model: KeyMemoryTransformer | None,
) -> KeyMemoryTransformer:
    """Read a model from a file; see `KeyMemoryTransformer.load`."""
    header = read_header(path, cls.__name__)
    about, fresh = header["key_encoder"], False
    if model is not None:
        key_encoder = model.key_encoder
    if key_encoder is None and about["class"] in _OWN:
        key_encoder = _OWN[about["class"]].from_config(about["config"]).to(dtype_named(header["dtype"], path))
        fresh = key_encoder.in_file
    if key_encoder is None:
        raise ValueError(
            f"the keys in {os.fspath(path)!r} are from a {about['class']}, which the file does not hold; pass it as "
            "key_encoder="
        )
    if not fresh and key_encoder.fingerprint() != about["fingerprint"]:
        raise ValueError(
            f"the keys in {os.fspath(path)!r} are from another encoder, a {about['class']} with fingerprint "
            f"{about['fingerprint'][:12]}, found a {type(key_encoder).__name__} with {key_encoder.fingerprint()[:12]}"
        )
    secret = bytes.fromhex(header["store"]["secret"])
    if _digest(secret, read_tensors(path)) != header["digest"]:
        raise ValueError(f"{os.fspath(path)!r} is damaged: its tensors are not those that were saved; take a backup")
    if model is None:
        config = dict(require_config(header, path))
        inputs, classes = config.pop("inputs"), config.pop("num_classes")
        settings: Settings = config  # type: ignore[assignment]
        model = assemble(cls, inputs, classes, key_encoder, settings, None, dtype_named(header["dtype"], path))
    store = model.memory.store
    if store.holders.followed(store.values):
        raise ValueError("an optimiser or an average follows the model's memory; load first, then attach, or detach it")
    if isinstance(store, DurableStore) and store.secret != secret:
        raise ValueError(
            "the model's memory lives in a file with another secret; load into a model with a KeyStore in memory"
        )
    load_into(model, path, rows=_ROWS, without=None if key_encoder.in_file else _ENCODER)
    store.seed, store.scale, store.secret = header["store"]["seed"], header["store"]["scale"], secret
    return model


def _digest(secret: bytes, state: dict[str, Tensor]) -> str:
    """A keyed digest of tensors by name."""
    digest = hashlib.blake2b(key=secret, digest_size=32)
    add_tensors(digest.update, state)
    return digest.hexdigest()

"""Files of `KeyMemoryTransformer`: one file for each model.

The file holds weights, memory and, if its class is part of the library, the key encoder. The same content gives the
same bytes, whatever was stored and forgotten before. A file that is replaced is overwritten. A model with its memory on
several ranks is a folder, see `munkey.sharded.folder`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar, cast

from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder
from munkey.encoders.conv import ConvEncoder
from munkey.encoders.identity import Identity
from munkey.encoders.perceptron import PerceptronEncoder
from munkey.encoders.projection import Projection
from munkey.memory import KeyValueMemory
from munkey.readout.base import Readout
from munkey.readout.exemplar import ExemplarReadout
from munkey.search.exact import Search, exact
from munkey.search.faiss import FaissSearch
from munkey.sharded import ShardedKeyStore
from munkey.sharded import folder as folders
from munkey.store.digest import check_secret
from munkey.store.durable import DurableStore
from munkey.store.file.disk import Disk, read_whole, wipe, wipe_leftovers, write_whole
from munkey.store.store import KeyStore
from munkey.task import Classification, task_from
from treediff.core.io import (
    add_tensors,
    build,
    described_by,
    dtype_name,
    dtype_named,
    fill,
    model_bytes,
    parse_model,
    require_config,
)
from treediff.core.modes import lasting

__all__ = ["WipedCheckpoints", "load", "save"]

Path = str | os.PathLike[str]

#: Encoders that `load` builds from the file; any other encoder is passed to `load`.
_OWN: dict[str, type[KeyEncoder]] = {
    "ConvEncoder": ConvEncoder,
    "Identity": Identity,
    "PerceptronEncoder": PerceptronEncoder,
    "Projection": Projection,
}
_ENCODER, _ROWS = "key_encoder.", "memory.store."


#: Searches that `load` builds from the file; any other search is passed to `load`, as a function of the store.
_SEARCHES: dict[str, Callable[[KeyStore], Search]] = {"FaissSearch": FaissSearch}
#: Attributes of a transformer's readout that may have been set since the model was built.
_SETTINGS = ("neighbours", "own_token_probability", "drop_input", "drop_exemplar", "stop_gradient", "sparse")
#: Prefixes of the names of tensors in format 1, where a model had a transformer and no other readout.
_MOVED = {"network.": "readout.network.", "aggregation.": "readout.aggregation."}


class MemoryModel(Protocol):
    """A module with a memory and a record of its configuration."""

    key_encoder: KeyEncoder
    memory: KeyValueMemory
    readout: Readout
    mode: str
    config: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the module."""


M = TypeVar("M", bound=MemoryModel)


def save(model: MemoryModel, path: Path, disk: Disk | None = None) -> None:
    """Write a model to a file; see `KeyMemoryTransformer.save`."""
    disk, encoder, store, name = disk or Disk(), model.key_encoder, model.memory.store, os.fspath(path)
    about: dict[str, Any] = {"class": type(encoder).__name__, "config": encoder.config}
    about |= {"fingerprint": encoder.fingerprint()}
    header: dict[str, Any] = {
        "config": _config_of(model),
        "dtype": dtype_name(store.values.dtype),
        "key_encoder": about,
        "store": {"seed": store.seed, "scale": store.scale, "secret": store.secret.hex()},
    }
    if model.memory.search is not exact:
        search = model.memory.search
        header["search"] = getattr(search, "__name__", type(search).__name__)
    absent = _absent(encoder, rows=isinstance(store, ShardedKeyStore))
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(absent)}
    if store.log is not None or store.logged:
        header["store"]["logged"] = True
    header["digest"] = _digest(store.secret, state, header)
    data = model_bytes(type(model).__name__, state, header)
    if isinstance(store, ShardedKeyStore):
        folders.save(folders.Shard(store.local, store.digest), store.ranks, name, disk, data)
    else:
        write_whole(disk, name, data)


def _config_of(model: MemoryModel) -> dict[str, Any] | None:
    """Return the configuration of a model, with its current settings."""
    if model.config is None:
        return None
    factory = next(name for name in model.config if name != "own")
    today = {"mode": model.mode, "metric": model.memory.metric}
    for part in model.readout.modules():
        if isinstance(part, ExemplarReadout) and factory != "for_features":
            today |= {name: getattr(part, name) for name in _SETTINGS}
    arguments = {name: today.get(name, value) for name, value in model.config[factory].items()}
    return {**model.config, factory: arguments}


def _absent(encoder: KeyEncoder, *, rows: bool) -> tuple[str, ...]:
    """Return the prefixes of the names of tensors that are not in the file."""
    return (() if encoder.in_file else (_ENCODER,)) + ((_ROWS,) if rows else ())


def load(
    cls: type[M],
    path: Path,
    key_encoder: KeyEncoder | None,
    model: M | None,
    receipts: Path | Literal[False] | None,
    parts: Mapping[str, Any],
) -> M:
    """Read a model from a file; see `KeyMemoryTransformer.load`."""
    path, rows = os.fspath(path), None
    if os.path.isdir(path):
        folder, before = path, None
        with suppress(OSError, ValueError):  # all ranks raise the error together in the next line
            before = folders.model_file(folder)
        rows = ShardedKeyStore.load(folder)
        path = folders.model_file(folder)
        if path != before:
            raise ValueError(f"{folder!r} was saved to while it was loaded; load it again")
    data = _read(path)
    try:
        header, tensors = parse_model(data, path, cls.__name__)
        made = _made(cls, header, tensors, path, key_encoder, model, rows, receipts, parts)
    finally:
        data[:] = bytes(len(data))  # a copy of rows that may be forgotten later
    if receipts is not None and receipts is not False:
        made.memory.store.keep_receipts(receipts)
    return made


def _read(path: str) -> bytearray:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no model file at {path!r}")
    return read_whole(Disk(), path)


def _made(
    cls: type[M],
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str,
    key_encoder: KeyEncoder | None,
    model: M | None,
    rows: ShardedKeyStore | None,
    receipts: Path | Literal[False] | None,
    parts: Mapping[str, Any],
) -> M:
    search = _search(header.get("search"), parts.get("search"), path) if model is None else None
    parts = {name: part for name, part in parts.items() if name != "search"}
    with described_by(path, header.get("config")):
        about = dict(header["store"])
        secret = check_secret(bytes.fromhex(about["secret"]))
        encoder = _encoder(header, path, key_encoder if model is None else model.key_encoder)
        # In the first release the digest did not cover the header.
        if header["digest"] not in (_digest(secret, tensors, header), _digest(secret, tensors)):
            raise ValueError(f"{path!r} is damaged: its content is not what was saved; take a backup")
        if about.get("logged") and receipts is None:
            raise ValueError(
                f"{path!r} was saved beside a log of receipts, without which a restored backup holds forgotten "
                "instances again; pass the log as receipts=, or receipts=False to load it without one"
            )
        if model is None:
            config = _today(require_config(header, path))
            arguments: dict[str, Any] = {"key_encoder": encoder, "dtype": dtype_named(header["dtype"], path)}
            with lasting():
                config, own = _with_task(config, parts)
                model = build(cls, config, path, own, **arguments)
    later = {name: x for name, x in model.state_dict().items() if name.endswith(".known")}  # than some files
    _fill(model, {**later, **{_moved(name): x for name, x in tensors.items()}}, path, encoder, rows, secret)
    if rows is None:
        store = model.memory.store
        store.seed, store.scale, store.secret = about["seed"], about["scale"], secret
    if search is not None:
        model.memory.search = search(model.memory.store)
    return model


def _search(
    name: str | None, given: Callable[[KeyStore], Search] | None, path: str
) -> Callable[[KeyStore], Search] | None:
    """Return the function that builds the search of a model; None for exact search."""
    if name is None or given is not None:
        return given
    if name not in _SEARCHES:
        raise ValueError(
            f"the memory in {path!r} was searched by {name}, which the file does not hold; pass a function that "
            "builds one from a store as search="
        )
    return _SEARCHES[name]


def _today(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in the current form.

    In format 1, inputs and classes are beside the settings. Before there were other readouts, every model had a
    transformer, which was trained in another way.
    """
    if "inputs" in config:
        inputs = dict(config["inputs"])
        settings = {k: v for k, v in config.items() if k not in ("inputs", "num_classes")}
        factory = "for_images" if "channels" in inputs else "for_vectors"
        if "count" in inputs:
            inputs["tokens"] = inputs.pop("count")
        config = {factory: {**inputs, **settings, "task": Classification(config["num_classes"]).config()}}
    for factory in {"for_images", "for_vectors"} & config.keys():
        given = dict(config[factory])
        if "readout" not in given:
            given |= {"readout": "transformer", "stop_gradient": False}
            if given.get("own_token_probability") is None:
                given["own_token_probability"] = float(given.get("mode") == "paper")
        config = {**config, factory: given}
    return config


def _moved(name: str) -> str:
    """Return the present name of a tensor."""
    old = next((old for old in _MOVED if name.startswith(old)), "")
    return _MOVED.get(old, "") + name.removeprefix(old)


def _with_task(config: dict[str, Any], parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a configuration without its task, and the parts with the task; a custom task stays a part."""
    factory = next((name for name in config if name != "own"), "")
    arguments = dict(config.get(factory) or {})
    task = arguments.pop("task", None)
    own = {**config.get("own", {}), "task": "Task"}
    made = parts if "task" in parts else {**parts, "task": task_from(task)}
    return {factory: arguments, "own": own}, dict(made)


def _fill(
    model: MemoryModel,
    tensors: dict[str, Tensor],
    path: str,
    encoder: KeyEncoder,
    rows: ShardedKeyStore | None,
    secret: bytes,
) -> None:
    memory, store = model.memory, model.memory.store
    if rows is not None:
        store.check_replaceable()
    _check_memory(store, secret, in_folder=rows is not None)
    if rows is not None:  # a single process holds all rows, in an ordinary store
        memory.store = rows.alone() if rows.ranks.size == 1 else cast("KeyStore", rows)
    try:
        fill(cast("nn.Module", model), tensors, path, rows=_ROWS, without=_absent(encoder, rows=rows is not None))
    except BaseException:
        memory.store = store
        raise


def _encoder(header: dict[str, Any], path: Path, given: KeyEncoder | None) -> KeyEncoder:
    """Return the encoder that computed the keys."""
    about = header["key_encoder"]
    if given is None and about["class"] in _OWN:
        made = _OWN[about["class"]].from_config(about["config"]).to(dtype_named(header["dtype"], path))
        if made.in_file:  # its weights are filled in later
            return made
        given = made
    if given is None:
        raise ValueError(
            f"the keys in {os.fspath(path)!r} are from a {about['class']}, which the file does not hold; pass it as "
            "key_encoder="
        )
    if about["fingerprint"] not in (given.fingerprint(), given.fingerprint_as(about["class"], about["config"])):
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


def _digest(secret: bytes, state: dict[str, Tensor], header: dict[str, Any] | None = None) -> str:
    """Return a keyed digest of tensors by name, and of a header without the fields that are added later."""
    digest = hashlib.blake2b(key=secret, digest_size=32)
    add_tensors(digest.update, state)
    if header is not None:
        covered = {name: value for name, value in header.items() if name not in ("digest", "format", "class")}
        digest.update(json.dumps(covered, sort_keys=True).encode())
    return digest.hexdigest()


class WipedCheckpoints:
    """Checkpoints that are overwritten before they are replaced or removed.

    A checkpoint of a model with a memory holds keys, values and their moments, and `forget` does not reach the
    checkpoint. An interrupted run leaves a checkpoint: resume the run, or delete the checkpoint with `remove`. Rows are
    saved by id and view, moments of an optimiser in their current order. Call `model.memory.store.compact()` whenever
    rows were added or removed, so that rows and moments are in the same order.

    Args:
        disk: reads and writes files.

    Examples:
        >>> import tempfile
        >>> files, path = WipedCheckpoints(), tempfile.mkdtemp() + "/checkpoint.safetensors"
        >>> files.write(path, b"rows of instances")
        >>> files.remove(path)
    """

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()

    def write(self, path: str, data: bytes) -> None:
        """Replace an old file by a new file atomically, and overwrite the old file."""
        write_whole(self.disk, path, data)

    def tidy(self, path: str) -> None:
        """Overwrite and remove the files that a killed process left beside a file."""
        wipe_leftovers(self.disk, path)

    def remove(self, path: str) -> None:
        """Overwrite and remove a file, and the files that were left beside it."""
        self.tidy(path)
        if os.path.exists(path):
            wipe(self.disk, path)
            self.disk.sync_folder(path)

"""One safe file per model: safetensors, with one metadata key that holds canonical JSON.

Nothing here unpickles. The JSON says the format's version, the class, how the model was configured and its tree;
the same model always saves to the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

__all__ = [
    "FORMAT_VERSION",
    "dtype_name",
    "dtype_named",
    "load_into",
    "model_bytes",
    "read_header",
    "read_tensors",
    "require_config",
    "require_fit",
    "save_model",
    "write_file",
]

FORMAT_VERSION = 1
_KEY = "treediff"

Path = str | os.PathLike[str]


def model_bytes(class_name: str, state: Mapping[str, Any], header: Mapping[str, Any]) -> bytes:
    """A model's file: its tensors and a header, the same bytes for the same content.

    Args:
        class_name: of the model.
        state: its `state_dict`.
        header: plain JSON values; 'format' and 'class' are added.

    Raises:
        TypeError: if the header holds something that is not plain JSON, or the state something that is no tensor.
        ValueError: if the header holds NaN or infinity.
    """
    full = {**header, "format": FORMAT_VERSION, "class": class_name}
    text = json.dumps(full, sort_keys=True, separators=(",", ":"), allow_nan=False)
    others = sorted(name for name, value in state.items() if not isinstance(value, Tensor))
    if others:
        raise TypeError(f"a file holds tensors only, found something else in the module's state at {others}")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    return to_bytes(tensors, metadata={_KEY: text})


def save_model(module: nn.Module, path: Path, header: Mapping[str, Any]) -> None:
    """Write all tensors of a module and a header to one file.

    An interruption leaves the old file whole, see `write_file`.

    Args:
        module: the module; its `state_dict` is stored.
        path: where to.
        header: as for `model_bytes`, whose errors are raised, too.
    """
    write_file(path, model_bytes(type(module).__name__, module.state_dict(), header))


def write_file(path: Path, data: bytes) -> None:
    """Put a file with these bytes in the place of `path`, at once; an interruption leaves the old one whole.

    Raises:
        OSError: if the file cannot be written, as on a full disk; the old one is whole, and no part of the new one is
            left.
    """
    # A name of its own, so that two processes that save at once do not write into one file.
    beside = f"{os.fspath(path)}.{secrets.token_hex(4)}.partial"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no model file at {os.fspath(path)!r}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a whole safetensors file ({error}); it may be damaged, cut short, or of "
            "another kind. Nothing else is tried: pickled files are never read"
        ) from None


def read_header(path: Path, expected_class: str) -> dict[str, Any]:
    """The header of a file, once it is sure that this version can read it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, was not written by treediff, holds another class of model, or has
            another format version.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if _KEY not in metadata:
        raise ValueError(
            f"{os.fspath(path)!r} is a safetensors file that treediff did not write: its metadata has the keys "
            f"{sorted(metadata)}, expected {_KEY!r}"
        )
    try:
        header = json.loads(metadata[_KEY])
        version, found_class = header["format"], header["class"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the header of {os.fspath(path)!r} is damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} has format version {version}, this treediff reads version {FORMAT_VERSION}; "
            "install the release that wrote it, or a newer one"
        )
    if found_class != expected_class:
        raise ValueError(f"{os.fspath(path)!r} holds a {found_class}, expected a {expected_class}")
    return dict(header)


def require_config(header: Mapping[str, Any], path: Path) -> Any:  # noqa: ANN401
    """The configuration in a file's header.

    Raises:
        ValueError: if there is none, because the model was built from parts.
    """
    if header.get("config") is None:
        raise ValueError(
            f"the model in {os.fspath(path)!r} was built from parts, which a file does not hold; build it the same way "
            "and pass it as model="
        )
    return header["config"]


def dtype_name(dtype: torch.dtype) -> str:
    """How files name a dtype, as `dtype_named` reads it: 'float32' and so on."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: object, path: Path) -> torch.dtype:
    """The floating-point dtype that a file names.

    Raises:
        ValueError: if it names none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{os.fspath(path)!r} names the dtype {name!r}, expected one like 'float32'")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def load_into(module: nn.Module, path: Path, *, rows: str | None = None, without: tuple[str, ...] = ()) -> None:
    """Fill a module with a file's tensors; all must fit, and nothing is changed unless all do.

    Args:
        module: the module.
        path: the file.
        rows: how the names of tensors begin which may have another number of rows than the module's.
        without: how the names begin of tensors that the file does not hold, and that stay as they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file; or naming the first tensor that is missing, unknown, or of another
            shape or dtype.
    """
    found = read_tensors(path)
    expected = module.state_dict()
    found |= {name: tensor for name, tensor in expected.items() if name.startswith(without)}
    require_fit(expected, found, "the file does not fit the model", rows=() if rows is None else (rows,))
    module.load_state_dict(found)


def require_fit(
    expected: Mapping[str, object],
    found: Mapping[str, object],
    what: str,
    *,
    prefix: str = "",
    rows: tuple[str, ...] = (),
) -> None:
    """Require the same names, and tensors of the same shapes and dtypes.

    Args:
        expected: what there is to fill.
        found: what a file holds.
        what: how the message begins.
        prefix: of names in the message.
        rows: how the names of tensors begin which may have another number of rows.

    Raises:
        ValueError: naming the first that is missing, unknown, or of another shape or dtype.
    """
    for name in sorted(expected.keys() | found.keys()):
        want, got = (_describe(values.get(name), name.startswith(rows)) for values in (expected, found))
        if want != got:
            raise ValueError(f"{what} at {prefix + name!r}: expected {want}, found {got}")


def _describe(tensor: object, any_rows: bool) -> str:
    if tensor is None:
        return "no such tensor"
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    shape = ("any", *tensor.shape[1:]) if any_rows else tuple(tensor.shape)
    return f"{dtype_name(tensor.dtype)} of shape ({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"

"""One safe file per model: safetensors, with one metadata key that holds canonical JSON.

Nothing here unpickles. The JSON says the format's version, the class, how the model was configured and its tree;
the same model always saves to the same bytes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from treediff.core.modes import lasting
from treediff.tree.topology import TreeTopology

__all__ = [
    "FORMAT_VERSION",
    "described_by",
    "dtype_name",
    "dtype_named",
    "fill",
    "load_into",
    "model_bytes",
    "parse_json",
    "parse_model",
    "read_header",
    "read_tensors",
    "require_config",
    "require_fit",
    "require_topology",
    "save_model",
    "write_file",
]

FORMAT_VERSION = 1
_KEY = "treediff"
_DEEPEST = 200  # far below where Python gives up, and far above what any file needs

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
    # The last three come from PyTorch, of shapes that safetensors has let pass.
    except (SafetensorError, OverflowError, RuntimeError, TypeError) as error:
        raise _not_whole(path, error) from None


def _not_whole(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{os.fspath(path)!r} is not a whole safetensors file ({error}); it may be damaged, cut short, or of another "
        "kind. Nothing else is tried: pickled files are never read"
    )


def read_header(path: Path, expected_class: str) -> dict[str, Any]:
    """The header of a file, once it is sure that this version can read it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, was not written by treediff, holds another class of model, or has
            another format version.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    return _header(metadata, path, expected_class)


def parse_model(data: bytearray, path: Path, expected_class: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file that was read as a whole, as `read_header` and `read_tensors` do.

    Args:
        data: all bytes of the file.
        path: its name, for messages.
        expected_class: as for `read_header`.

    Raises:
        ValueError: as there.
    """
    content = bytes(data)
    try:
        with lasting():
            tensors = from_bytes(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise _not_whole(path, error) from None
    return _header(metadata, path, expected_class), tensors


def _header(metadata: Mapping[str, str], path: Path, expected_class: str) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(
            f"{os.fspath(path)!r} is a safetensors file that treediff did not write: its metadata has the keys "
            f"{sorted(metadata)}, expected {_KEY!r}"
        )
    try:
        header = parse_json(metadata[_KEY])
        version, found_class = header["format"], header["class"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the header of {os.fspath(path)!r} is damaged ({type(error).__name__}: {error})") from None
    if type(version) is not int or version != FORMAT_VERSION:  # to Python True and 1.0 are 1, too
        raise ValueError(
            f"{os.fspath(path)!r} has format version {version}, this treediff reads version {FORMAT_VERSION}; "
            "install the release that wrote it, or a newer one"
        )
    if found_class != expected_class:
        raise ValueError(f"{os.fspath(path)!r} holds a {found_class}, expected a {expected_class}")
    return dict(header)


def parse_json(text: str) -> Any:  # noqa: ANN401
    """Read JSON that nobody vouches for.

    Raises:
        ValueError: if it is none, or is nested too deeply for what is done with it later.
    """
    deep = f"expected JSON nested at most {_DEEPEST} deep, found more"
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(deep) from None
    level = [found]
    for _ in range(_DEEPEST):
        level = _below(level)
    if any(isinstance(value, dict | list) for value in level):
        raise ValueError(deep)
    return found


def _below(level: list[Any]) -> list[Any]:
    """What the objects and lists among some values of JSON are made of."""
    lists = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)]
    return [part for parts in lists for part in parts]


@contextmanager
def described_by(path: Path, *sizes: object) -> Iterator[None]:
    """Make what a file says; whatever goes wrong becomes a ValueError that names the file.

    Args:
        path: the file.
        sizes: parts of its header that say how large something is: no number in them may exceed the bytes of the file,
            so that a few false digits do not fill the memory.

    Raises:
        ValueError: if a number does, or what is done here raises an error that a false description may lead to.
    """
    name = os.fspath(path)
    try:
        _require_sizes(sizes, path)
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and repr(name) in str(error):
            raise
        raise ValueError(f"{name!r} does not describe a model: {error}") from error


def require_topology(header: Mapping[str, Any], path: Path) -> TreeTopology:
    """The tree in a file's header.

    Raises:
        ValueError: if there is none.
    """
    with described_by(path, header.get("topology")):
        return TreeTopology.from_json(json.dumps(header.get("topology")))


def _require_sizes(sizes: Iterable[object], path: Path) -> None:
    most, level = os.path.getsize(path), list(sizes)
    while level:
        if any(isinstance(number, int | float) and not abs(number) <= most for number in level):
            raise ValueError(f"a file of {most} bytes names a size beyond its own; it may be damaged, take a backup")
        level = _below(level)


def require_config(header: Mapping[str, Any], path: Path) -> Any:  # noqa: ANN401
    """The configuration in a file's header.

    Raises:
        ValueError: if there is none, because the model was built from parts; or if it is no object of JSON.
    """
    if header.get("config") is None:
        raise ValueError(
            f"the model in {os.fspath(path)!r} was built from parts, which a file does not hold; build it the same way "
            "and pass it as model="
        )
    if not isinstance(header["config"], dict):
        raise ValueError(
            f"the header of {os.fspath(path)!r} is damaged: expected a configuration {{name: value}}, found "
            f"{type(header['config']).__name__}"
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
    with lasting(), _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def load_into(module: nn.Module, path: Path, *, rows: str | None = None, without: tuple[str, ...] = ()) -> None:
    """Fill a module with a file's tensors; all must fit, and nothing is changed unless all do.

    Arguments and errors are those of `fill`, and:

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file.
    """
    fill(module, read_tensors(path), path, rows=rows, without=without)


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    rows: str | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Fill a module with a file's tensors; all must fit, and nothing is changed unless all do.

    Names, shapes and dtypes are compared before anything is changed. A part of the module may know more and refuse its
    tensors only when they come, after others have theirs: then those get back what they had, through
    `load_state_dict`, of which a copy is kept until all is done. Parameters are filled in place, and can be trained
    afterwards, in whatever mode the caller is; a module that was itself made in `torch.inference_mode()` stays as
    limited as it was.

    Args:
        module: the module.
        tensors: of the file, by name.
        path: the name of the file, for messages.
        rows: how the names of tensors begin which may have another number of rows than the module's.
        without: how the names begin of tensors that the file does not hold, and that stay as they are.

    Raises:
        ValueError: naming the first tensor that is missing, unknown, or of another shape or dtype; or with what a part
            of the module says of its tensors.
    """
    found = dict(tensors)
    expected = module.state_dict()
    found |= {name: tensor for name, tensor in expected.items() if name.startswith(without)}
    misfit = f"{os.fspath(path)!r}: the file does not fit the model"
    require_fit(expected, found, misfit, rows=() if rows is None else (rows,))
    limited = any(isinstance(tensor, Tensor) and tensor.is_inference() for tensor in expected.values())
    with torch.inference_mode(limited), torch.no_grad():
        try:
            _load_or_restore(module, found, expected)
        except RuntimeError as error:
            raise ValueError(f"{misfit}, which is as it was: {error}") from error


def _load_or_restore(module: nn.Module, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in expected.items()}
    try:
        module.load_state_dict(found)
    except BaseException:
        # Who refused the file's tensors may refuse its own, which it still has.
        with suppress(RuntimeError, ValueError):
            module.load_state_dict(before)
        raise
    finally:
        for value in before.values():
            if isinstance(value, Tensor):
                value.zero_()  # freed memory keeps what was in it


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

"""One safe file per model: safetensors, with one metadata key that holds canonical JSON.

Nothing here unpickles. The JSON holds the format's version, the class, the model's configuration and its tree. The same
model always saves to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import getattr_static
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from treediff.core.modes import lasting

__all__ = [
    "FORMAT_VERSION",
    "add_tensors",
    "build",
    "described_by",
    "digest_of",
    "dtype_name",
    "dtype_named",
    "fill",
    "load_into",
    "model_bytes",
    "parse_json",
    "parse_model",
    "read_header",
    "read_model",
    "read_tensors",
    "record",
    "require_config",
    "require_fit",
    "save_model",
    "write_file",
]

#: Format that is written. Format 1, with other names for the networks of nodes, is read as well (`read_model`).
FORMAT_VERSION = 2
_READ = (1, 2)
_KEY = "treediff"
_BANKS = re.compile(r"^(tree_vae\.)?(heads|transitions|posterior_routers|prior_routers|decoders)\.")
_DEEPEST = 200  # far below Python's limit of recursion, and far above the depth of any real file

Path = str | os.PathLike[str]


def model_bytes(class_name: str, state: Mapping[str, Any], header: Mapping[str, Any]) -> bytes:
    """Return the bytes of a model's file, its tensors and a header; the same content gives the same bytes.

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


def save_model(module: nn.Module, path: Path, header: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> None:
    """Write the tensors of a module and a header to one file.

    An interruption leaves the old file whole, see `write_file`.

    Args:
        module: the module; its `state_dict` is stored.
        path: the file to write.
        header: as for `model_bytes`, whose errors are raised, too.
        without: prefixes of the names of tensors that are not written; `fill` takes the same.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith(without)}
    write_file(path, model_bytes(type(module).__name__, state, header))


def write_file(path: Path, data: bytes) -> None:
    """Replace the file at `path` by a file with these bytes, at once; an interruption leaves the old file whole.

    Raises:
        OSError: if the file cannot be written, as on a full disk; the old file is whole, and no part of the new file
            is left.
    """
    # A unique name, so that two processes that save at the same time do not write into one file.
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
    # PyTorch raises the last three for shapes that safetensors accepts.
    except (SafetensorError, OverflowError, RuntimeError, TypeError) as error:
        raise _not_whole(path, error) from None


def _not_whole(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{os.fspath(path)!r} is not a whole safetensors file ({error}); it may be damaged, cut short, or of another "
        "kind. Nothing else is tried: pickled files are never read"
    )


def read_header(path: Path, expected_class: str) -> dict[str, Any]:
    """Return the header of a file, once all checks that this version can read the file have passed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no safetensors file, was not written by treediff, holds another class of model, or
            has another format version.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    return _header(metadata, path, expected_class)


def parse_model(data: bytearray, path: Path, expected_class: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file that was read as a whole, as `read_header` and `read_tensors` do.

    Args:
        data: all bytes of the file.
        path: name of the file, for messages.
        expected_class: as for `read_header`.

    Raises:
        ValueError: as for `read_header`.
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
    if type(version) is not int or version not in _READ:  # in Python True == 1 and 1.0 == 1
        raise ValueError(
            f"{os.fspath(path)!r} has format version {version}, this treediff reads versions "
            f"{' and '.join(map(str, _READ))}; install the release that wrote it, or a newer one"
        )
    if found_class != expected_class:
        raise ValueError(f"{os.fspath(path)!r} holds a {found_class}, expected a {expected_class}")
    return dict(header)


def parse_json(text: str) -> Any:  # noqa: ANN401
    """Parse JSON of an untrusted source.

    Raises:
        ValueError: if the text is no JSON, or is nested too deeply for later use.
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
    """Return the members of all objects and lists among some values of JSON."""
    lists = [value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)]
    return [part for parts in lists for part in parts]


@contextmanager
def described_by(path: Path, *sizes: object) -> Iterator[None]:
    """Turn errors while a model is built from a file's description into a ValueError that names the file.

    Args:
        path: the file.
        sizes: parts of the header that hold sizes. No number in these parts may exceed the bytes of the file, so that a
            few false digits do not fill the memory.

    Raises:
        ValueError: if a number exceeds them, or the block raises an error that a false description may lead to.
    """
    name = os.fspath(path)
    try:
        _require_sizes(sizes, path)
        yield
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and repr(name) in str(error):
            raise
        raise ValueError(f"{name!r} does not describe a model: {error}") from error


def _require_sizes(sizes: Iterable[object], path: Path) -> None:
    most, level = os.path.getsize(path), list(sizes)
    while level:
        if any(isinstance(number, int | float) and not abs(number) <= most for number in level):
            raise ValueError(f"a file of {most} bytes names a size beyond its own; it may be damaged, take a backup")
        level = _below(level)


Model = TypeVar("Model")


def record(factory: str, arguments: Mapping[str, Any], own: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Return the configuration of a model: the factory that made it, the factory's arguments, and custom parts.

    Numbers of any kind, such as numpy's, become numbers of JSON, and tuples become lists.

    Args:
        factory: name of a class method that begins with `for_`.
        arguments: arguments of that call; `build` calls the factory with the same.
        own: modules that were given in place of the factory's, by name; a file cannot describe how to build them.

    Examples:
        >>> record("for_images", {"size": (8, 8)}, {"decoder": nn.Linear(1, 1)})
        {'for_images': {'size': [8, 8]}, 'own': {'decoder': 'Linear'}}
    """
    config: dict[str, Any] = {factory: {name: _plain(value) for name, value in arguments.items()}}
    if own:
        config["own"] = {name: type(part).__name__ for name, part in own.items()}
    return config


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def build(
    cls: type[Model],
    config: Mapping[str, Any],
    path: Path,
    parts: Mapping[str, object],
    **more: Any,  # noqa: ANN401 - arguments of the factory
) -> Model:
    """Return the untrained model that a configuration describes; the global random state does not change.

    Args:
        cls: class of the model. Its factories are its class methods whose names begin with `for_`, such as
            `for_images`; a file can name no other attribute.
        config: the configuration that `record` returned.
        path: name of the file that holds the configuration, for messages.
        parts: the custom modules that the configuration names, by name.
        **more: further arguments of the factory, such as the tree and the dtype.

    Raises:
        ValueError: if no factory of this class recorded the configuration, a part is missing, or a part is not named
            in the configuration.
    """
    entries = {name: value for name, value in config.items() if name != "own"}
    named = [name for name in dir(cls) if name.startswith("for_")]
    known = [name for name in named if isinstance(getattr_static(cls, name), classmethod)]
    with described_by(path, config):
        factory, arguments = next(iter(entries.items()), ("", None))
        if len(entries) != 1 or factory not in known or not isinstance(arguments, Mapping):
            raise ValueError(f"expected a configuration {{name: arguments}} of {' or '.join(known)}, found {config!r}")
        _check_parts(config.get("own", {}), parts, path)
        fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        twice = sorted(fixed.keys() & {*more, *parts})
        try:
            if twice:
                raise TypeError(f"it has multiple values for {', '.join(twice)}")
            model: Model = getattr(cls, factory)(**{**fixed, **more, **parts})
        except TypeError as error:
            raise ValueError(f"its configuration does not fit {factory}: {error}") from error
    return model


def _check_parts(own: Any, parts: Mapping[str, object], path: Path) -> None:  # noqa: ANN401 - of a file
    """Raise ValueError unless the given parts are the custom parts of the model, which no file holds."""
    if not isinstance(own, Mapping):
        raise ValueError(f"expected the names of custom parts {{name: class}}, found {own!r}")
    missing = [f"{name}= (a {own[name]})" for name in sorted(own.keys() - parts.keys())]
    if missing:
        raise ValueError(
            f"the model in {os.fspath(path)!r} was built with parts that a file does not hold; make them the same way "
            f"and pass them to load: {', '.join(missing)}"
        )
    unknown = sorted(parts.keys() - own.keys())
    if unknown:
        raise ValueError(
            f"the model in {os.fspath(path)!r} was built with {sorted(own) or 'no'} custom parts, found {unknown}; "
            "leave out the parts that the file itself describes"
        )


def require_config(header: Mapping[str, Any], path: Path) -> Any:  # noqa: ANN401
    """Return the configuration in a file's header.

    Raises:
        ValueError: if the header has no configuration, because the model was built from parts, or the configuration is
            no object of JSON.
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


def add_tensors(update: Callable[[bytes | memoryview], object], tensors: Mapping[str, Tensor]) -> None:
    """Feed tensors to the `update` of a hash, sorted by name, with dtype and shape."""
    for name, tensor in sorted(tensors.items()):
        update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the bytes of tensors and of their names, for equality alone."""
    digest = hashlib.blake2b(digest_size=16)
    add_tensors(digest.update, tensors)
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in files, as `dtype_named` reads it: 'float32' and so on."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: object, path: Path) -> torch.dtype:
    """Return the floating-point dtype that a file names.

    Raises:
        ValueError: if `name` is not the name of a floating-point dtype.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{os.fspath(path)!r} names the dtype {name!r}, expected one like 'float32'")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no safetensors file.
    """
    with lasting(), _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_model(path: Path, expected_class: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a model's file, with the present names of the module's tensors.

    In format 1 the networks of nodes were attributes of the model itself (`decoders.0.weight`); now they are attributes
    of its part `banks` (`banks.decoders.0.weight`).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as for `read_header`.
    """
    header, tensors = read_header(path, expected_class), read_tensors(path)
    if header["format"] == 1:
        tensors = {_BANKS.sub(r"\1banks.\2.", name): tensor for name, tensor in tensors.items()}
    return header, tensors


def load_into(module: nn.Module, path: Path, *, rows: str | None = None, without: tuple[str, ...] = ()) -> None:
    """Fill a module with a file's tensors; nothing is changed unless all tensors fit.

    Arguments and errors are as for `fill`, and:

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no safetensors file.
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
    """Fill a module with a file's tensors; nothing is changed unless all tensors fit.

    Names, shapes and dtypes are compared before any change. A part of the module may check more, and refuse its tensors
    after other parts are filled. Then the old tensors, of which a copy is kept until the end, are restored through
    `load_state_dict`. Parameters are filled in place and can be trained afterwards, in any mode of the caller. A module
    that was itself made in `torch.inference_mode()` keeps its limits.

    Args:
        module: the module.
        tensors: of the file, by name.
        path: the name of the file, for messages.
        rows: prefix of the names of tensors that may have another number of rows than the module's.
        without: prefixes of the names of tensors that the file does not hold, and that stay unchanged.

    Raises:
        ValueError: naming the first tensor that is missing, unknown, or of another shape or dtype; or with the error of
            the part that refuses its tensors.
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
        # A part that refused the file's tensors may refuse its own, which it still holds.
        with suppress(RuntimeError, ValueError):
            module.load_state_dict(before)
        raise
    finally:
        for value in before.values():
            if isinstance(value, Tensor):
                value.zero_()  # freed memory keeps its content


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
        expected: the tensors to fill.
        found: the tensors of a file.
        what: the beginning of the message.
        prefix: of names in the message.
        rows: prefixes of the names of tensors that may have another number of rows.

    Raises:
        ValueError: naming the first tensor that is missing, unknown, or of another shape or dtype.
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

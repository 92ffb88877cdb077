"""Checkpoints: one safe file with all that a training run needs to continue as if it had never stopped.

A checkpoint holds the states of *parts* by name: models, optimisers, learning rate schedules, averages, generators, and
plain values such as the settings of the run. The file has the format of a model file (see `treediff.core.io`): tensors,
and one piece of JSON that gives the place of each tensor in the states. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from treediff.core.io import model_bytes, read_header, read_tensors, require_fit, write_file
from treediff.core.modes import lasting

__all__ = ["Checkpoint", "read_checkpoint", "save_checkpoint"]

Path = str | os.PathLike[str]
_CLASS = "Checkpoint"


def save_checkpoint(path: Path, parts: Mapping[str, Any]) -> None:
    """Write the states of some parts to one file; an interruption leaves the old file whole.

    Args:
        path: the file to write.
        parts: the parts by name. Of an object with a `state_dict` and of a `torch.Generator` the state is written. Any
            other part is written as it is, and must consist of tensors, None, bool, int, float, str, list, tuple and
            dict.

    Raises:
        OSError: if the file cannot be written; the old file is whole.
        TypeError: naming the value of any other type.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/checkpoint.safetensors"
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> save_checkpoint(path, {"model": model, "optimizer": optimizer, "epoch": 3})
        >>> found = read_checkpoint(path)
        >>> found["epoch"]
        3
        >>> found.fill({"model": model, "optimizer": optimizer, "epoch": 3})
    """
    write_file(path, Checkpoint.of(parts).to_bytes())


@lasting()
def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of `save_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of another kind, or of another format version.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"there is no checkpoint at {name!r}; a run leaves one when it is interrupted, and removes it once it has "
            "finished"
        )
    header = read_header(path, _CLASS)
    # Tensors of safetensors map the file: without a clone they would change when the file is overwritten.
    tensors = {key: tensor.clone() for key, tensor in read_tensors(path).items()}
    try:
        states, classes = header["states"], header["classes"]
        return Checkpoint({key: _decoded(state, tensors) for key, state in states.items()}, dict(classes), name)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {name!r} is damaged ({type(error).__name__}: {error})") from None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """States of some parts.

    Args:
        states: the states by name.
        classes: the class of each part that `fill` fills with its state; the other parts are values.
        name: of the file, for messages.
    """

    states: dict[str, Any]
    classes: dict[str, str]
    name: str = "the checkpoint"

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Checkpoint:
        """Return the present states of parts, as for `save_checkpoint`; tensors are not copied."""
        classes = {name: kind for name, part in parts.items() if (kind := _class_of(part)) is not None}
        return cls({name: _state_of(part) for name, part in parts.items()}, classes)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file; the same states give the same bytes.

        Raises:
            TypeError: naming what is neither a tensor nor a plain value.
        """
        tensors: dict[str, Tensor] = {}
        states = {name: _encoded(state, _key(name), tensors) for name, state in self.states.items()}
        return model_bytes(_CLASS, tensors, {"states": states, "classes": self.classes})

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        """Return the state of one part, to read before the parts are built.

        Raises:
            KeyError: if there is no part of that name.
        """
        if name not in self.states:
            raise KeyError(f"{self.name} holds no {name!r}; it holds {sorted(self.states)}")
        return self.states[name]

    @lasting()
    def fill(self, parts: Mapping[str, Any]) -> None:
        """Restore the saved state of each part, in the order of `parts`.

        A run that continues with other settings than it began with would have the results of neither setting. So
        `parts` must name exactly the saved parts, each of the same class, and parts that are values must be equal to
        the saved values. Tensors of a module must have the saved shapes; a module with `any_rows = True`, such as a
        memory, may have another number of rows. If a part then refuses its state, the parts named before it are filled
        and the parts named after it are not.

        Raises:
            KeyError: as the part's own `load_state_dict`.
            ValueError: naming the first part, name or tensor that does not fit.
        """
        both = {name: part for name, part in parts.items() if name in self.states}
        for name, part in both.items():  # values first: their messages are the clearest
            own, found = ("a value" if kind is None else kind for kind in (_class_of(part), self.classes.get(name)))
            if own != found:
                raise ValueError(f"{self._misfit} at {name!r}: expected {own}, found {found}")
            if _class_of(part) is None:
                _require_same(part, self.states[name], name, self._misfit)
        for name in sorted(parts.keys() ^ self.states.keys()):
            where = "not in the checkpoint" if name in parts else "in the checkpoint only"
            raise ValueError(f"{self.name} has other parts than this run: {name!r} is {where}")
        for name, part in parts.items():
            if _class_of(part) is not None:
                self._fill(part, name)

    @property
    def _misfit(self) -> str:
        return f"{self.name} does not fit; start the run as it was started. It differs"

    def _fill(self, part: Any, name: str) -> None:  # noqa: ANN401
        state = self.states[name]
        if isinstance(part, nn.Module):
            rows = tuple(
                f"{at}." if at else "" for at, each in part.named_modules() if getattr(each, "any_rows", False)
            )
            require_fit(part.state_dict(), state, self._misfit, prefix=f"{name}/", rows=rows)
        if isinstance(part, LRScheduler):  # its `load_state_dict` accepts any keys
            own, found = (dict.fromkeys(names, "there") for names in (part.state_dict(), state))
            _require_same(own, found, name, self._misfit)
        try:
            part.set_state(state) if isinstance(part, torch.Generator) else part.load_state_dict(state)
        except RuntimeError as error:  # raised by a module or a generator
            raise ValueError(f"{self._misfit} at {name!r}: {error}") from error
        if isinstance(part, torch.optim.Optimizer):
            self._lay_out(part, name)

    def _lay_out(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Restore the weights' memory layout in an optimiser's state: fused steps rely on the layout unchecked."""
        for weight, states in optimizer.state.items():
            for key, value in states.items():
                if not isinstance(value, Tensor) or value.ndim != weight.ndim:
                    continue
                if any(size not in (1, full) for size, full in zip(value.shape, weight.shape, strict=True)):
                    raise ValueError(
                        f"{self._misfit} at {name!r}: {key!r} has shape {tuple(value.shape)}, for a weight of shape "
                        f"{tuple(weight.shape)}"
                    )
                if value.shape == weight.shape and value.stride() != weight.stride():
                    states[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def _class_of(part: object) -> str | None:
    """Return the class of a part that has a state, and None for a value."""
    has_state = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    return type(part).__name__ if has_state or isinstance(part, torch.Generator) else None


def _state_of(part: Any) -> Any:  # noqa: ANN401
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part if _class_of(part) is None else part.state_dict()


def _key(key: object) -> str:
    """Return a key as a part of a place, in which a slash separates keys, as in a JSON pointer (RFC 6901)."""
    return str(key).replace("~", "~0").replace("/", "~1")


def _encoded(value: object, name: str, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Return JSON for a state, and put tensors into `tensors` by place; each JSON object has one key, its kind."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, list | tuple):
        parts = [_encoded(part, f"{name}/{number}", tensors) for number, part in enumerate(value)]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        kinds = {type(key) for key in value}
        if kinds <= {str} or kinds == {int}:
            parts_of = {str(key): _encoded(part, f"{name}/{_key(key)}", tensors) for key, part in value.items()}
            return {"numbered" if kinds == {int} else "dict": parts_of}
        raise TypeError(
            f"the keys of a dict in a checkpoint must be all text or all whole numbers; at {name!r} are others"
        )
    kind = "sparse tensor" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        "a checkpoint holds what has a state_dict, generators, tensors, and None, bool, int, float, str, list, tuple "
        f"and dict; found a {kind} at {name!r}"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decoded(part, tensors) for part in content)
    if kind == "numbered":
        return {int(key): _decoded(part, tensors) for key, part in content.items()}
    if kind == "dict":
        return {key: _decoded(part, tensors) for key, part in content.items()}
    raise ValueError(f"there is no kind {kind!r} of value")


def _require_same(expected: object, found: object, name: str, what: str) -> None:
    """Raise ValueError naming the first place where two values differ."""
    ours, theirs = _leaves(expected, name), _leaves(found, name)
    for place in sorted(ours.keys() | theirs.keys()):
        want, got = ours.get(place, "nothing"), theirs.get(place, "nothing")
        if isinstance(want, Tensor) and isinstance(got, Tensor):
            require_fit({place: want}, {place: got}, what)
            if not torch.equal(want, got):
                raise ValueError(f"{what} at {place!r}: the tensors have other values")
        elif isinstance(want, Tensor) or isinstance(got, Tensor) or want != got:
            want, got = ("a tensor" if isinstance(value, Tensor) else value for value in (want, got))
            raise ValueError(f"{what} at {place!r}: expected {want}, found {got}")


def _leaves(value: object, name: str) -> dict[str, object]:
    """Return the contents of a value by their places: tensors, and text for anything else."""
    if isinstance(value, Mapping):
        parts, kind = list(value.items()), "a dict"
    elif isinstance(value, list | tuple):
        parts, kind = list(enumerate(value)), f"a {type(value).__name__}"
    else:
        return {name: value if isinstance(value, Tensor) else repr(value)}
    found: dict[str, object] = {name: kind}
    for key, part in parts:
        found |= _leaves(part, f"{name}/{_key(key)}")
    return found

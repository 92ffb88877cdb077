"""Watch over a frozen module, which must not change while it runs.

A running statistic, a counter or a table that `forward` writes is computed from inputs, and stays when the inputs are
forgotten. It also gives the same input another key later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Unwritten"]


Mark = tuple[str, int, int, int]


class Place(NamedTuple):
    """Place where a module keeps a tensor: `held[key] is tensor`."""

    name: str
    held: dict[str, Any]
    key: str
    tensor: Tensor


class Unwritten:
    """A watch over the tensors of one module: parameters, buffers, and attributes.

    Places and version counters are compared each time. Not every kernel counts its writes. Where places or counters are
    new, the bytes are therefore compared as well, which takes a copy.
    """

    def __init__(self) -> None:
        self._seen: object = None

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Run the body of the `with` statement, and check the module afterwards.

        Raises:
            ValueError: if the body writes to a tensor of the module, or replaces a tensor. The module is then restored,
                unless an earlier run passed the check; in this case the module must be built again.
        """
        before = _places(module)
        mark = _mark(before)
        copies = None if mark == self._seen else [place.tensor.clone() for place in before]
        changed: str | None = None
        try:
            yield
        finally:  # also after an error of the module
            changed = _changed(before, _places(module), mark, copies)
            if changed is not None:
                _restore(before, _places(module), copies)
        if changed is not None:
            raise ValueError(
                f"{changed!r} of the encoder changed while it ran, expected one that is frozen: what it keeps of "
                "inputs would stay when the inputs are forgotten. Put normalisation into eval mode, and leave counters "
                "and statistics out of forward; a table that is made at first use can be made before, by a run on zeros"
                + ("" if copies else ". Build the encoder again: it has kept traces of these inputs")
            )
        self._seen = mark


def _places(module: nn.Module) -> list[Place]:
    found = []
    for path, part in module.named_modules():
        for held in (part._parameters, part._buffers, vars(part)):
            for key, tensor in held.items():
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized:
                    found.append(Place(f"{path}.{key}".lstrip("."), held, key, tensor))
    return found


def _mark(places: list[Place]) -> list[Mark]:
    """Return name, identity, address and version of each tensor; an ordinary write changes one of these."""
    return [(p.name, id(p.tensor), p.tensor.data_ptr(), _version(p.tensor)) for p in places]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _changed(before: list[Place], after: list[Place], mark: list[Mark], copies: list[Tensor] | None) -> str | None:
    """Return the name of a tensor that has changed, if there is one."""
    found = [entry[0] for entry in set(mark).symmetric_difference(_mark(after))]
    for number, copy in enumerate(copies or ()):
        if not torch.equal(_bits(before[number].tensor), _bits(copy)):
            found.append(before[number].name)
    return min(found, default=None)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@torch.no_grad()
def _restore(before: list[Place], after: list[Place], copies: list[Tensor] | None) -> None:
    for place in after:
        del place.held[place.key]
    for number, place in enumerate(before):
        place.held[place.key] = place.tensor
        if copies:
            place.tensor.copy_(copies[number])

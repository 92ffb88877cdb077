"""Whether bytes of what was forgotten are left, in tensors and in files.

`KeyStore.forget` erases what the store knows to hold an instance. This looks, and knows nothing of how it was done.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import Node

from munkey.store.schema import Rows

__all__ = ["ErasureReport", "erasure_report"]


_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ErasureReport:
    """What was looked for and where it was found.

    Attributes:
        pieces: how many byte strings were looked for: each key and each value that is not all zero.
        found: how many of them are there, by place: 'tensors', or the name of a file; 0 everywhere after forgetting.
    """

    pieces: int
    found: dict[str, int]

    @property
    def clean(self) -> bool:
        """Whether there is nothing anywhere."""
        return not any(self.found.values())


def erasure_report(
    rows: Rows, *, holders: Iterable[object] = (), files: Iterable[str | os.PathLike[str]] = ()
) -> ErasureReport:
    """Look for the keys and values of some rows in all tensors within reach of some objects, and in files.

    Whole storages are searched, room that no view shows included, for the rows as they are and rounded to any other of
    float64, float32, float16 and bfloat16. Within reach is what objects refer to, gradients, and what the graph of a
    kept loss holds for its backward pass: saved tensors, what a function of your own keeps, and what hooks on saved
    tensors have packed, which are not called. Rows whose value was never changed from zero, as in
    exact mode, are looked for by their keys alone; a row of few different numbers may be found by chance. **The rows
    themselves are a copy of what is to be forgotten**: read them before, look, and delete them.

    Not looked at: memory that is free but not empty, other processes, copies on disk that are not named, tensors that
    only C++ knows (hooks on the nodes of a graph, caches of a compiled model, tangents of forward-mode derivatives),
    what is on the meta device, and rows in pieces, transposed, or changed in any other way than by rounding.

    Args:
        rows: what `KeyStore.get` said of the instances before they were forgotten.
        holders: models, optimisers, averages, losses: everything they refer to is searched, what functions enclose and
            graphs save included, but for `rows` itself and what modules have by name.
        files: paths; of a folder everything in it.

    Raises:
        FileNotFoundError: if there is no such file.

    Examples:
        >>> from munkey import KeyStore
        >>> store = KeyStore(key_width=3, value_width=2)
        >>> store.add([7, 8], torch.tensor([[0.3, 0.5, 0.7], [0.2, 0.4, 0.6]]))
        >>> rows = store.get([7])
        >>> erasure_report(rows, holders=[store]).found
        {'tensors': 2}
        >>> _ = store.forget([7])
        >>> erasure_report(rows, holders=[store]).clean
        True
        >>> loss = (rows.keys.clone() * torch.ones(3, requires_grad=True)).sum()  # kept, and with it its graph
        >>> erasure_report(rows, holders=[store, loss]).clean
        False
    """
    pieces = [_forms(row) for column in (rows.keys, rows.values) for row in column if row.any()]
    own = {tensor.untyped_storage().data_ptr() for tensor in (rows.keys, rows.values)}
    content = _content(_reachable(*holders), own)
    found = {"tensors": _count(pieces, content)}
    for path in files:
        parts = [part for part in Path(path).rglob("*") if part.is_file()] if os.path.isdir(path) else [Path(path)]
        content = b"".join(part.read_bytes() for part in parts)
        found[os.fspath(path)] = _count(pieces, content)
    return ErasureReport(len(pieces), found)


def _forms(row: Tensor) -> set[bytes]:
    """The bytes of a row in each dtype that it may have been brought to, but for one in which nothing is left of it."""
    rounded = (row.detach().cpu().to(dtype) for dtype in (row.dtype, *_DTYPES))
    return {x.contiguous().view(torch.uint8).numpy().tobytes() for x in rounded if x.any()}


def _count(pieces: list[set[bytes]], content: bytes) -> int:
    return sum(any(form in content for form in forms) for forms in pieces)


def _reachable(*roots: object) -> list[Tensor]:
    """All tensors that can be reached from some objects, gradients and graphs included."""
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, FunctionType):  # but for its module, from which everything can be reached
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing)]
        else:
            todo += gc.get_referents(thing)
        if isinstance(thing, Tensor):
            todo += _behind(thing)
        elif isinstance(thing, Node):
            todo += _saved_by(thing)
    return [thing for thing in seen.values() if isinstance(thing, Tensor)]


def _behind(tensor: Tensor) -> list[object]:
    """The gradient of a tensor, and the node of the graph that made it, neither of which Python sees as its part."""
    # To ask other tensors for their gradient is a warning.
    return [tensor.grad if tensor.is_leaf or tensor.retains_grad else None, tensor.grad_fn]


def _saved_by(node: Node) -> list[object]:
    """What a node of a graph holds, and the nodes behind it."""
    found: list[object] = [behind for behind, _ in node.next_functions]
    found.append(getattr(node, "variable", None))  # the leaf that a gradient is added to
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            found += _unpacked(node, name)
    return found


def _unpacked(node: Node, name: str) -> list[object]:
    """Saved tensors, or what a hook has made of them, as they are.

    The attributes without `_raw` check versions, which forgetting in place has changed, and call hooks, which may
    compute anything anew.
    """
    try:
        saved = getattr(node, name)
    except RuntimeError:  # a backward pass has let go of them
        return []
    each = saved if isinstance(saved, tuple | list) else [saved]
    return [part for tensor in each for part in (tensor.data, tensor.unpack_hook)]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a tensor is made of."""
    if tensor.is_sparse:
        return tensor._values(), tensor._indices()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.values(), tensor.crow_indices(), tensor.col_indices()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.values(), tensor.ccol_indices(), tensor.row_indices()
    return () if tensor.is_meta else (tensor,)


def _content(tensors: list[Tensor], without: set[int]) -> bytes:
    """Whole storages, each once."""
    storages = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return b"".join(
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tobytes()
        for address, storage in storages.items()
        if address not in without
    )

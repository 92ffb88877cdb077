"""Search for bytes of forgotten instances, in tensors and in files.

`KeyStore.forget` erases every place in which the store holds an instance. The search is independent of these places.
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
    """Result of a search for bytes.

    Attributes:
        pieces: number of byte strings to find: each key and each value that is not all zero.
        found: number of byte strings found, by place: 'tensors', or the name of a file; 0 everywhere after forgetting.
    """

    pieces: int
    found: dict[str, int]

    @property
    def clean(self) -> bool:
        """True if no byte string was found in any place."""
        return not any(self.found.values())


def erasure_report(
    rows: Rows, *, holders: Iterable[object] = (), files: Iterable[str | os.PathLike[str]] = ()
) -> ErasureReport:
    """Search for the keys and values of some rows in all tensors that are reachable from some objects, and in files.

    Whole storages are searched, including parts that no view covers. The search is for the rows as they are, and
    rounded to any other of float64, float32, float16 and bfloat16. Tensors are reachable through references of objects,
    gradients, and the graph of a kept loss. A graph holds saved tensors, attributes of custom functions, and tensors
    that hooks on saved tensors have packed; the hooks are not called. Rows with a value of zeros, as in exact mode, are
    searched for by their keys alone. A row of few different numbers may be found by chance. **The rows themselves are a
    copy of forgotten data**: read the rows before forgetting, search, and delete the rows.

    Not searched: free memory that is not cleared, other processes, copies on disk that are not named, and the meta
    device. Not searched either: tensors that only C++ holds, such as hooks on the nodes of a graph, caches of a
    compiled model, and tangents of forward-mode derivatives. Not found: rows in pieces, transposed, or changed in any
    other way than by rounding.

    Args:
        rows: result of `KeyStore.get` for the instances before forgetting.
        holders: models, optimisers, averages, losses. Everything they refer to is searched, including closures of
            functions and tensors saved in graphs, except `rows` itself and the globals of Python modules.
        files: paths of files, or of folders, in which all files are searched.

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
    """Return the bytes of a row in each dtype that it may be rounded to, except dtypes in which the row is zero."""
    rounded = (row.detach().cpu().to(dtype) for dtype in (row.dtype, *_DTYPES))
    return {x.contiguous().view(torch.uint8).numpy().tobytes() for x in rounded if x.any()}


def _count(pieces: list[set[bytes]], content: bytes) -> int:
    return sum(any(form in content for form in forms) for forms in pieces)


def _reachable(*roots: object) -> list[Tensor]:
    """Return all tensors that are reachable from some objects, including gradients and graphs."""
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, FunctionType):  # without its globals, from which everything is reachable
            todo += [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing)]
        else:
            todo += gc.get_referents(thing)
        if isinstance(thing, Tensor):
            todo += _behind(thing)
        elif isinstance(thing, Node):
            todo += _saved_by(thing)
    return [thing for thing in seen.values() if isinstance(thing, Tensor)]


def _behind(tensor: Tensor) -> list[object]:
    """Return the gradient of a tensor and the graph node that computed it; Python lists neither as a reference."""
    # Reading the gradient of any other tensor raises a warning.
    return [tensor.grad if tensor.is_leaf or tensor.retains_grad else None, tensor.grad_fn]


def _saved_by(node: Node) -> list[object]:
    """Return the objects that a graph node holds, and the next nodes of the graph."""
    found: list[object] = [behind for behind, _ in node.next_functions]
    found.append(getattr(node, "variable", None))  # the leaf that a gradient is added to
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            found += _unpacked(node, name)
    return found


def _unpacked(node: Node, name: str) -> list[object]:
    """Return saved tensors, or the results of hooks that packed them, unchanged.

    The attributes without `_raw` check versions, which forgetting in place has changed, and call hooks, which may
    compute anything.
    """
    try:
        saved = getattr(node, name)
    except RuntimeError:  # a backward pass has freed them
        return []
    each = saved if isinstance(saved, tuple | list) else [saved]
    return [part for tensor in each for part in (tensor.data, tensor.unpack_hook)]


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the dense tensors that a tensor consists of."""
    if tensor.is_sparse:
        return tensor._values(), tensor._indices()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.values(), tensor.crow_indices(), tensor.col_indices()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.values(), tensor.ccol_indices(), tensor.row_indices()
    return () if tensor.is_meta else (tensor,)


def _content(tensors: list[Tensor], without: set[int]) -> bytes:
    """Return the bytes of whole storages, each storage once."""
    storages = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return b"".join(
        torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy().tobytes()
        for address, storage in storages.items()
        if address not in without
    )

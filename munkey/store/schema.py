"""The row of a store: its columns, each declared once.

A new column is a line of `Rows`. Everything that keeps rows (table, digest, state, file, folder) uses `columns_of`.

Letters: `M` rows, `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import torch
from torch import Tensor

__all__ = [
    "COLUMNS",
    "ONE_NUMBER",
    "Column",
    "Rows",
    "columns_of",
    "label_column",
    "misfit",
    "missing_label",
    "order_of",
]


@dataclass(frozen=True)
class Rows:
    """Rows of a store, one for each key, as returned by `KeyStore.get`.

    The fields are the columns of the row, in the order of digests and files.

    Args:
        ids: `(M,)` int64, the owner of each row.
        views: `(M,)` int64, the number of each key among the keys of its owner.
        labels: `(M, ...)`, with the shape and dtype of the store's labels; -1 or NaN for none.
        permanent: `(M,)` bool, whether the row cannot be forgotten.
        keys: `(M, D)`.
        values: `(M, V)`.
    """

    ids: Annotated[Tensor, torch.int64]
    views: Annotated[Tensor, torch.int64]
    labels: Annotated[Tensor, "label"]
    permanent: Annotated[Tensor, torch.bool]
    keys: Annotated[Tensor, "key"]
    values: Annotated[Tensor, "value"]

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in COLUMNS)


#: Kind of each column: a dtype, or the name of a shape and dtype that a store decides.
_KINDS = {name: hint.__metadata__[0] for name, hint in get_type_hints(Rows, include_extras=True).items()}
COLUMNS = tuple(_KINDS)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: name as in `Rows`.
        shape: shape of one row.
        dtype: dtype of the numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


#: Default labels of a store: one integer for each row.
ONE_NUMBER = Column("labels", (), torch.int64)


def columns_of(key_width: int, value_width: int, dtype: torch.dtype, labels: Column = ONE_NUMBER) -> tuple[Column, ...]:
    """Return the columns of a table, in the order of the schema."""
    decided = {"key": ((key_width,), dtype), "value": ((value_width,), dtype), "label": (labels.shape, labels.dtype)}
    return tuple(
        Column(name, *((), kind) if isinstance(kind, torch.dtype) else decided[kind]) for name, kind in _KINDS.items()
    )


def label_column(shape: Sequence[int], dtype: torch.dtype) -> Column:
    """Return the column of labels of a shape and dtype.

    Raises:
        ValueError: if the dtype is neither int64 nor float32.

    Examples:
        >>> label_column((3,), torch.float32).shape
        (3,)
    """
    if dtype not in (torch.int64, torch.float32):
        raise ValueError(f"labels are stored as torch.int64 or torch.float32, found {dtype}")
    return Column("labels", tuple(int(size) for size in shape), dtype)


def missing_label(column: Column) -> float:
    """Return the entry of a column of labels for an instance without a label: -1, or NaN."""
    return math.nan if column.dtype.is_floating_point else -1


def order_of(ids: Tensor, views: Tensor) -> Tensor:
    """Return the row numbers `(M,)` sorted by id and view."""
    by_view = views.argsort(stable=True)
    return by_view[ids[by_view].argsort(stable=True)]


def misfit(found: Mapping[str, Tensor], columns: tuple[Column, ...], *, differ: bool = False) -> str | None:
    """Return what is wrong with rows from a state or a file; None if the rows can be used.

    Shapes and kinds of numbers must match the columns. The views of an id must be 0, 1, and so on, each once. Keys and
    values must be finite, and labels at least -1.

    Args:
        found: the rows by column.
        columns: expected columns.
        differ: whether all ids are known to differ.
    """
    rows = len(found["ids"]) if found["ids"].ndim else 0
    for column in columns:
        got = found[column.name]
        if tuple(got.shape) != (rows, *column.shape):
            return f"expected {column.name} of shape {(rows, *column.shape)}, found {tuple(got.shape)}"
        if got.is_floating_point() != column.dtype.is_floating_point or (
            not column.dtype.is_floating_point and got.dtype != column.dtype
        ):
            return f"expected {column.name} like {column.dtype}, found {got.dtype}"
        if column.name == "labels":
            wrong = _wrong_labels(got)
            if wrong:
                return wrong
        elif column.dtype.is_floating_point and not _finite(got, column.dtype):
            return "keys and values must be finite"
    if differ and not found["views"].any():
        return None
    order = order_of(found["ids"], found["views"])
    ids, views = found["ids"][order], found["views"][order]
    first = torch.searchsorted(ids, ids)
    if not torch.equal(views, torch.arange(rows, device=ids.device) - first):
        return "the views of an id are not 0, 1, ... in some order"
    return None


def _wrong_labels(labels: Tensor) -> str | None:
    if labels.is_floating_point():
        return "labels must be finite, or NaN for none" if labels.isinf().any() else None
    low = int(labels.min()) if labels.numel() else 0
    return f"a label is at least 0, or -1 for none, found {low}" if low < -1 else None


def _finite(x: Tensor, dtype: torch.dtype) -> bool:
    # An infinity or NaN shows in the extremes, so no memory of the size of the rows is allocated.
    if not x.numel():
        return True
    low, high = x.detach().aminmax()
    return bool(low.to(dtype).isfinite() & high.to(dtype).isfinite())

"""The row of a store: its columns, each declared once.

A new column is a line of `Rows`. Whatever keeps rows (table, digest, state, file, folder) goes through `columns_of`.

Letters: `M` rows, `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import torch
from torch import Tensor

__all__ = ["COLUMNS", "Column", "Rows", "columns_of", "misfit", "order_of"]


@dataclass(frozen=True)
class Rows:
    """Rows of a store, one for each key; what `KeyStore.get` returns.

    The fields are the columns of the row, in the order in which digests and files have them.

    Args:
        ids: `(M,)` int64, the owner of each row.
        views: `(M,)` int64, the number of each key among those of its owner.
        labels: `(M,)` int64; -1 for none.
        permanent: `(M,)` bool, whether the row cannot be forgotten.
        keys: `(M, D)`.
        values: `(M, V)`.
    """

    ids: Annotated[Tensor, torch.int64]
    views: Annotated[Tensor, torch.int64]
    labels: Annotated[Tensor, torch.int64]
    permanent: Annotated[Tensor, torch.bool]
    keys: Annotated[Tensor, "key"]
    values: Annotated[Tensor, "value"]

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in COLUMNS)


#: A dtype, or which width a row has in the dtype of the store.
_KINDS = {name: hint.__metadata__[0] for name, hint in get_type_hints(Rows, include_extras=True).items()}
COLUMNS = tuple(_KINDS)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: as in `Rows`.
        shape: of one row.
        dtype: of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def columns_of(key_width: int, value_width: int, dtype: torch.dtype) -> tuple[Column, ...]:
    """Return the columns of a table, in the order of the schema."""
    widths = {"key": (key_width,), "value": (value_width,)}
    return tuple(
        Column(name, (), kind) if isinstance(kind, torch.dtype) else Column(name, widths[kind], dtype)
        for name, kind in _KINDS.items()
    )


def order_of(ids: Tensor, views: Tensor) -> Tensor:
    """Return the row numbers `(M,)` by id and view."""
    by_view = views.argsort(stable=True)
    return by_view[ids[by_view].argsort(stable=True)]


def misfit(found: Mapping[str, Tensor], columns: tuple[Column, ...], *, differ: bool = False) -> str | None:
    """Say what is wrong with rows that come from a state or a file; None if they can be used.

    Shapes and kinds of numbers must be those of the columns, the views of an id 0, 1, and so on, each once, keys and
    values finite, and labels at least -1.

    Args:
        found: the rows by column.
        columns: what they are to be.
        differ: whether it is known that no id comes twice.
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
        if column.dtype.is_floating_point and not _finite(got, column.dtype):
            return "keys and values must be finite"
    if rows and int(found["labels"].min()) < -1:
        return f"a label is at least 0, or -1 for none, found {int(found['labels'].min())}"
    if differ and not found["views"].any():
        return None
    order = order_of(found["ids"], found["views"])
    ids, views = found["ids"][order], found["views"][order]
    first = torch.searchsorted(ids, ids)
    if not torch.equal(views, torch.arange(rows, device=ids.device) - first):
        return "the views of an id are not 0, 1, ... in some order"
    return None


def _finite(x: Tensor, dtype: torch.dtype) -> bool:
    # An infinity or NaN makes the extremes what they are, so nothing as large as the rows is allocated.
    if not x.numel():
        return True
    low, high = x.detach().aminmax()
    return bool(low.to(dtype).isfinite() & high.to(dtype).isfinite())

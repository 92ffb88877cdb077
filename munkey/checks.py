"""What a store may be given, and what it says otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NO_LABEL", "as_ids", "check_rows", "check_width", "distinct", "some", "to_forget"]

#: The label of an instance that has none.
NO_LABEL = -1


def check_width(**widths: Any) -> None:  # noqa: ANN401
    """Raise TypeError or ValueError unless all are whole numbers of at least 1."""
    for name, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool):
            raise TypeError(f"{name} must be a whole number, found {width!r}")
        if width < 1:
            raise ValueError(f"{name} must be at least 1, found {width}")


def as_ids(ids: Iterable[int] | Tensor) -> list[int]:
    """Ids as Python integers.

    Raises:
        TypeError: if they are no list of whole numbers.
        ValueError: if one does not fit into 64 bits, or a tensor is not one-dimensional.
    """
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, found {ids.dtype}; use ids.long() if that loses nothing")
        if ids.ndim != 1:
            raise ValueError(f"ids must have one dimension, found {tuple(ids.shape)}")
        found: list[int] = ids.tolist()
        return found
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"ids must be a list or an int64 tensor, found {type(ids).__name__}; for one, give [id]")
    listed = [_whole(instance) for instance in ids]
    for instance in listed:
        if not -(2**63) <= instance < 2**63:
            raise ValueError(f"an id must fit into 64 bits, found {instance}")
    return listed


def ordered_ids(ids: Iterable[int] | Tensor) -> list[int]:
    """Return ids in an order that is theirs; to be merged."""
    return as_ids(ids)


def distinct(ids: Iterable[int] | Tensor) -> list[int]:
    """Ids in ascending order, each once; errors as for `as_ids`."""
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 1:
        found: list[int] = ids.unique().tolist()
        return found
    return sorted(set(as_ids(ids)))


def to_forget(ids: Iterable[int] | Tensor, missing: str) -> list[int]:
    """Ids as by `distinct`, once what is to be done about those that are missing is 'raise' or 'ignore'.

    Raises:
        ValueError: if it is another word, or as for `as_ids`.
    """
    if missing not in ("raise", "ignore"):
        raise ValueError(f"missing must be 'raise' or 'ignore', found {missing!r}")
    return distinct(ids)


def _whole(instance: object) -> int:
    index = getattr(instance, "__index__", None)
    if index is None or isinstance(instance, bool):
        raise TypeError(f"an id must be a whole number, found {instance!r}")
    number: int = index()
    return number


def some(ids: Sequence[int], most: int = 5) -> str:
    """A list of ids for a message, cut short."""
    shown = ", ".join(map(str, ids[:most]))
    return f"[{shown}]" if len(ids) <= most else f"[{shown}, ... {len(ids) - most} more]"


def check_rows(
    ids: Sequence[int],
    keys: Tensor,
    labels: Tensor | None,
    values: Tensor | None,
    widths: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys `(B, P, D)`, labels `(B,)` and values `(B, P, V)` or None, once all is as it must be.

    Raises:
        TypeError: if keys or values are no floating-point tensors, or labels no int64 one.
        ValueError: if ids repeat, a shape is wrong, a number is not finite, or a label is negative.
    """
    if len(set(ids)) != len(ids):
        seen: set[int] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
        raise ValueError(f"ids {some(twice)} come twice; give the keys of one instance together, as (B, P, D)")
    keys = _floating("keys", keys, len(ids), widths[0], dtype)
    if values is not None:
        values = _floating("values", values, len(ids), widths[1], dtype)
        if values.shape[1] != keys.shape[1]:
            raise ValueError(f"expected one value for each of {keys.shape[1]} keys of an id, found {values.shape[1]}")
    if labels is None:
        labels = torch.full((len(ids),), NO_LABEL)
    elif labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, found {labels.dtype}")
    elif labels.shape != (len(ids),):
        raise ValueError(f"expected one label for each of {len(ids)} ids, found {tuple(labels.shape)}")
    elif labels.numel() and labels.min() < 0:
        raise ValueError(f"a label is at least 0, found {int(labels.min())}; leave labels out where there are none")
    return keys, labels, values


def _floating(name: str, rows: Tensor, count: int, width: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"{name} must be a floating-point tensor, found {found}")
    if rows.ndim == 2:
        rows = rows[:, None]
    if rows.ndim != 3 or rows.shape[0] != count or rows.shape[2] != width or not rows.shape[1]:
        raise ValueError(
            f"expected {name} of shape ({count}, {width}), or ({count}, P, {width}) for P of each id; found "
            f"{tuple(rows.shape)}"
        )
    finite = rows.isfinite() & (rows.abs() <= torch.finfo(dtype).max)
    if not finite.all():
        bad = (~finite.all(2)).any(1).nonzero().squeeze(1)
        raise ValueError(
            f"{name} must be finite as {dtype}; those of {len(bad)} instances are not, the first is number {bad[0]}"
        )
    return rows

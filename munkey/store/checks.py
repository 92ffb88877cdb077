"""Checks of the arguments of a store, with their error messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MappingView, Sequence, Set, Sized

import numpy as np
import torch
from torch import Tensor

from munkey.store.schema import Column, missing_label

__all__ = [
    "as_ids",
    "check_no_label_is_missing",
    "check_rows",
    "distinct",
    "ids_of_inputs",
    "ordered_ids",
    "some",
    "to_forget",
]


def as_ids(ids: Iterable[int] | Tensor) -> list[int]:
    """Return ids as Python integers.

    A mask is refused in any form, also as unsigned integers of 8 bits: its entries would be read as the ids 0 and 1.

    Args:
        ids: `(B,)` integers: a tensor or an array of signed integers or of at least 16 bits, or any other iterable.

    Raises:
        TypeError: if `ids` is not a list of integers.
        ValueError: if an id does not fit into 64 bits, or a tensor or an array is not one-dimensional.
    """
    if isinstance(ids, Tensor | np.ndarray):
        _check_kind(str(ids.dtype))
        if ids.ndim != 1:
            raise ValueError(f"ids must have one dimension, found {tuple(ids.shape)}")
        return _in_64_bits(ids.tolist())
    if isinstance(ids, str | bytes | bytearray | memoryview) or not isinstance(ids, Iterable):
        raise TypeError(f"ids must be a list or an int64 tensor, found {type(ids).__name__}; for one, give [id]")
    return _in_64_bits([instance if type(instance) is int else _whole(instance) for instance in ids])


def ordered_ids(ids: Iterable[int] | Tensor) -> list[int]:
    """Return ids that are matched with inputs, keys or labels by position.

    Raises:
        TypeError: if the ids have no order, as in a set or a dict, or as for `as_ids`.
        ValueError: as for `as_ids`.
    """
    if isinstance(ids, Set | Mapping | MappingView):
        raise TypeError(
            f"ids must come in the order of the inputs, found a {type(ids).__name__}, which has none; give a list or "
            "an int64 tensor with the id of each input at its place"
        )
    return as_ids(ids)


def ids_of_inputs(ids: Iterable[int] | Tensor, x: Sized) -> list[int]:
    """Return one id for each input, in the order of the inputs.

    Raises:
        TypeError: as for `ordered_ids`.
        ValueError: if there is not one id for each input, or as for `as_ids`.
    """
    wanted = ordered_ids(ids)
    if len(wanted) != len(x):
        raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(wanted)}")
    return wanted


def _check_kind(dtype: str) -> None:
    """Raise TypeError unless numbers of this dtype can be ids."""
    name = dtype.removeprefix("torch.")
    if name == "bool":
        raise TypeError(f"ids must be int64, found {dtype}, a mask; give the ids that it picks: ids[mask]")
    if name == "uint8":
        raise TypeError(
            f"ids must be int64, found {dtype}, which may be a mask; of a mask give ids[mask.bool()], and int64 "
            "numbers if these are ids"
        )
    if not name.startswith(("int", "uint")):
        raise TypeError(f"ids must be int64, found {dtype}; use ids.long() if that loses nothing")


def _in_64_bits(ids: list[int]) -> list[int]:
    for instance in ids:
        if not -(2**63) <= instance < 2**63:
            raise ValueError(f"an id must fit into 64 bits, found {instance}")
    return ids


def distinct(ids: Iterable[int] | Tensor) -> list[int]:
    """Return ids in ascending order, each once; errors as for `as_ids`."""
    return sorted(set(as_ids(ids)))


def to_forget(ids: Iterable[int] | Tensor, missing: str) -> list[int]:
    """Return ids like `distinct`, after checking that `missing` is 'raise' or 'ignore'.

    Raises:
        ValueError: if `missing` is another word, or as for `as_ids`.
    """
    if missing not in ("raise", "ignore"):
        raise ValueError(f"missing must be 'raise' or 'ignore', found {missing!r}")
    return distinct(ids)


def _whole(instance: object) -> int:
    kind = str(instance.dtype).removeprefix("torch.") if isinstance(instance, Tensor | np.generic) else ""
    if kind in ("bool", "uint8") or isinstance(instance, bool):
        raise TypeError(
            f"an id must be a whole number, found {instance!r}; of a mask, give the ids it picks: ids[mask]"
        )
    index = getattr(instance, "__index__", None)
    if index is None or (isinstance(instance, Tensor | np.ndarray) and instance.ndim):
        raise TypeError(f"an id must be a whole number, found {instance!r}")
    try:
        number: int = index()
    except TypeError as error:  # from a tensor or an array of another dtype
        raise TypeError(f"an id must be a whole number, found {instance!r}") from error
    return number


def check_no_label_is_missing(labels: Tensor) -> None:
    """Raise ValueError if a label is below 0: cross-entropy silently ignores the label -100."""
    low = int(labels.min()) if labels.numel() else 0
    if low < 0:
        raise ValueError(f"a label is at least 0, found {low}; leave out inputs that have no label")


def some(ids: Sequence[int], most: int = 5) -> str:
    """Format a list of ids for a message, cut after the first `most` ids."""
    shown = ", ".join(map(str, ids[:most]))
    return f"[{shown}]" if len(ids) <= most else f"[{shown}, ... {len(ids) - most} more]"


def check_rows(
    ids: Sequence[int],
    keys: Tensor,
    labels: Tensor | None,
    values: Tensor | None,
    schema: Mapping[str, Column],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return checked keys `(B, P, D)`, labels `(B, ...)`, and values `(B, P, V)` or None.

    Raises:
        TypeError: if keys or values are not floating-point tensors, or labels have another kind of dtype.
        ValueError: if ids repeat, a shape is wrong, a number is not finite, or a label is negative.
    """
    if len(set(ids)) != len(ids):
        seen: set[int] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
        raise ValueError(f"ids {some(twice)} come twice; give the keys of one instance together, as (B, P, D)")
    dtype, label = schema["keys"].dtype, schema["labels"]
    keys = _floating("keys", keys, len(ids), schema["keys"].shape[0], dtype)
    if values is not None:
        values = _floating("values", values, len(ids), schema["values"].shape[0], dtype)
        if values.shape[1] != keys.shape[1]:
            raise ValueError(f"expected one value for each of {keys.shape[1]} keys of an id, found {values.shape[1]}")
    if labels is None:
        labels = torch.full((len(ids), *label.shape), missing_label(label), dtype=label.dtype)
    else:
        labels = _labels(labels, len(ids), label)
    return keys, labels, values


def _labels(labels: Tensor, count: int, column: Column) -> Tensor:
    found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    kind = str(column.dtype).removeprefix("torch.")
    if found.dtype == torch.bool or found.is_floating_point() != column.dtype.is_floating_point:
        raise TypeError(f"labels must be {kind}, found {found.dtype}")
    if found.shape != (count, *column.shape):
        shape = f" of shape {column.shape}" if column.shape else ""
        raise ValueError(f"expected one label{shape} for each of {count} ids, found {tuple(found.shape)}")
    if found.is_floating_point() and not found.isfinite().all():
        raise ValueError("labels must be finite, found NaN or infinity; leave labels out where there are none")
    if not found.is_floating_point() and found.numel() and found.min() < 0:
        raise ValueError(f"a label is at least 0, found {int(found.min())}; leave labels out where there are none")
    return found.to(column.dtype)


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
    low, high = rows.detach().aminmax() if rows.numel() else (rows.new_zeros(()), rows.new_zeros(()))
    most = torch.finfo(dtype).max
    if not (-most <= low and high <= most):  # also after NaN; only errors need memory of the size of the rows
        finite = rows.isfinite() & (rows.abs() <= most)
        bad = (~finite.all(2)).any(1).nonzero().squeeze(1)
        raise ValueError(
            f"{name} must be finite as {dtype}; those of {len(bad)} instances are not, the first is number {bad[0]}"
        )
    return rows

"""What counts as ids, and where they must have an order."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from munkey.store.checks import as_ids, distinct, ordered_ids, to_forget

LISTS: dict[str, object] = {
    "list": [3, 1],
    "range": range(3, -1, -2),
    "tensor": torch.tensor([3, 1]),
    "tensor of fewer bits": torch.tensor([3, 1], dtype=torch.int16),
    "array": np.array([3, 1]),
    "array of fewer bits": np.array([3, 1], dtype=np.int8),
    "array without sign": np.array([3, 1], dtype=np.uint64),
    "numpy numbers": [np.int64(3), np.uint16(1)],
    "tensors of one number": [torch.tensor(3), torch.tensor(1, dtype=torch.int32)],
}


@pytest.mark.parametrize("name", LISTS)
def test_whole_numbers_are_ids_in_their_order(name: str) -> None:
    given = LISTS[name]
    for read in (as_ids, ordered_ids):
        found = read(given)  # type: ignore[arg-type]
        assert found == [3, 1] and all(type(instance) is int for instance in found)
    assert distinct(given) == [1, 3]  # type: ignore[arg-type]
    assert ordered_ids(iter([3, 1])) == [3, 1]


MASK = torch.tensor([True, False])
REFUSED: dict[str, tuple[object, type[Exception], str]] = {
    "mask": (MASK, TypeError, "ids must be int64, found torch.bool, a mask; give the ids that it picks: ids[mask]"),
    "mask of bytes": (
        MASK.byte(),
        TypeError,
        "ids must be int64, found torch.uint8, which may be a mask; of a mask give ids[mask.bool()], and int64 num",
    ),
    "array mask": (MASK.numpy(), TypeError, "ids must be int64, found bool, a mask; give the ids that it picks"),
    "array of bytes": (MASK.byte().numpy(), TypeError, "ids must be int64, found uint8, which may be a mask"),
    "bools": ([True, False], TypeError, "an id must be a whole number, found True; of a mask, give the ids it picks"),
    "tensors of a bool": (list(MASK), TypeError, "found tensor(True); of a mask, give the ids it picks: ids[mask]"),
    "tensors of a byte": (list(MASK.byte()), TypeError, "of a mask, give the ids it picks: ids[mask]"),
    "numpy bools": (list(MASK.numpy()), TypeError, "found np.True_; of a mask, give the ids it picks: ids[mask]"),
    "numpy bytes": (list(MASK.byte().numpy()), TypeError, "found np.uint8(1); of a mask, give the ids it picks"),
    "bytes": (bytearray([1, 0]), TypeError, "ids must be a list or an int64 tensor, found bytearray"),
    "view of bytes": (memoryview(b"\1\0"), TypeError, "ids must be a list or an int64 tensor, found memoryview"),
    "floats": (torch.ones(2), TypeError, "ids must be int64, found torch.float32; use ids.long() if that loses"),
    "array of floats": (np.ones(2), TypeError, "ids must be int64, found float64; use ids.long() if that loses"),
    "objects": (np.array([3, "a"], dtype=object), TypeError, "ids must be int64, found object"),
    "numpy floats": ([np.float64(1)], TypeError, "an id must be a whole number, found np.float64(1.0)"),
    "tensors of a float": (list(torch.ones(1)), TypeError, "an id must be a whole number, found tensor(1.)"),
    "rows": ([torch.tensor([3])], TypeError, "an id must be a whole number, found tensor([3])"),
    "array rows": ([np.array([3])], TypeError, "an id must be a whole number, found array([3])"),
    "array of rows": (np.array([[3]]), ValueError, "ids must have one dimension, found (1, 1)"),
    "one number": (torch.tensor(3), ValueError, "ids must have one dimension, found ()"),
    "huge": (np.array([2**63], dtype=np.uint64), ValueError, "an id must fit into 64 bits, found 9223372036854775808"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_list_of_ids(name: str) -> None:
    given, error, message = REFUSED[name]
    for read in (as_ids, ordered_ids, distinct):
        with pytest.raises(error, match=re.escape(message)):
            read(given)  # type: ignore[operator]


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys, lambda i: dict.fromkeys(i).keys()])
def test_without_an_order_ids_can_be_forgotten_but_not_matched(make: Callable[[list[int]], set[int]]) -> None:
    given = make([3, 1])
    assert to_forget(given, "raise") == [1, 3]
    with pytest.raises(TypeError, match=f"ids must come in the order of the inputs, found a {type(given).__name__}, "):
        ordered_ids(given)


@pytest.mark.parametrize("view", [dict.values, dict.items])
def test_other_views_of_a_dict_have_no_order_either(view: Callable[[dict[int, int]], object]) -> None:
    with pytest.raises(TypeError, match="which has none; give a list or an int64 tensor with the id of each input at"):
        ordered_ids(view({0: 3}))  # type: ignore[arg-type]

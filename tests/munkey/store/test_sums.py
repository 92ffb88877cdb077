"""Sums over rows are those of a table made anew, to the bit, whatever happened before."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import keys_of, store
from torch import Tensor

import munkey.store.sums as sums_module
from munkey import Classification, KeyStore
from munkey.readout import UnitFeatures
from munkey.readout.linear import LabelledFeatures
from munkey.store.change import Added, Removed
from munkey.store.erase import Scratch
from munkey.store.sums import RowSums

SUMMAND = LabelledFeatures(UnitFeatures(3), Classification(4))


ACTS = ["add", "forget", "replace", "compact", "look", "load"]


def slow(found: KeyStore) -> Tensor:
    """A loop over rows, with Python's whole numbers."""
    total = [[0] * SUMMAND.width for _ in range(SUMMAND.width)]
    for row in range(found.used):
        label, key = int(found.labels[row]), found.keys[row].double()
        if label < 0:
            continue
        exponent = int(torch.frexp(key.abs().max()).exponent)
        whole = [round(float(x) * 2.0 ** (20 - exponent)) for x in key]
        length = math.sqrt(sum(x * x for x in whole))
        z = [int(label == c) for c in range(4)] + [round(x * 2**15 / length) for x in whole] + [1]
        total = [[old + a * b for old, b in zip(line, z, strict=True)] for line, a in zip(total, z, strict=True)]
    return torch.tensor(total, dtype=torch.float64)


@settings(max_examples=60)
@given(
    st.sampled_from([1, 3, 128]),
    st.lists(
        st.tuples(st.sampled_from("add forget replace compact look load".split()), st.integers(0, 9)), max_size=12
    ),
)
def test_any_history_leaves_the_sums_of_a_loop(height: int, history: list[tuple[str, int]]) -> None:
    with mock.patch.object(sums_module, "_HEIGHT", height):
        check(history)


def check(history: list[tuple[str, int]]) -> None:
    found = store()
    for step, (what, number) in enumerate(history):
        new = [i for i in range(3 * number, 3 * number + 9) if i not in found]
        if what == "add":
            found.add(new, keys_of(new, 2, salt=step), torch.arange(len(new)) % 4 if number % 3 else None)
        elif what == "forget":
            found.forget(range(number, 3 * number + 2), missing="ignore")
        elif what == "replace" and number in found:
            found.replace([number], keys_of([number], 1, salt=step), torch.tensor([number % 4]))
        elif what == "compact":
            found.compact()
        elif what == "load":
            found.load_state_dict(found.state_dict())
        elif what == "look":
            found.sums(SUMMAND)
            assert torch.equal(found.sums(SUMMAND).get(), slow(found))
    assert torch.equal(found.sums(SUMMAND).get(), slow(found))


@pytest.mark.parametrize("count", [1, 3, 30])
def test_a_step_that_is_run_again_adds_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_module, "_HEIGHT", 3)
    found = store()
    ids = list(range(40))
    found.add(ids, keys_of(ids), torch.arange(40) % 4)
    sums: RowSums = found.sums(SUMMAND)
    before = sums.get().clone()
    change = Removed.of(ids[:count], list(range(count)), 40)
    with Scratch() as scratch:
        steps = sums.steps(change, scratch)
        for step in (*steps, *steps):
            step()
    rows = torch.arange(count)
    assert torch.equal(before - sums.get(), sums.of(rows)) and not torch.equal(before, sums.get())


def test_bands_hold_half_of_the_sums_and_overwrite_them() -> None:
    z = torch.randint(-99, 99, (10, 2001), generator=torch.Generator().manual_seed(0)).double()
    z[:, -1] = 1
    bands = sums_module.Bands(2001)
    bands.add(z[:4])
    bands.add(z[4:])
    assert torch.equal(bands.dense(), z.T @ z) and sum(part.numel() for part in bands.parts) < 0.65 * 2001**2
    held = bands.parts
    bands.wipe()
    assert len(held) == 4 and not any(part.any() for part in held)


def test_what_was_derived_is_kept_until_rows_change_and_then_overwritten() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2])[:, 0], torch.tensor([0, 1]))
    sums, calls = found.sums(SUMMAND), []

    def make(total: Tensor) -> tuple[Tensor]:
        calls.append(1)
        return (total.sum()[None],)

    (held,) = sums.derived("total", make)
    assert sums.derived("total", make)[0] is held and held.any() and len(calls) == 1
    sums.derived("other", make)
    found.compact()
    assert len(calls) == 2 and sums.derived("total", make)[0] is held
    for change in (lambda: found.forget([1]), lambda: found.add([5], keys_of([5])[0], torch.tensor([2]))):
        (held,) = sums.derived("total", make)
        change()
        assert not held.any() and sums.derived("total", make)[0] is not held


def bands_of(found: KeyStore) -> list[Tensor]:
    sums: RowSums = found.sums(SUMMAND)
    assert sums.get().any() and sums._sums is not None
    return sums._sums.parts


def test_sums_are_overwritten_with_the_rows_they_are_of() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2])[:, 0], torch.tensor([0, 1]))
    (held,) = bands_of(found)
    found.load_state_dict(store().state_dict())
    assert not held.any() and not found.sums(SUMMAND).get().any()
    found.add([1, 2], keys_of([1, 2])[:, 0], torch.tensor([0, 1]))
    (held,) = bands_of(found)
    found.double()
    assert not held.any() and torch.equal(found.sums(SUMMAND).get(), slow(found))


@dataclass(frozen=True)
class Large:
    """A summand so large that sums of more than two rows may be inexact."""

    width: int = 2
    greatest: int = 2**26

    def __call__(self, keys: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([keys[:, :1] * 0 + self.greatest, keys[:, :1] * 0 + 1], 1).double()


def test_more_rows_than_can_be_summed_exactly_are_refused() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2])[:, 0])
    assert found.sums(Large()).get()[0, 0] == 2**53
    message = "sums of whole numbers up to 67108864 are exact for at most 2 rows, found 3; use fewer bits"
    with pytest.raises(ValueError, match=message):
        found.add([3], keys_of([3])[0])
    assert 3 not in found and found.sums(Large()).get()[1, 1] == 2
    other = store()
    other.add([1, 2, 3], keys_of([1, 2, 3])[:, 0])
    with pytest.raises(ValueError, match=message):
        other.sums(Large()).get()


def test_a_copy_of_a_store_has_sums_of_its_own() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2])[:, 0], torch.tensor([0, 1]))
    assert RowSums(found._table, SUMMAND).steps(Added(2, 2), Scratch()) == [], "nobody asked for the sums"
    found.sums(SUMMAND).get()
    other = copy.deepcopy(found)
    other.forget([1])
    assert torch.equal(found.sums(SUMMAND).get(), slow(found))
    assert torch.equal(other.sums(SUMMAND).get(), slow(other))

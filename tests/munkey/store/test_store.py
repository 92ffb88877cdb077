"""A store against a dictionary, over random sequences of what one can do with it."""

from __future__ import annotations

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from stores import WIDTHS, Plain, keys_of, store

from munkey import KeyStore

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
IDS = st.integers(-3, 12) | st.sampled_from([2**63 - 1, -(2**63)])
SOME = st.lists(IDS, unique=True, max_size=8)
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "forget", "replace", "train", "compact", "reload"]), SOME, st.integers(1, 3)),
    max_size=12,
)


def put(found: KeyStore, plain: Plain, ids: list[int], views: int, salt: int, how: str) -> None:
    keys, labels = keys_of(ids, views, salt), torch.tensor([abs(i) % 5 for i in ids], dtype=torch.int64)
    getattr(found, how)(ids, keys, labels)
    for row, instance in enumerate(ids):
        values = found.get([instance]).values.tolist()
        plain.rows[instance] = [(keys[row, view].tolist(), int(labels[row]), values[view]) for view in range(views)]


def train(found: KeyStore, plain: Plain) -> None:
    """Another number in every value."""
    with torch.no_grad():
        found.values[: found.used] += 1
    for instance, views in plain.rows.items():
        values = found.get([instance]).values.tolist()
        plain.rows[instance] = [(key, label, values[view]) for view, (key, label, _) in enumerate(views)]


def step(found: KeyStore, plain: Plain, action: str, ids: list[int], views: int, salt: int) -> KeyStore:
    there = [i for i in ids if i in plain.rows]
    if action == "add":
        put(found, plain, [i for i in ids if i not in plain.rows], views, salt, "add")
    elif action == "replace":
        put(found, plain, there, views, salt, "replace")
    elif action == "forget":
        receipt = found.forget(ids, missing="ignore")
        assert receipt.forgotten == tuple(sorted(there))
        assert receipt.absent == tuple(sorted(set(ids) - set(there)))
        assert receipt.rows == sum(len(plain.rows.pop(i)) for i in there)
    elif action == "train":
        train(found, plain)
    elif action == "compact":
        found.compact()
        assert len(found.ids) == found.used
    else:
        other = store()
        other.load_state_dict(found.state_dict())
        found = other
    return found


def rebuilt(plain: Plain) -> KeyStore:
    """A store that never held anything else, filled in another order."""
    found = store()
    for instance in sorted(plain.rows, key=lambda i: -i):
        keys, labels, values = zip(*plain.rows[instance], strict=True)
        found.add([instance], torch.tensor([keys]), torch.tensor(labels[:1]), torch.tensor([values]))
    return found


@quick
@given(STEPS)
def test_is_a_dictionary(steps: list[tuple[str, list[int], int]]) -> None:
    found, plain = store(), Plain()
    for salt, (action, ids, views) in enumerate(steps):
        found = step(found, plain, action, ids, views, salt)
        plain.check(found)
    fresh = rebuilt(plain)
    assert found.digest() == fresh.digest() == copy.deepcopy(found).digest()
    ours, theirs = found.state_dict(), fresh.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@quick
@given(SOME, SOME, st.integers(0, 99))
def test_laws_of_forgetting(first: list[int], second: list[int], seed: int) -> None:
    def filled() -> KeyStore:
        found = store(seed=seed)
        found.add(range(-3, 13), keys_of(list(range(-3, 13))))
        return found

    one, other, both = filled(), filled(), filled()
    for ids in (first, second):
        one.forget(ids, missing="ignore")
    for ids in (second, first, first):
        other.forget(ids, missing="ignore")
    both.forget([*first, *second], missing="ignore")
    states = [found.state_dict() for found in (one, other, both)]
    for name, column in states[0].items():
        assert torch.equal(column, states[1][name]) and torch.equal(column, states[2][name])
    assert one.digest() == other.digest() == both.digest()


def test_forgetting_all_is_a_fresh_store_and_nothing_is_nothing() -> None:
    found = store()
    found.add([1, 2, 3], keys_of([1, 2, 3]))
    before = [column.clone() for column in found.columns]
    receipt = found.forget([])
    assert (receipt.rows, receipt.bytes, receipt.before) == (0, 0, receipt.after)
    assert all(torch.equal(a, b) for a, b in zip(before, found.columns, strict=True))
    assert found.forget([3, 1, 2]).after == store().digest()
    assert all(not column.any() for column in found.columns)


def test_first_values_depend_on_seed_id_and_view_only() -> None:
    one, other = store(seed=4), store(seed=4)
    one.add([5, 9], keys_of([5, 9], 2))
    other.add([7], keys_of([7]))
    other.add([9], keys_of([9], 2, salt=3))
    other.add([5], keys_of([5]))
    assert torch.equal(one.get([9]).values, other.get([9]).values)
    assert torch.equal(one.get([5]).values[:1], other.get([5]).values)
    assert not torch.equal(one.get([5]).values[0], one.get([5]).values[1])
    many = KeyStore(1, 64, seed=1)
    many.add(range(2000), torch.zeros(2000, 1))
    assert many.values.std().item() == pytest.approx(0.02, rel=0.02) and abs(many.values.mean().item()) < 1e-3


def test_a_digest_is_keyed() -> None:
    one, other = KeyStore(*WIDTHS, secret=b"a"), KeyStore(*WIDTHS, secret=b"b")
    for found in (one, other):
        found.add([1], keys_of([1]))
    assert one.digest() != other.digest()
    assert KeyStore(*WIDTHS).secret != KeyStore(*WIDTHS).secret


@pytest.mark.parametrize("what", ["id", "key", "label", "value", "view", "dtype"])
def test_a_digest_sees_every_part(what: str) -> None:
    def build(changed: bool) -> KeyStore:
        found, hit = store(), lambda name: changed and what == name
        keys, values = keys_of([1]).clone(), torch.zeros(1, 1, 2)
        keys[0, 0, 1] += hit("key")
        values[0, 0, 1] += hit("value")
        found.add([2 if hit("id") else 1], keys, torch.tensor([1 if hit("label") else 0]), values)
        if hit("view"):
            found.views[0] = 1
            found._sum = None
        return found.double() if hit("dtype") else found

    assert build(False).digest() == build(False).digest() != build(True).digest()


def test_a_digest_follows_training() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    seen = {found.digest()}
    optimizer = torch.optim.SGD([found.values], lr=0.1)
    found.attach(optimizer)
    found.read(found.rows_of([1])).sum().backward()
    optimizer.step()
    seen.add(found.digest())
    with torch.no_grad():
        found.values[0, 0] = 5
    seen.add(found.digest())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": torch.tensor([1, 0, 0])}, "the views of an id are not 0, 1, ... in some order"),
        ({"views": torch.tensor([0, 0, 2])}, "the views of an id are not 0, 1, ... in some order"),
        ({"ids": torch.tensor([1, 1, 2])}, "the views of an id are not 0, 1, ... in some order"),
        ({"keys": torch.full((3, 3), torch.nan)}, "keys and values must be finite"),
        ({"values": torch.full((3, 2), torch.inf)}, "keys and values must be finite"),
        ({"keys": torch.zeros(3, 4)}, "expected keys of shape (3, 3), found (3, 4)"),
        ({"labels": torch.zeros(3)}, "expected labels like torch.int64, found torch.float32"),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(change: dict[str, torch.Tensor], message: str) -> None:
    other = store()
    other.add([1, 2, 3], keys_of([1, 2, 3]))
    found = store()
    found.add([7], keys_of([7]))
    before = found.digest()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        found.load_state_dict({**other.state_dict(), **change})
    assert found.digest() == before and list(found) == [7]


def test_membership_takes_any_whole_number() -> None:
    found = store()
    found.add([3], keys_of([3]))
    assert torch.tensor(3) in found and 4 not in found
    with pytest.raises(TypeError):
        assert "3" in found  # type: ignore[operator]


def test_a_key_must_be_finite_as_it_is_stored() -> None:
    found = store(dtype=torch.float16)
    with pytest.raises(ValueError, match=re.escape("keys must be finite as torch.float16; those of 1 instances are")):
        found.add([1, 2], torch.tensor([[1e10, 0, 0], [1.0, 0, 0]]))
    assert len(found) == 0

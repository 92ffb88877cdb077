"""The memory: what is nearest, what it says, and the table of neighbours against a fresh search."""

from __future__ import annotations

import re
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from stores import SECRET, WIDTHS, keys_of, seeded, store
from torch import Tensor

from munkey import KeyStore, KeyValueMemory, ValueWriter
from munkey.search import Neighbours, Searchable, exact


def memory(metric: str = "cosine", **settings: object) -> KeyValueMemory:
    found = KeyValueMemory(store(), metric=metric, **settings)  # type: ignore[arg-type]
    torch.nn.init.constant_(found.null, 7.0)
    return found


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_similarity(metric: str) -> None:
    found = memory(metric)
    ids = list(range(20))
    keys, queries = 3 * keys_of(ids)[:, 0], torch.randn(5, 3, generator=seeded(1))
    found.remember(ids, keys)
    expected = keys.double() @ queries.double().T
    if metric == "cosine":
        expected = torch.nn.functional.cosine_similarity(keys.double()[:, None], queries.double()[None], dim=2)
    best = expected.topk(4, 0)
    got = found(queries, 4)
    torch.testing.assert_close(got.scores.T, best.values, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.ids.T, best.indices)
    assert torch.equal(got.tokens, found.store.get(got.ids.flatten()).values.view(5, 4, 2))


def test_what_is_not_there_is_the_null_token_down_to_an_empty_memory() -> None:
    found = memory()
    found.remember([1, 2], keys_of([1, 2])[:, 0])
    got = found(keys_of([2])[:, 0], 3)
    assert got.ids.tolist() == [[2, 1, -1]] and got.tokens[0, 2].tolist() == [7.0, 7.0]
    assert got.scores[0, 2] == -torch.inf
    found.forget([1, 2])
    got = found(keys_of([2])[:, 0], 2)
    assert got.ids.tolist() == [[-1, -1]] and (got.tokens == 7).all()


def test_gradients_reach_values_and_null_only_where_they_were_read() -> None:
    found = memory()
    found.store.attach(torch.optim.SGD([found.store.values], lr=0.1))
    found.remember([1, 2, 3], torch.eye(3))
    found(torch.tensor([[1.0, 0.1, 0.0]]), 2).tokens.sum().backward()
    grad = found.store.values.grad
    assert grad is not None and grad[:3].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert found.null.grad is None or not found.null.grad.any()
    found.store.values.grad = None
    found(torch.tensor([[1.0, 0.1, 0.0]]), 5).tokens.sum().backward()
    assert found.null.grad is not None and found.null.grad.tolist() == [2.0, 2.0]


def test_own_rows_are_left_out() -> None:
    found = memory()
    found.remember([5, 6], torch.eye(3)[:2][:, None].repeat(1, 2, 1))  # two views each
    assert found(torch.eye(3)[:2], 2, exclude_ids=[5, 6]).ids.tolist() == [[6, 6], [5, 5]]
    assert found(torch.eye(3)[:2], 2, exclude_ids=[-9, 6]).ids.tolist() == [[5, 5], [5, 5]]


def test_a_written_value_is_what_the_writer_makes_of_key_and_label() -> None:
    writer = ValueWriter(*WIDTHS, task=4)
    found = KeyValueMemory(KeyStore(*WIDTHS, scale=0.0, secret=SECRET), writer=writer)
    found.remember([1, 2, 3], torch.eye(3), torch.tensor([3, 0, 1]))
    got = found(torch.eye(3), 1).tokens[:, 0]
    expected = writer.of_key.weight.T + writer.of_key.bias + writer.of_label.weight[[4, 1, 2]]
    torch.testing.assert_close(got, expected)
    found.store.replace([1], torch.eye(3)[:1])
    with pytest.raises(ValueError, match="expected labels below 4, found 4"):
        found.remember([9], keys_of([9]), torch.tensor([4]))
    assert 9 not in found.store
    expected = writer.of_key.weight[:, 0] + writer.of_key.bias + writer.of_label.weight[0]
    torch.testing.assert_close(found(torch.eye(3)[:1], 1).tokens[0, 0], expected)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "forget", "compact", "ask"]), st.lists(st.integers(0, 30), unique=True, max_size=9)
    ),
    max_size=10,
)


@settings(max_examples=60)
@given(STEPS, st.integers(1, 4))
def test_the_table_of_neighbours_equals_a_fresh_search(steps: list[tuple[str, list[int]]], k: int) -> None:
    found = memory()
    asked: list[int] = []

    def counting(store: KeyStore, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        asked.append(len(queries))
        return exact(store, queries, k, exclude_ids=exclude_ids)

    found.search = counting
    for action, ids in steps:
        if action == "add":
            new = [i for i in ids if i not in found.store]
            found.remember(new, keys_of(new, 2))
        elif action == "forget":
            found.forget(ids, missing="ignore")
        elif action == "compact":
            found.store.compact()
        rows = torch.arange(found.store.used)[::2]
        got, scores = found.neighbours_of_rows(rows, k)
        fresh = exact(found.store, found.store.keys[rows], k, exclude_ids=found.store.ids[rows])
        assert torch.equal(got, fresh.rows)
        torch.testing.assert_close(scores, fresh.scores)
        asked.clear()
        found.neighbours_of_rows(rows, k)
        assert not asked, "what is known is not looked up again"


def test_a_table_looks_up_again_only_what_had_a_neighbour_that_went() -> None:
    found = memory()
    angle = torch.arange(40) * 0.1
    found.remember(range(40), torch.stack([angle.cos(), angle.sin(), torch.zeros(40)], 1))
    rows = torch.arange(40)
    found.neighbours_of_rows(rows, 2)
    found.forget([20])
    table, _ = found.store._neighbours.tables[2]
    assert int((table[:, 0] == -2).sum()) == 2  # those of 19 and 21


def euclidean(store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
    scores = -torch.cdist(queries, store.keys[: store.used])
    ids = store.ids[: store.used]
    if exclude_ids is not None:
        scores = scores.masked_fill(exclude_ids[:, None] == ids, -torch.inf)
    best = scores.topk(k)
    return Neighbours(ids[best.indices], best.indices, best.values, torch.full((len(queries),), store.used))


def test_scores_are_those_of_the_search_for_queries_and_for_rows() -> None:
    found = memory("dot", search=euclidean)
    found.remember(range(20), keys_of(list(range(20))) * torch.arange(1, 21)[:, None, None])
    keys, rows = found.store.keys[:20], torch.tensor([3, 0, 7, 3])
    distances = torch.cdist(keys[rows], keys)
    distances[torch.arange(4), rows] = torch.inf
    expected = distances.topk(5, largest=False)
    got = found(keys[rows], 5, exclude_ids=rows)
    torch.testing.assert_close(got.scores, -expected.values)
    for _ in range(2):  # searched, and kept
        near, scores = found.neighbours_of_rows(rows, 5)
        assert torch.equal(near, expected.indices)
        torch.testing.assert_close(scores, -expected.values.double())
    found.forget([int(near[0, 0]), 19])
    _, fresh = found.neighbours_of_rows(torch.arange(18), 5)
    assert torch.equal(fresh, euclidean(found.store, found.store.keys[:18], 5, exclude_ids=found.store.ids[:18]).scores)


def test_another_search_has_other_neighbours_and_the_old_one_is_not_kept() -> None:
    found = memory("dot")
    found.remember(range(20), keys_of(list(range(20))) * torch.arange(1, 21)[:, None, None])
    rows = torch.arange(20)
    first = found.neighbours_of_rows(rows, 3)

    def other(store: Searchable, queries: Tensor, k: int, *, exclude_ids: Tensor | None = None) -> Neighbours:
        return euclidean(store, queries, k, exclude_ids=exclude_ids)

    left, found.search = weakref.ref(other), other
    del other
    near, scores = found.neighbours_of_rows(rows, 3)
    fresh = euclidean(found.store, found.store.keys[:20], 3, exclude_ids=found.store.ids[:20])
    assert not torch.equal(near, first[0]) and torch.equal(near, fresh.rows) and torch.equal(scores, fresh.scores)
    found.search = exact
    assert all(torch.equal(one, two) for one, two in zip(found.neighbours_of_rows(rows, 3), first, strict=True))
    assert left() is None


@settings(max_examples=40)
@given(st.integers(0, 99), st.floats(-0.5, 1.0), st.booleans())
def test_near_duplicates_are_all_pairs_above_a_threshold(seed: int, threshold: float, twins: bool) -> None:
    found = memory()
    keys = torch.randn(12, 2, 3, generator=seeded(seed))
    if twins:
        keys[5] = keys[3].flip(0)
    found.remember(range(12), keys)
    got = found.find_near_duplicates([3, 4, 5], threshold)
    stored = found.store.get(range(12)).keys.view(12, 2, 3).double()
    for own in (3, 4, 5):
        best = {i: max(float((a * b).sum()) for a in stored[own] for b in stored[i]) for i in range(12) if i != own}
        expected = sorted(((i, s) for i, s in best.items() if s >= threshold), key=lambda twin: (-twin[1], twin[0]))
        assert got.get(own, []) == expected
    assert not twins or threshold > 0.999 or got[3][0][0] == 5
    with pytest.raises(KeyError, match=r"ids \[77\] are not in the store"):
        found.find_near_duplicates([77])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: KeyValueMemory(m.store, metric="euclid"),
            ValueError,
            "metric must be 'cosine' or 'dot', found 'euclid'",
        ),
        (
            lambda m: m.remember([9], torch.zeros(1, 3)),
            ValueError,
            "keys must have a length above 0, or there is no angle",
        ),
        (
            lambda m: m(torch.zeros(1, 3), 1),
            ValueError,
            "queries must have a length above 0, or there is no angle; use",
        ),
        (
            lambda m: m(torch.ones(2, 3), 1, exclude_ids=[1]),
            ValueError,
            "one id to exclude for each of 2 queries, found 1",
        ),
        (lambda m: m(torch.ones(1, 3), 0), ValueError, "k must be at least 1, found 0"),
        (
            lambda m: m(torch.ones(1, 4), 1),
            ValueError,
            "expected queries of shape (B, 3) and dtype torch.float32, found",
        ),
        (lambda m: m.remember([1], torch.ones(1, 3)), ValueError, "ids [1] are in the store already; use replace to"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    found = memory()
    found.remember([1], torch.ones(1, 3))
    digest = found.store.digest()
    with pytest.raises(error, match=re.escape(message)):
        call(found)  # type: ignore[operator]
    assert found.store.digest() == digest

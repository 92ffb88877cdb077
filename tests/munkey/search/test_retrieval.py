"""Search against a plain sort in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from stores import seeded
from torch import Tensor

from munkey import KeyStore
from munkey.search import bounds as screening
from munkey.search import scores as scores_of
from munkey.search import screen
from munkey.search.exact import Neighbours, at_least, nearest
from munkey.search.screen import Screen, bytes_of, length_above

retrieval = import_module("munkey.search.exact")  # the package has a function of this name
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


LOOKS = ["screen", "float32", "float64"]


@pytest.fixture(params=LOOKS)
def look(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def slow(
    queries: Tensor, keys: Tensor, ids: Tensor, k: int, views: Tensor | None = None, exclude: Tensor | None = None
) -> list[list[tuple[float, int, int, int]]]:
    """`(score, id, view, row)` of the nearest of each query; the dot product is summed row by row."""
    found = []
    for b, query in enumerate(queries.double()):
        rows = [
            (float((key * query).sum()), int(i), 0 if views is None else int(views[row]), row)
            for row, (key, i) in enumerate(zip(keys.double(), ids, strict=True))
            if exclude is None or i != exclude[b]
        ]
        found.append(sorted(rows, key=lambda entry: (-entry[0], *entry[1:3]))[:k])
    return found


def check(found: Neighbours, oracle: list[list[tuple[float, int, int, int]]], k: int) -> None:
    for b, rows in enumerate(oracle):
        missing = k - len(rows)
        assert found.ids[b].tolist() == [row[1] for row in rows] + [-1] * missing
        assert found.rows[b].tolist() == [row[3] for row in rows] + [-1] * missing
        assert found.scores[b].tolist() == [row[0] for row in rows] + [-torch.inf] * missing


def search(queries: Tensor, keys: Tensor, ids: Tensor, k: int, look: str, **settings: Tensor | None) -> Neighbours:
    """With the look of a processor that has instructions for low precision, or not, whatever this one has."""
    with (
        patch.object(screening, "has_fast", lambda dtype: look == "screen"),
        patch.object(screening, "_float32_is_whole", lambda device: look != "float64"),
    ):
        kept = None if look == "float64" else Screen.of(keys)
        return nearest(queries, keys, ids, k, screen=kept, **settings)  # type: ignore[arg-type]


@settings(max_examples=80)
@given(
    st.integers(0, 120),
    st.integers(0, 5),
    st.sampled_from([1, 2, 7, 40]),
    st.integers(1, 9),
    st.integers(0, 999),
    st.data(),
)
def test_finds_what_a_sort_finds(rows: int, batch: int, width: int, k: int, seed: int, data: st.DataObject) -> None:
    generator = seeded(seed)
    dtype, look = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LOOKS))
    # Few different numbers make ties, great and small ones rounding.
    shape = data.draw(st.sampled_from(["normal", "ties", "whole", "near one", "great", "small", "wide"]))
    keys, queries = (torch.randn(n, width, generator=generator) for n in (rows, batch))
    if shape == "ties":
        keys, queries = keys.round(), queries.round()
    elif shape == "whole":  # what a screen holds exactly, but not their products
        keys, queries = (8 * keys).round(), (8 * queries).round()
    elif shape == "near one":
        keys, queries = 1 + keys / 1000, 1 + queries / 1000
    elif shape in ("great", "small"):
        keys = keys * (1e18 if shape == "great" else 1e-18) ** (1 if dtype != torch.float16 else 0.2)
        queries = queries * (1e18 if shape == "great" else 1e-18) ** (1 if dtype != torch.float16 else 0.2)
    elif shape == "wide":  # from where squares vanish to where they overflow
        low, high = (-25, 25) if dtype != torch.float16 else (-6, 2)
        keys = keys * 10.0 ** torch.randint(low, high, (rows, 1), generator=generator)
        queries = queries * 10.0 ** torch.randint(low // 2, high // 2, (batch, 1), generator=generator)
    keys, queries = keys.to(dtype), queries.to(dtype)
    owners = torch.randperm(rows, generator=generator) // data.draw(st.integers(1, 3)) - 5
    views = torch.zeros_like(owners)
    for i in owners.unique():
        mine = (owners == i).nonzero().squeeze(1)
        views[mine] = torch.randperm(len(mine), generator=generator)
    exclude = torch.randint(-6, 20, (batch,), generator=generator) if data.draw(st.booleans()) else None
    found = search(queries, keys, owners, k, look, views=views, exclude_ids=exclude)
    check(found, slow(queries, keys, owners, k, views, exclude), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_what_a_sort_finds_among_many(look: str, dtype: torch.dtype) -> None:
    keys = torch.randn(5000, 24, generator=seeded()).to(dtype)
    queries = torch.randn(9, 24, generator=seeded(1)).to(dtype)
    exact = keys.double() @ queries.double().T
    found = search(queries, keys, torch.arange(5000), 6, look)
    torch.testing.assert_close(found.scores.T, exact.topk(6, 0).values, rtol=1e-12, atol=0)
    assert torch.equal(found.rows.T, exact.topk(6, 0).indices)
    assert found.candidates.float().mean() < 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["greatest", "overflow", "lengths", "small", "smaller", "subnormal"])
def test_extremes(look: str, dtype: torch.dtype, k: int, kind: str) -> None:
    keys, queries = torch.randn(3000, 24, generator=seeded()), torch.randn(20, 24, generator=seeded(1))
    if kind == "greatest":
        keys[700] = torch.tensor([3.4e38, -3.4e38] + [0.0] * 22)
    elif kind == "overflow":
        keys[700, :2], queries = torch.tensor([1e38, -1e38]), 10 * queries
    elif kind == "lengths":
        keys[[3, 700, 701, 2900]] = 5e18 * keys[[3, 700, 701, 2900]].sign()
        queries = 3e18 * queries
    elif kind == "small":
        keys = 1e-23 * (1 + keys / 100)
    elif kind == "smaller":
        keys, queries = 1e-25 * (1 + 1e-7 * keys), 1e-3 * queries
    else:
        keys[:] = 0
        keys[700], keys[1900] = 2e-39, 1e-39
        queries = 1e17 * queries.abs()
    keys, queries = keys.to(dtype), queries.to(dtype)
    found = search(queries, keys, torch.arange(3000), k, look)
    best = (keys.double()[None] * queries.double()[:, None]).sum(2).topk(k, 1).values
    assert torch.equal(found.scores, best)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_screen_is_the_rounded_key_and_bounds_of_its_lengths(dtype: torch.dtype) -> None:
    keys = torch.randn(50, 7, generator=seeded()).to(dtype)
    kept = Screen.of(keys)
    assert torch.equal(kept.rounded[:, :-1], keys.bfloat16()) and (kept.rounded[:, -1] == 1).all()
    lost = (keys.double() - keys.bfloat16().double()).norm(dim=1)
    for bound, exact in ((kept.rounding, lost), (kept.length, keys.double().norm(dim=1))):
        assert (bound.double() >= exact).all() and (bound.double() <= exact * 1.01 + 1e-18).all()


@pytest.mark.parametrize("flush", [False, True])
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.sampled_from([1, 3, 40, 8200]),
    st.integers(0, 999),
    st.sampled_from(["row", "number", "one number"]),
)
def test_bounds_of_a_screen_are_bounds_whatever_the_sizes(
    flush: bool, dtype: torch.dtype, rows: int, width: int, seed: int, kind: str
) -> None:
    generator = seeded(seed)
    keys = torch.randn(rows, width, generator=generator).double()
    low, high = (-6, 4) if dtype == torch.float16 else (-40, 38)
    sizes = torch.randint(low, high, (rows, width if kind == "number" else 1), generator=generator)
    keys = keys * 10.0**sizes
    if kind == "one number":  # so great that squares of the others vanish beside it
        keys[:, 0] = 10.0 ** (high - 1)
    keys = keys.to(dtype)
    torch.set_flush_denormal(flush)
    try:
        kept = Screen.of(keys)
    finally:
        torch.set_flush_denormal(False)
    wide = keys.double()
    assert (kept.length.double() >= wide.norm(dim=1)).all()
    assert (kept.rounding.double() >= (wide - kept.rounded[:, :-1].double()).norm(dim=1)).all()
    assert (
        kept.small_rounding.double() >= (wide - kept.small.double() * kept.unit.double()[:, None]).norm(dim=1)
    ).all()


def test_a_screen_is_the_same_written_at_once_or_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(50, 7, generator=seeded())
    whole = Screen.of(keys)
    monkeypatch.setattr(screen, "_NUMBERS", 21)
    for one, other in zip(whole.columns, Screen.of(keys).columns, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_screen_holds_keys_in_bytes_and_what_was_lost(dtype: torch.dtype) -> None:
    keys = torch.randn(50, 7, generator=seeded()).to(dtype)
    keys[3], keys[4] = 0, 1e-42 if dtype != torch.bfloat16 else 0
    kept = Screen.of(keys)
    held = kept.small.double() * kept.unit.double()[:, None]
    lost = (keys.double() - held).norm(dim=1)
    assert (kept.small.int().abs().amax(1)[5:] == 127).all() and (lost[5:] < 0.02 * keys[5:].double().norm(dim=1)).all()
    assert (kept.small_rounding.double() >= lost).all()
    assert (kept.small_rounding.double() <= lost * 1.01 + 1e-30).all()


def bound_of(error: screening._Error, look: Tensor, width: int, rounding: Tensor, length: Tensor) -> Tensor:
    """How far scores are moved down and up, whichever is less, in float64."""
    factors = error.factors(width, rounding, length)
    lower, upper = (error.shift(look.clone(), *factors, sign).double() for sign in (-1, 1))
    return torch.minimum(upper - look.double(), look.double() - lower)


@pytest.mark.parametrize("kind", ["normal", "whole", "unequal", "one number"])
def test_a_look_at_bytes_is_as_wrong_as_its_bound_says_at_most(kind: str) -> None:
    keys, queries = torch.randn(3000, 50, generator=seeded()), torch.randn(9, 50, generator=seeded(1))
    if kind == "whole":
        keys, queries = (9 * keys).round(), (9 * queries).round()
    elif kind == "unequal":
        keys = keys * torch.logspace(-3, 3, 3000)[:, None]
    elif kind == "one number":  # so great that the others are lost
        keys[:, 0] = 1e4
    kept = Screen.of(keys)
    small, unit, rounding = bytes_of(queries)
    look = screening._best_of_groups(small, kept.small, 1, kept.unit)
    error = screening._Error(length_above(small), rounding / unit, torch.zeros(9), torch.float32)
    bound = bound_of(error, look, 50, kept.small_rounding, kept.length) * unit
    wrong = (keys.double() @ queries.double().T - look.double() * unit).abs()
    assert (wrong <= bound).all()
    assert (wrong / bound).max() > 0.05, "a bound so loose would let everything pass"


def test_where_sums_of_products_of_bytes_saturate_nobody_looks_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        return (a.int()[:, :, None] * b.int()[None]).sum(1).clamp(-(2**15), 2**15 - 1)

    keys = torch.randn(500, 8, generator=seeded())
    right = search(keys[:2], keys, torch.arange(500), 4, "screen")
    monkeypatch.setattr(torch, "_int_mm", saturating)
    screening._bytes_are_exact.cache_clear()
    try:
        assert not screening._bytes_are_exact()
        monkeypatch.setattr(screening, "_in_bytes", None)
        assert torch.equal(search(keys[:2], keys, torch.arange(500), 4, "screen").ids, right.ids)
    finally:
        screening._bytes_are_exact.cache_clear()


def test_where_a_sum_in_bfloat16_is_rounded_on_its_way_nobody_looks_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(500, 8, generator=seeded())
    right = search(keys[:1], keys, torch.arange(500), 4, "float32")
    monkeypatch.setattr(screening, "_one_sum_is_whole", lambda: False)
    monkeypatch.setattr(screening, "_in_bfloat16", None)
    assert torch.equal(search(keys[:1], keys, torch.arange(500), 4, "float32").ids, right.ids)


@settings(max_examples=30)
@given(st.integers(0, 40), st.sampled_from([1, 3, 700]), st.sampled_from([1, 64, 2100]), st.sampled_from(DTYPES))
def test_scores_of_pairs_are_those_of_plain_sums_in_blocks_of_any_size(
    count: int, width: int, numbers: int, dtype: torch.dtype
) -> None:
    generator = seeded(count)
    keys, queries = (torch.randn(n, width, generator=generator).to(dtype) for n in (9, 5))
    query, row = (torch.randint(n, (count,), generator=generator) for n in (5, 9))
    for wide in {torch.float64, torch.promote_types(dtype, torch.float32)}:
        # A row more, since a sum that is alone is divided among threads.
        pairs = [torch.cat([column, column.new_zeros(1)]) for column in (query, row)]
        exact = (queries[pairs[0]].to(wide) * keys[pairs[1]].to(wide)).sum(1)[:count]
        with patch.object(scores_of, "_SCORED", numbers):
            found = scores_of.pair_scores(queries, keys, query, row, wide)
        assert found.dtype == wide and torch.equal(found, exact)


def test_a_pair_has_the_same_score_alone() -> None:
    keys, threads = torch.randn(8, 70_000, generator=seeded()), torch.get_num_threads()
    queries = torch.randn(8, 70_000, generator=seeded(1))
    torch.set_num_threads(2)
    try:
        rows = torch.arange(8)
        together = scores_of.pair_scores(queries, keys, rows, rows)
        alone = torch.cat([scores_of.pair_scores(queries, keys, row, row) for row in rows.split(1)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "unequal", "tiny"])
def test_a_look_in_float32_is_as_wrong_as_its_bound_says_at_most(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = torch.randn(3000, 50, generator=seeded()), torch.randn(40, 50, generator=seeded(1))
    if kind == "unequal":
        keys = keys * torch.logspace(-3, 3, 3000)[:, None]
    elif kind == "tiny":
        keys, queries = 1e-6 * keys, 1e-1 * queries
        if dtype != torch.float16:
            keys, queries = 1e-34 * keys, 1e20 * queries
    keys, queries = keys.to(dtype), queries.to(dtype)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    shift = screening._Error.shift

    def spy(self: screening._Error, scores: Tensor, of_keys: Tensor, of_queries: Tensor, sign: int) -> Tensor:
        assert self.dtype == torch.float32
        before = scores.double()
        seen[sign] = before, (shift(self, scores, of_keys, of_queries, sign).double() - before) * sign
        return scores

    monkeypatch.setattr(screening, "_BLOCK", 1 << 20)  # all at once
    monkeypatch.setattr(screening._Error, "shift", spy)
    monkeypatch.setattr(screening, "_GROUP", 1)
    flushing = torch.set_flush_denormal(kind == "tiny")
    try:
        screening.plain(queries, keys, length_above(keys), 750)  # so many that a row is its own group
    finally:
        torch.set_flush_denormal(False)
    assert flushing and len(seen) == 2
    for scores, bound in seen.values():
        assert scores.shape == (3000, 40)
        wrong = (keys.double() @ queries.double().T - scores).abs()
        assert (wrong <= bound).all()
        assert kind == "tiny" or (wrong / bound).max() > 1e-4, "a bound so loose would let everything pass"


@pytest.mark.parametrize("offset", [0.0, 0.5, -300.0])
@pytest.mark.parametrize("kind", ["normal", "whole", "unequal"])
def test_a_look_is_as_wrong_as_its_bound_says_at_most(kind: str, offset: float) -> None:
    keys, queries = torch.randn(3000, 50, generator=seeded()), torch.randn(40, 50, generator=seeded(1))
    if kind == "whole":  # which bfloat16 holds exactly, but not their products
        keys, queries = (9 * keys).round(), (9 * queries).round()
    elif kind == "unequal":
        keys = keys * torch.logspace(-3, 3, 3000)[:, None]
    kept, rounded = Screen.of(keys), queries.bfloat16()
    offsets = torch.full((40,), offset).bfloat16()
    look = (kept.rounded @ torch.cat([rounded, -offsets[:, None]], 1).T).float()
    lost = length_above(queries - rounded.float())
    error = screening._Error(length_above(rounded), lost, offsets.abs().float(), torch.bfloat16)
    bound = bound_of(error, look, 51, kept.rounding, kept.length)
    wrong = (keys.double() @ queries.double().T - offset - look.double()).abs()
    assert (wrong <= bound).all()
    assert (wrong / bound).max() > 0.05, "a bound so loose would let everything pass"


def test_equal_keys_come_in_the_order_of_ids_wherever_they_stand(look: str) -> None:
    keys = torch.randn(40, 8, generator=seeded()).repeat(25, 1)
    order = torch.randperm(1000, generator=seeded(1))
    one = search(keys[:40], keys, torch.arange(1000), 30, look)
    other = search(keys[:40], keys[order], order, 30, look)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.scores, other.scores)
    assert torch.equal(one.ids[3, :25], torch.arange(25) * 40 + 3)


def test_scores_depend_neither_on_the_batch_nor_on_the_place(look: str) -> None:
    keys, queries = torch.randn(3000, 33, generator=seeded()), torch.randn(70, 33, generator=seeded(1))
    ids = torch.arange(3000)
    whole = search(queries, keys, ids, 5, look)
    for rows in (slice(0, 1), slice(11, 14), slice(3, 70)):
        alone = search(queries[rows], keys, ids, 5, look)
        assert torch.equal(whole.scores[rows], alone.scores) and torch.equal(whole.ids[rows], alone.ids)
    moved = search(queries, keys.roll(7, 0), ids.roll(7), 5, look)
    assert torch.equal(whole.scores, moved.scores) and torch.equal(whole.ids, moved.ids)
    fewer = search(queries, keys[whole.rows[0]], whole.ids[0], 5, look)
    assert torch.equal(whole.scores[0], fewer.scores[0])


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name, value in ((retrieval, "_PAIRS", 300), (scores_of, "_SCORED", 64), (screening, "_BLOCK", 100)):
        monkeypatch.setattr(module, name, value)
    yield


@pytest.mark.usefixtures("few_pairs")
def test_too_many_pairs_are_looked_at_in_turn(look: str) -> None:
    keys, queries = torch.ones(500, 4), torch.randn(5, 4, generator=seeded())
    exclude = torch.tensor([0, 3, 600, 2, 1])
    found = search(queries, keys, torch.arange(500), 3, look, exclude_ids=exclude)
    check(found, slow(queries, keys, torch.arange(500), 3, None, exclude), 3)


def test_a_screen_narrows_and_where_it_does_not_full_precision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded()
    keys = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=generator), dim=1)
    looks: list[torch.dtype] = []
    look = screening._best_of_groups

    def spy(queries: Tensor, keys: Tensor, group: int, unit: Tensor | None = None) -> Tensor:
        looks.append(keys.dtype)
        return look(queries, keys, group, unit)

    monkeypatch.setattr(screening, "_best_of_groups", spy)
    found = search(keys[:50], keys, torch.arange(20_000), 4, "screen")
    assert looks == [torch.bfloat16] and found.candidates.max() < 2000
    # Keys that differ by less than bfloat16 can tell.
    near = 1 + keys / 1e4
    search(near[:50], near, torch.arange(20_000), 4, "screen")
    assert looks == [torch.bfloat16, torch.bfloat16, torch.float32]
    looks.clear()
    found = search(keys[:3], keys, torch.arange(20_000), 4, "screen")
    assert looks == [torch.int8] and found.candidates.max() < 4000, "a few queries look at bytes"
    search(near[:3], near, torch.arange(20_000), 4, "screen")
    assert looks == [torch.int8, torch.int8, torch.bfloat16, torch.float32]
    looks.clear()
    for rows in (3, 50):
        search(keys[:rows], keys, torch.arange(20_000), 4, "float32")
    assert looks == [torch.float32, torch.float32], "without instructions for less nobody looks at less"
    looks.clear()
    search(keys[:1], keys, torch.arange(20_000), 4, "float32")
    assert looks == [torch.bfloat16], "but for one query, which is no work"
    looks.clear()
    alike = torch.arange(20_000) % 1250 < 60  # 60 groups, 5 rows in 100, too many for several queries
    keys[alike] = keys[0] + keys[alike] / 1e4
    search(keys[:1], keys, torch.arange(20_000), 4, "float32")
    assert looks == [torch.bfloat16], "one query scores more of them again before it looks in full precision"
    search(near[:1], near, torch.arange(20_000), 4, "float32")
    assert looks == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("queries", "k", "error", "message"),
    [
        (torch.zeros(1, 3), 0, ValueError, "k must be at least 1, found 0"),
        (torch.zeros(1, 3), 1.0, TypeError, "k must be a whole number, found 1.0"),
        (torch.zeros(3), 1, ValueError, "expected queries of shape (B, 3) and dtype torch.float32, found (3,)"),
        (torch.zeros(1, 4), 1, ValueError, "expected queries of shape (B, 3) and dtype torch.float32, found (1, 4)"),
        (torch.zeros(1, 3).double(), 1, ValueError, "found (1, 3) and torch.float64"),
        (torch.full((1, 3), torch.nan), 1, ValueError, "queries must be finite, found NaN or infinity"),
    ],
)
def test_bad_queries(queries: Tensor, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        nearest(queries, torch.zeros(2, 3), torch.arange(2), k)


def test_without_rows_no_pair_is_near() -> None:
    query, row, scores = at_least(torch.rand(2, 3), torch.empty(0, 3), 0.5)
    assert len(query) == len(row) == len(scores) == 0
    assert all(len(found) == 0 for found in KeyStore(3, 2).at_least(torch.rand(2, 3), 0.5))

"""A store on several ranks says what one store says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_cases import play_on_one, play_on_ranks, queries
from rank_pool import RankPool


@pytest.fixture(scope="module", params=[1, 2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    pool = RankPool(request.param)
    yield pool
    pool.close()


ids = st.lists(st.integers(-3, 12) | st.sampled_from([2**63 - 1, -(2**63)]), unique=True, max_size=8)
operations = st.lists(st.tuples(st.sampled_from(["add", "add", "forget", "replace", "compact"]), ids), max_size=6)


@settings(max_examples=15, deadline=None)
@given(operations=operations, k=st.integers(1, 5))
def test_answers_are_those_of_one_store(pool: RankPool, operations: list, k: int) -> None:
    said, expected = play_on_one(operations, queries(), k)
    found = pool.run(play_on_ranks, operations, queries(), k)
    for rank, (got, answers) in enumerate(found):
        assert got == said, "receipts, digests and counts"
        part = slice(rank, None, pool.size)
        assert answers["ids"] == expected["ids"]
        for ours, theirs in zip(answers["nearest"], expected["nearest"], strict=True):
            for x, y in zip(ours, theirs, strict=True):
                assert torch.equal(x, y[part])
        mine = expected["ids"][part]
        keep = torch.isin(expected["rows"][0], torch.tensor(mine, dtype=torch.int64))
        for x, y in zip(answers["rows"], expected["rows"], strict=True):
            assert torch.equal(x, y[keep])
        assert answers["contains"] == [True] * len(mine) + [False]
        for ours, near in zip(answers["owners"], answers["nearest"], strict=True):
            assert torch.equal(ours, near[0][~near[2]]), "row numbers lead to the rows that were found"

"""Index batches: each row once, in an order that follows the seed."""

from __future__ import annotations

import pytest
import torch
from datafiles import quick
from hypothesis import given
from hypothesis import strategies as st

from treediff.data import batches


@quick
@given(st.integers(1, 50), st.integers(1, 60), st.booleans(), st.integers(0, 2**63 - 1))
def test_batches_hold_each_row_once(n: int, batch_size: int, shuffle: bool, seed: int) -> None:
    def epoch(drop_last: bool = False) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        found = batches(n, batch_size, generator=generator, shuffle=shuffle, drop_last=drop_last)
        return [rows.tolist() for rows in found]

    rows = epoch()
    order = [row for batch in rows for row in batch]
    assert sorted(order) == list(range(n))
    assert all(len(batch) == batch_size for batch in rows[:-1]) and 1 <= len(rows[-1]) <= batch_size
    assert rows == epoch()
    assert shuffle or order == list(range(n))
    if n >= batch_size:
        assert epoch(drop_last=True) == [batch for batch in rows if len(batch) == batch_size]


def test_batches_shuffle_and_move_on() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(batches(100, 7, generator=generator))) for _ in range(2))
    assert first.tolist() != second.tolist() != list(range(100))
    assert first.dtype == torch.int64


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    orders = {tuple(torch.cat(list(batches(100, 7))).tolist()) for _ in range(2)}
    assert len(orders) == 2
    assert torch.equal(before, torch.random.get_rng_state())


def test_bad_batches() -> None:
    for n, batch_size in ((0, 1), (5, 0), (-1, 3)):
        with pytest.raises(ValueError, match=rf"at least 1, found n={n}, batch_size={batch_size}"):
            batches(n, batch_size)
    with pytest.raises(ValueError, match=r"drop_last: expected a full batch of 4, found 3 rows; turn it off"):
        batches(3, 4, drop_last=True)

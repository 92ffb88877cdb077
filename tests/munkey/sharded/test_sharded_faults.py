"""A rank that is killed in the middle: after a restart all is done, or nothing, and nobody comes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_cases import filled
from rank_faults import GONE, act, found, prepared
from rank_pool import RankPool


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("what", ["forget", "save", "search"])
def test_killed_between_any_two_steps(pools: Callable[[int], RankPool], tmp_path: Path, what: str, victim: int) -> None:
    one = filled()
    pieces = [key.numpy().tobytes() for key in one.get(GONE).keys]
    before = one.digest(), list(one)
    if what != "search":
        one.forget(GONE)
    after = one.digest(), list(one)
    assert set(map(str, pools(2).run(prepared, str(tmp_path / "start")))) == {str(before)}

    def attempt(name: str, at: int) -> list[object]:
        shutil.copytree(tmp_path / "start", tmp_path / name)
        pool = RankPool(2)
        said = pool.tried(act, what, str(tmp_path / name), victim, at)
        pool.close()
        return said

    steps = attempt("whole", -1)[victim]
    assert isinstance(steps, int) and steps > 2
    names = sorted(path.name for path in (tmp_path / "whole").rglob("*"))
    seen = set()
    for at in range(victim, steps, 2):  # the other victim is killed at the steps between
        folder = str(tmp_path / str(at))
        said = attempt(str(at), at)
        assert said[victim] is None and isinstance(said[1 - victim], Exception | int), (
            "the other one notices, or is done"
        )
        state, other = pools(2).run(found, what, folder)
        assert state == other and state in (before, after)
        seen.add(state == before)
        pools(2).run(act, what, folder, -1, -1)  # repeated
        assert pools(2).run(found, what, folder) == [after, after]
        files = list(Path(folder).rglob("*"))
        assert sorted(path.name for path in files) == names
        parts = [
            path.read_bytes() for path in files if path.is_file() and (what == "save") == (path.parent.name == "saved")
        ]
        assert what == "search" or not any(piece in part for piece in pieces for part in parts)
        shutil.rmtree(folder)
    assert seen == {True, False} if what != "search" else {True}

"""Runs that are killed, asked to stop from outside, or made by many processes together."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from long_run_cases import STEPS, endless, killed, stopped, together, trained
from rank_pool import RankPool

from treediff.core.checkpoint import read_checkpoint

_processes = mp.get_context("forkserver")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The result of a run that was not interrupted."""
    return trained(tmp_path_factory.mktemp("whole") / "a").result()


@pytest.mark.parametrize("where", ["half", "fsync", "replace"])
def test_a_process_killed_while_it_writes_leaves_the_checkpoint_before(
    where: str, expected: list[Any], tmp_path: Path
) -> None:
    process = _processes.Process(target=killed, args=(tmp_path / "a", where, 16))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert left[0] == "a" and re.fullmatch(r"a\.[0-9a-f]{8}\.partial", left[1])
    rest = trained(tmp_path / "a", resume=True)
    # The sixteenth would have been written after fourteen steps, and at the end of the first stage.
    assert rest.result() == expected and rest.done == STEPS - 13
    assert os.listdir(tmp_path) == []


def test_a_process_killed_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, before = tmp_path / "a", 0.0
    for wait in (0.3, 0.05, 0.11):
        process = _processes.Process(target=endless, args=(path, before > 0))
        process.start()
        begun = time.monotonic()
        while time.monotonic() < begun + 60 and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.join(60)
        weight = read_checkpoint(path)["model"]["weight"]
        assert weight.min() == weight.max() == read_checkpoint(path)["place"]["epoch"], "all of one moment"
        before = path.stat().st_mtime_ns


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_from_outside(number: int, status: int, expected: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a"
    process = _processes.Process(target=stopped, args=(path,))
    process.start()
    begun = time.monotonic()
    while time.monotonic() < begun + 60 and not Path(f"{path}.begun").exists():
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    assert Path(f"{path}.said").read_text() == (
        "\nfinishing the step, then writing a checkpoint; once more stops at once\n"
        f"stopped; go on with --resume from the checkpoint {path}\n"
    )
    assert trained(path, resume=True).result() == expected


# --- on many processes --------------------------------------------------------------------------------------


def test_many_processes_stop_and_go_on_together(pool: RankPool, tmp_path: Path) -> None:
    whole = pool.run(together, str(tmp_path / "a"), False, 0, 0)
    assert all(status == 0 and done == STEPS for _, status, done in whole)
    for at in (5, 17):
        path = str(tmp_path / f"{at}")
        halves = pool.run(together, path, False, at, pool.size - 1)
        # Whoever was asked says so; the others stop as if by Ctrl-C; all after the same step.
        assert [done for _, _, done in halves] == [at] * pool.size
        assert [status for _, status, _ in halves] == [130] * (pool.size - 1) + [143]
        rest = pool.run(together, path, True, 0, 0)
        assert [result for result, _, _ in rest] == [result for result, _, _ in whole]
        assert [done for _, _, done in rest] == [STEPS - at] * pool.size
    assert os.listdir(tmp_path) == []
    assert len({str(result) for result, _, _ in whole}) == 1, "all have the same weights"


def test_another_number_of_processes_is_refused(pools: Callable[[int], RankPool], tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    pools(2).run(together, path, False, 5, 0)
    with pytest.raises(ValueError, match="the checkpoint is of a run on 2 processes, found 1; start as many"):
        trained(tmp_path / "a", resume=True)
    for error in pools(3).tried(together, path, True, 0, 0):
        assert isinstance(error, ValueError) and "of a run on 2 processes, found 3; start as many" in str(error)

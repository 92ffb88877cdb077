"""A run that is interrupted anywhere ends as it would have ended; what is written is whole at every moment."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from long_run_cases import BATCHES, EPOCHS, STEPS, Training, trained

from treediff import EMA
from treediff.core.checkpoint import CheckpointFiles
from treediff.core.long_run import LongRun
from treediff.core.stopping import StopRequest


@pytest.fixture(autouse=True)
def python_hears_ctrl_c() -> Iterator[None]:
    """As it does unless a shell has put the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "put back by whoever changed it"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The result of a run that was not interrupted."""
    return trained(tmp_path_factory.mktemp("whole") / "a").result()


def ask(at: int, number: int = signal.SIGINT) -> Callable[[int], None]:
    """Ask to stop in a step."""
    return lambda done: signal.raise_signal(number) if done == at else None


@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_it_goes_on_after_any_step(at: int, expected: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="130"):
        trained(tmp_path / "a", ask(at))
    rest = trained(tmp_path / "a", resume=True)
    assert rest.result() == expected
    assert rest.done == STEPS - at and os.listdir(tmp_path) == []


def test_a_break_after_every_step_changes_nothing(expected: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "a"
    for done in range(STEPS):
        with pytest.raises(SystemExit):
            trained(path, ask(1), resume=done > 0)
    assert trained(path, resume=True).result() == expected


def test_without_a_path_there_is_progress_and_nothing_else(
    expected: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training()
    with LongRun() as run:
        training.run(run, lambda _: _hears_nothing())
    assert training.result() == expected
    lines = capsys.readouterr().err.splitlines()
    pattern = r"stage {}: step 12 of 12 \(100 %\), \d+.\d steps/s, took 0:\d\d, loss [\d.]+"
    assert [bool(re.fullmatch(pattern.format(n), line)) for n, line in enumerate(lines)] == [True, True]


def _hears_nothing() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_numbers_of_steps(tmp_path: Path) -> None:
    model, seen = torch.nn.Linear(1, 1), []

    def go(resume: bool, stop: int = -1) -> None:
        with LongRun(tmp_path / "a", resume=resume, show=False) as run:
            for rows in run.steps(
                "x", 2, lambda epoch: [torch.tensor([epoch, 0]), torch.tensor([1])], {"model": model}
            ):
                seen.append((run.epoch, run.step, rows.tolist()))
                if len(seen) == stop:
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit):
        go(False, stop=3)
    go(True)
    assert seen == [(0, 0, [0, 0]), (0, 1, [1]), (1, 0, [1, 0]), (1, 1, [1])]


def test_time_counts_whatever_came_before(tmp_path: Path) -> None:
    def slow(done: int) -> None:
        time.sleep(0.3 if done == 2 else 0)
        ask(2)(done)

    with pytest.raises(SystemExit):
        trained(tmp_path / "a", slow)
    run = LongRun(tmp_path / "a", resume=True, show=False)
    Training().run(run)
    assert 0.3 < run.seconds < 100


# --- when a checkpoint is written ---------------------------------------------------------------------------


class Counting(CheckpointFiles):
    """How often each was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, path: str, data: bytes) -> None:
        self.calls.append("write")
        super().write(path, data)

    def remove(self, path: str) -> None:
        self.calls.append("remove")
        super().remove(path)


@pytest.mark.parametrize(("every", "count"), [(300.0, 2), (0.0, STEPS + 2)])
def test_a_checkpoint_comes_after_so_many_seconds_and_with_the_end_of_a_stage(
    every: float, count: int, tmp_path: Path
) -> None:
    files = Counting()
    trained(tmp_path / "a", every=every, files=files)
    assert files.calls == ["write"] * count + ["remove"]


def test_every_checkpoint_is_one_to_go_on_from(expected: list[Any], tmp_path: Path) -> None:
    kept = []

    class Keeping(CheckpointFiles):
        def write(self, path: str, data: bytes) -> None:
            kept.append(data)

    trained(tmp_path / "a", every=0.0, files=Keeping())
    for data in kept:
        (tmp_path / "a").write_bytes(data)
        assert trained(tmp_path / "a", resume=True).result() == expected


def test_what_fails_leaves_the_checkpoint(expected: list[Any], tmp_path: Path) -> None:
    def fail(done: int) -> None:
        if done == 15:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trained(tmp_path / "a", fail)
    rest = trained(tmp_path / "a", resume=True)
    assert rest.result() == expected and rest.done == EPOCHS * BATCHES, "from the end of the first stage"


def test_a_full_disk_leaves_the_checkpoint_before(
    expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trained(tmp_path / "a", every=0.0)
    assert caught.value.__notes__ == [
        f"the checkpoint before this one is whole, {tmp_path / 'a'}; make room and go on with --resume"
    ]
    assert os.listdir(tmp_path) == ["a"]
    assert trained(tmp_path / "a", resume=True).result() == expected


def test_a_full_disk_at_the_first_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        trained(tmp_path / "a")
    assert not hasattr(caught.value, "__notes__") and os.listdir(tmp_path) == []


# --- being asked to stop ------------------------------------------------------------------------------------


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def twice(done: int) -> None:
        if done == 14:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("not at once")

    with pytest.raises(SystemExit, match="130"):
        trained(tmp_path / "a", twice)
    goodbye = f"stopped; go on with --resume from the checkpoint {tmp_path / 'a'}"
    assert capfd.readouterr().err.splitlines()[-1] == goodbye
    assert trained(tmp_path / "a", resume=True).done == EPOCHS * BATCHES, "from the end of the first stage"


def test_ctrl_c_before_there_is_a_checkpoint_is_what_it_always_is(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), LongRun(tmp_path / "a", show=False):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_after_the_last_stage_keeps_the_checkpoint(expected: list[Any], tmp_path: Path) -> None:
    training = Training()
    with pytest.raises(SystemExit, match="130"), LongRun(tmp_path / "a", show=False) as run:
        training.run(run)
        signal.raise_signal(signal.SIGINT)  # while it is measured, say
    rest = trained(tmp_path / "a", resume=True)
    assert rest.result() == expected and rest.done == 0


def test_a_process_in_the_background_still_hears_no_ctrl_c() -> None:
    request = StopRequest()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.listen()
    signal.raise_signal(signal.SIGINT)
    assert request.number is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.raise_signal(signal.SIGTERM)
    assert request.number == signal.SIGTERM  # type: ignore[comparison-overlap]
    signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread_hears_nothing(expected: list[Any], tmp_path: Path) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(trained(tmp_path / "a", lambda _: _hears_nothing()).result()))
    thread.start()
    thread.join(60)
    assert found == [expected]


# --- what is refused ----------------------------------------------------------------------------------------


def test_runs_that_cannot_begin(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ValueError, match="a run goes on from a checkpoint; expected its path, found none"):
        LongRun(resume=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        LongRun(path, resume=True)
    with pytest.raises(SystemExit):
        trained(path, ask(1))
    with pytest.raises(
        FileExistsError, match=r"there is a checkpoint of an interrupted run, .*; go on with --resume, or"
    ):
        LongRun(path)


def test_stages_that_cannot_begin(tmp_path: Path) -> None:
    run = LongRun(tmp_path / "a")
    with pytest.raises(ValueError, match="'place' is the name of where a run is; give the part another name"):
        next(run.steps("x", 1, lambda _: [], {"place": 3}))
    with pytest.raises(ValueError, match="expected at least one batch in an epoch, found none in epoch 0"):
        next(run.steps("x", 1, lambda _: [], {}))


def test_a_run_that_begins_with_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path / "a", ask(1))
    run = LongRun(tmp_path / "a", resume=True)
    with pytest.raises(
        ValueError, match="the run was interrupted in the stage 'stage 0'; expected that, found 'other'"
    ):
        next(run.steps("other", 1, lambda _: [], _parts()))


def _parts() -> dict[str, Any]:
    model = torch.nn.Linear(3, 1)
    return {
        "training": Training(),
        "model": model,
        "optimizer": torch.optim.Adam(model.parameters()),
        "ema": EMA(model),
        "order": torch.Generator(),
        "noise": torch.Generator(),
    }

"""Exactly what is shown, for a clock of our own."""

from __future__ import annotations

import io
import os
import pty

import pytest
import torch

from treediff.core.progress import Progress


class Clock:
    """Goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal of no system."""

    def isatty(self) -> bool:
        return True


def run(progress: Progress, clock: Clock, steps: int, seconds: float) -> None:
    for step in range(steps):
        clock.now += seconds
        progress.update(loss=1 / (step + 1))


def test_a_log_gets_a_plain_line_now_and_then_and_one_at_the_end() -> None:
    log, clock = io.StringIO(), Clock()
    progress = Progress("0 initial", 50, stream=log, clock=clock)
    run(progress, clock, 50, 1.0)
    progress.close()
    progress.close()
    assert log.getvalue() == (
        "0 initial: step 20 of 50 (40 %), 1.0 steps/s, 0:30 left, loss 0.05\n"
        "0 initial: step 40 of 50 (80 %), 1.0 steps/s, 0:10 left, loss 0.025\n"
        "0 initial: step 50 of 50 (100 %), 1.0 steps/s, took 0:50, loss 0.02\n"
    )


def test_a_last_line_that_was_there_is_not_said_twice() -> None:
    log, clock = io.StringIO(), Clock()
    progress = Progress("long", 2, stream=log, clock=clock)
    run(progress, clock, 2, 5000.0)
    progress.close()
    assert log.getvalue() == (
        "long: step 1 of 2 (50 %), 5000.0 s/step, 1:23:20 left, loss 1\n"
        "long: step 2 of 2 (100 %), 5000.0 s/step, took 2:46:40, loss 0.5\n"
    )


def test_a_terminal_gets_one_line_that_is_written_over() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress("growing", 4, stream=terminal, clock=clock)
    run(progress, clock, 2, 0.25)  # the second one comes within half a second of the first
    run(progress, clock, 2, 60.0)
    progress.close()
    assert terminal.getvalue().split("\r") == [
        "",
        "[####.............] growing: step 1 of 4 (25 %), 4.0 steps/s, 0:01 left, loss 1",
        "[############.....] growing: step 3 of 4 (75 %), 20.2 s/step, 0:20 left, loss 1",
        "[##############] growing: step 4 of 4 (100 %), 30.1 s/step, took 2:00, loss 0.5",
        "[##############] growing: step 4 of 4 (100 %), 30.1 s/step, took 2:00, loss 0.5\n",
    ]


def test_what_is_left_of_a_longer_line_is_written_over() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress("a", 2, stream=terminal, clock=clock)
    clock.now += 1
    progress.update(name=1.0)
    progress.values = {}
    clock.now += 1
    progress.update()
    assert terminal.getvalue().split("\r")[1:] == [
        "[##########..........] a: step 1 of 2 (50 %), 1.0 steps/s, 0:01 left, name 1",
        "[####################] a: step 2 of 2 (100 %), 1.0 steps/s, took 0:02       ",
    ]


def test_the_width_is_that_of_the_terminal() -> None:
    import fcntl
    import struct
    import termios

    theirs, ours = pty.openpty()
    for columns, width in ((30, 29), (0, 79)):  # no room for a bar; a terminal that does not know its width
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with open(os.dup(ours), "w") as stream:
            progress = Progress("a name " * 20, 2, stream=stream)
            assert progress.terminal
            progress.close()
        written = os.read(theirs, 1000).decode()
        assert len(written.strip("\r\n")) == width
    os.close(ours)
    os.close(theirs)


def test_the_rate_is_that_of_late() -> None:
    log, clock = io.StringIO(), Clock()
    progress = Progress("x", 10_000, stream=log, every=1.0, clock=clock)
    run(progress, clock, 1000, 1.0)
    run(progress, clock, 29, 2.0)
    assert log.getvalue().splitlines()[-1].startswith("x: step 1029 of 10000 (10 %), 2.0 s/step, 4:59:02 left")


def test_a_run_that_goes_on_counts_from_where_it_was_and_times_what_it_does() -> None:
    log, clock = io.StringIO(), Clock()
    progress = Progress("x", 100, done=60, stream=log, clock=clock)
    run(progress, clock, 20, 1.0)
    assert log.getvalue() == "x: step 80 of 100 (80 %), 1.0 steps/s, 0:20 left, loss 0.05\n"


@pytest.mark.parametrize(("show", "total"), [(False, 3), (True, 0)])
def test_silence(show: bool, total: int) -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = Progress("x", total, show=show, stream=stream, every=0.0)
        for _ in range(total):
            progress.update(loss=1.0)
        progress.close()
        assert stream.getvalue() == "" and progress.done == total


def test_a_tensor_is_read_when_it_is_shown_and_its_graph_is_let_go() -> None:
    log, weight = io.StringIO(), torch.ones((), requires_grad=True)
    progress = Progress("x", 1, stream=log)
    progress.update(loss=weight * 3)
    assert isinstance(progress.values["loss"], torch.Tensor) and progress.values["loss"].grad_fn is None
    progress.close()
    assert log.getvalue().endswith(", loss 3\n")


def test_by_default_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("x", 1).close()
    assert capsys.readouterr() == ("", "x: step 0 of 1 (0 %)\n")

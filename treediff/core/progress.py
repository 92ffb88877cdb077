"""How far a stage of training is: a line that is written over on a terminal, and a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from torch import Tensor

__all__ = ["Progress"]

_BAR, _LEAST_BAR = 20, 5
_MARKS = 30  # lines that the rate is taken over


class Progress:
    """Stage, step, rate and time left: on a terminal twice a second, elsewhere three times a minute and at the end.

    A file or a pipe gets plain lines, with nothing in them that only a terminal understands.

    Args:
        stage: its name.
        total: how many steps it has.
        done: how many were done before, as in a run that goes on.
        show: whether to say anything at all.
        every: seconds between two lines where there is no terminal.
        stream: where to; standard error if not given.
        clock: gives seconds.

    Attributes:
        done: how many steps are done.
        values: what was last measured, by name.

    Examples:
        >>> progress = Progress("training", 3, stream=sys.stdout)
        >>> for step in range(3):
        ...     progress.update(loss=1 / (1 + step))
        >>> progress.close()
        training: step 3 of 3 (100 %), ... steps/s, took 0:00, loss 0.3333
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        done: int = 0,
        show: bool = True,
        every: float = 20.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.done, self.clock = stage, total, done, clock
        self.stream = sys.stderr if stream is None else stream
        self.values: dict[str, float | Tensor] = {}
        self.terminal = self.stream.isatty()
        self.every = 0.5 if self.terminal else every
        self.show, self.shown, self.width = show and total > 0, -1, 0
        self.start = clock()
        self.next = self.start + (0 if self.terminal else every)
        self.marks = deque([(self.start, done)], maxlen=_MARKS)

    def update(self, **values: float | Tensor) -> None:
        """One more step is done.

        Args:
            **values: what was measured, such as a loss; a tensor is read only when it is shown.
        """
        self.done += 1
        self.measured(**values)
        if self.show and (now := self.clock()) >= self.next:
            self._write(now)

    def measured(self, **values: float | Tensor) -> None:
        """Have these values shown from now on."""
        self.values |= {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}

    def close(self) -> None:
        """Show where it stands, a last time."""
        if self.show and (self.terminal or self.shown != self.done):
            self._write(self.clock())
        if self.show and self.terminal:
            self.stream.write("\n")
            self.stream.flush()
        self.show = False

    def _write(self, now: float) -> None:
        self.marks.append((now, self.done))
        text = self.describe(now)
        if self.terminal:
            text = self._with_bar(text, self._columns() - 1)
            self.stream.write(f"\r{text:{self.width}}")  # spaces over what is left of a longer line
            self.width = len(text)
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()
        self.shown, self.next = self.done, now + self.every

    def describe(self, now: float) -> str:
        """The line, without the bar."""
        words = [f"{self.stage}: step {self.done} of {self.total} ({100 * self.done // self.total} %)"]
        then, before = self.marks[0]
        if self.done > before and now > then:
            rate = (self.done - before) / (now - then)
            words.append(f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step")
            left = (self.total - self.done) / rate
            words.append(f"{_minutes(left)} left" if left else f"took {_minutes(now - self.start)}")
        words += [f"{name} {value:.4g}" for name, value in self.values.items()]
        return ", ".join(words)

    def _with_bar(self, text: str, width: int) -> str:
        """As long a bar as there is room for."""
        length = min(_BAR, width - len(text) - len("[] "))
        if length < _LEAST_BAR:
            return text[:width]
        full = length * self.done // self.total
        return f"[{'#' * full}{'.' * (length - full)}] {text}"

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):  # a terminal that is none of the system's
            return 80


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

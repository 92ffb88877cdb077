"""Ctrl-C and SIGTERM as a question that is answered at the next good moment."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """Whether somebody has asked the process to stop, since `listen`.

    The first Ctrl-C or SIGTERM is noted, and whatever they did before they do from then on: a second one stops the
    process at once.

    Args:
        say: what to tell whoever asked, on standard error; nothing if empty.

    Attributes:
        number: of the signal that came; None if none did.

    Examples:
        >>> request = StopRequest()
        >>> request.listen()
        >>> signal.raise_signal(signal.SIGTERM)
        >>> request.number == signal.SIGTERM
        True
        >>> request.release()
    """

    def __init__(self, say: str = "") -> None:
        self.say = say
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on, note a signal instead of what it does; only the main thread can, in others nothing changes."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            # What a shell has put in the background does not hear Ctrl-C, and is not to hear it now.
            if before is not signal.SIG_IGN:
                self._before[number] = signal.SIG_DFL if before is None else before
                signal.signal(number, self._note)

    def release(self) -> None:
        """Let signals do again what they did."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.release()
        if self.say:
            with suppress(OSError):  # not print, in the midst of which this may be called
                os.write(2, f"\n{self.say}\n".encode())

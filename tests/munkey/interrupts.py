"""An error between any two lines of the library: a trace that raises it at line k."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_PACKAGE = "/munkey/"
_OWN = "/tests/munkey/"


class LineTrace:
    """Context that counts the lines of munkey that are run, and raises an error before one of them.

    Args:
        at: number of the line; none if not given.
        error: what to raise.
    """

    def __init__(self, at: int = -1, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.lines = at, error, 0
        self.place = ""

    def __enter__(self) -> LineTrace:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        return self._line if _PACKAGE in name and _OWN not in name else None

    def _line(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise self.error
        return self._line

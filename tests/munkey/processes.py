"""Processes that are forked from the one that tests, and threads that start together."""

from __future__ import annotations

import os
import pickle
import select
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

_PATIENCE = 30.0  # seconds; only a test that fails waits so long


class Child:
    """A forked process that runs `act(wait)`; `wait()` returns once the other process calls `go`.

    Used as a context, it is gone when the context is left.

    Args:
        act: what it does.
    """

    def __init__(self, act: Callable[[Callable[[], None]], object]) -> None:
        go, self._go = os.pipe()
        self._said, said = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads that PyTorch may have started
            self.process = os.fork()
        if self.process == 0:
            try:  # whatever happens, it does not go on with the tests
                try:
                    outcome = pickle.dumps((True, act(lambda: os.read(go, 1) and None)))
                except BaseException as error:
                    outcome = pickle.dumps((False, "".join(traceback.format_exception(error))))
                with open(said, "wb") as pipe:
                    pipe.write(outcome)
            finally:
                os._exit(0)
        os.close(go)
        os.close(said)

    def go(self) -> None:
        """Let it go on."""
        os.write(self._go, b"x")

    @property
    def done(self) -> bool:
        """Whether it has finished, or was killed."""
        return bool(select.select([self._said], [], [], 0)[0])

    def result(self) -> Any:  # noqa: ANN401
        """Return what `act` returned."""
        if not select.select([self._said], [], [], _PATIENCE)[0]:
            self.kill()
            raise AssertionError("the other process hangs")
        with open(os.dup(self._said), "rb") as pipe:
            good, found = pickle.loads(pipe.read())
        assert good, found
        return found

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._go)
        os.close(self._said)


def forked(act: Callable[[], object]) -> Any:  # noqa: ANN401
    """Return what `act` returns in a forked process."""
    with Child(lambda _: act()) as child:
        return child.result()


def together(*acts: Callable[[], object]) -> list[Any]:
    """Return what each of some functions returns, run in threads that start together."""
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> object:
        start.wait(_PATIENCE)
        return act()

    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result(_PATIENCE) for future in [pool.submit(run, act) for act in acts]]


def sleeping() -> Child:
    """A forked process that does nothing until it is told to go on."""
    return Child(lambda wait: wait())

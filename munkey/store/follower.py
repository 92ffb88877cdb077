"""Followers of a table, and the protocol that carries out a change.

Everything that keeps data of a row (an index, a digest, moments of an optimiser, a file, a log) is a *follower* of the
table. All followers react to the same four changes (`munkey.store.change`). One function carries out a change:

1. every follower may refuse the change, before anything is changed;
2. the steps of the change are built, and all the memory that they need is allocated;
3. the log and then the file write ahead, before memory changes. If a write fails, all writes are taken back in reverse
   order. If the file is past the point of no return, the change is finished instead;
4. the steps are run. An interrupted step is run again, and then the remaining steps. If this fails as well, the table
   is *torn*, neither in the state before nor in the state after. Its owner then refuses everything but loading;
5. followers confirm, if they write something only after the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from torch import Tensor

from munkey.store.change import Change, Step, long_lived
from munkey.store.erase import Scratch

__all__ = ["Follower", "Undone", "commit", "undo"]


class Undone(Enum):
    """Outcome of taking back a change."""

    #: Nothing is left of the change.
    BACK = auto()
    #: The change could not be taken back and was finished instead, so that memory has to follow.
    FORWARD = auto()
    #: Neither; the follower refuses changes until it is opened again, and then finishes this change.
    STUCK = auto()


class Follower:
    """Object that keeps a part of each row of a table and changes with the table.

    A subclass overrides what it needs; by default nothing happens.
    """

    def check(self, change: Change) -> None:
        """Raise an error if the change cannot be followed, before anything is changed."""

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the work in memory, as idempotent steps whose memory is already allocated.

        Args:
            change: the change to carry out.
            scratch: collects copies of rows, which are overwritten after the change.
        """
        return []

    def write_ahead(self, change: Change) -> None:
        """Write what must be on a medium before memory changes; raise an error if writing fails."""

    def undo(self, change: Change) -> Undone:
        """Take back the whole or partial output of `write_ahead`, after this follower or a later follower failed.

        Only the last follower that writes ahead may return `Undone.FORWARD` or `Undone.STUCK`.
        """
        return Undone.BACK

    def confirm(self, change: Change) -> None:
        """Write what may be written only after the change; raise an error if writing fails."""

    def kept(self) -> list[Tensor]:
        """Return the tensors `(R, ...)` that hold data of each row."""
        return []


def commit(change: Change, parts: Sequence[Follower], tear: Callable[[bool], None]) -> None:
    """Carry out a change, wholly or not at all.

    Args:
        change: the change to carry out.
        parts: the table and its followers, in the order in which they write ahead and change.
        tear: is called with True before the first step, and with False after the last step.

    Raises:
        BaseException: any error of a part, and any interruption. After an error of `check`, `steps` or `write_ahead`
            the change did not happen. After an interrupted step the change did happen, unless the step failed twice.
    """
    with long_lived(), Scratch() as scratch:
        for part in parts:
            part.check(change)
        steps = [step for part in parts for step in part.steps(change, scratch)]
        work = _Work(change, parts, steps, scratch, tear)
        try:
            work.write_ahead()
            work.run()
        except BaseException:
            work.settle()
            raise


class _Work:
    """Change that is being carried out, with its progress."""

    def __init__(
        self,
        change: Change,
        parts: Sequence[Follower],
        steps: Sequence[Step],
        scratch: Scratch,
        tear: Callable[[bool], None],
    ) -> None:
        self.change, self.parts, self.steps, self.scratch, self.tear = change, parts, steps, scratch, tear
        self.begun = self.done = 0
        self.running = False

    def write_ahead(self) -> None:
        for part in self.parts:
            self.begun += 1
            part.write_ahead(self.change)

    def run(self) -> None:
        self.running = True
        self.tear(True)
        self.scratch.keep()
        while self.done < len(self.steps):
            self.steps[self.done]()
            self.done += 1
        self.tear(False)

    def settle(self) -> None:
        """Finish the change if memory began to change or the file went forward; otherwise take the writes back."""
        if self.running or undo(self.change, self.parts[: self.begun]) is Undone.FORWARD:
            self.run()


def undo(change: Change, parts: Sequence[Follower]) -> Undone:
    """Take back the writes of parts in reverse order, until a part goes forward or is stuck."""
    for part in reversed(parts):
        undone = part.undo(change)
        if undone is not Undone.BACK:
            return undone
    return Undone.BACK

"""What follows a table, and how a change is carried out.

Everything that keeps something of a row (an index, a digest, moments of an optimiser, a file, a log) is a *follower* of
the table, and reacts to the same four changes (`munkey.store.change`). One function carries out a change:

1. every follower may refuse it, while nothing has happened;
2. the steps of the change are made; all that they need is allocated here;
3. followers that must know before memory changes write ahead: the log, then the file. Where one fails, what was written
   is taken back, the last first; or the change is finished, if the file is past the point of no return;
4. the steps are run. A step that is interrupted is run again, and then the rest. Where that fails, too, the table is
   *torn*: neither before nor after, and its owner refuses everything but being loaded again;
5. followers confirm, where something may be noted only when all is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from torch import Tensor

from munkey.store.change import Change, Step, long_lived
from munkey.store.erase import Scratch

__all__ = ["Follower", "Undone", "commit", "undo"]


class Undone(Enum):
    """What became of a change that was to be taken back."""

    #: Nothing is left of it.
    BACK = auto()
    #: It could not be taken back and was finished instead, so that memory has to follow.
    FORWARD = auto()
    #: Neither; the follower refuses changes until it is opened again, and then finishes it.
    STUCK = auto()


class Follower:
    """Something that keeps a part of each row of a table and changes with it.

    A subclass overrides what it needs; by default nothing happens.
    """

    def check(self, change: Change) -> None:
        """Raise an error if the change cannot be followed. Nothing has happened yet."""

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return what is to be done in memory, as steps that can be repeated, with all that they need allocated.

        Args:
            change: what is to happen.
            scratch: takes copies of rows, which are overwritten when the change is over.
        """
        return []

    def write_ahead(self, change: Change) -> None:
        """Write what must be on a medium before memory changes; raise an error if that fails."""

    def undo(self, change: Change) -> Undone:
        """Take back what `write_ahead` wrote, wholly or in part, because it or a later follower failed.

        Only the last follower that writes ahead may say that it went forward, or is stuck.
        """
        return Undone.BACK

    def confirm(self, change: Change) -> None:
        """Write what may be written only once the change is done; raise an error if that fails."""

    def kept(self) -> list[Tensor]:
        """Return the tensors `(R, ...)` that hold something of each row."""
        return []


def commit(change: Change, parts: Sequence[Follower], tear: Callable[[bool], None]) -> None:
    """Carry out a change, wholly or not at all.

    Args:
        change: what is to happen.
        parts: the table and its followers, in the order in which they write ahead and change.
        tear: is called with True before the first step is run, and with False after the last.

    Raises:
        BaseException: whatever a part raises, and what interrupts. If `check`, `steps` or `write_ahead` raised it, the
            change did not happen. If a step was interrupted, the change did happen, unless the step failed twice.
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
    """A change that is being carried out, and how far it is."""

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
        """Go on if memory had begun to change, or if what was written ahead stays; otherwise take that back."""
        if self.running or undo(self.change, self.parts[: self.begun]) is Undone.FORWARD:
            self.run()


def undo(change: Change, parts: Sequence[Follower]) -> Undone:
    """Take back what parts wrote ahead, the last first, until one goes forward or is stuck."""
    for part in reversed(parts):
        undone = part.undo(change)
        if undone is not Undone.BACK:
            return undone
    return Undone.BACK

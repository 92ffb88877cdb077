"""Codes of keys in low precision beside a table, for the first pass of a search; see `munkey.search.bounds`."""

from __future__ import annotations

from torch import Tensor

from munkey.search.screen import Screen
from munkey.store.change import Added, Change, Moved, Removed, Step, long_lived
from munkey.store.erase import Scratch
from munkey.store.follower import Follower
from munkey.store.table import Table

__all__ = ["Codes"]


class Codes(Follower):
    """The `Screen` of the keys of a table: made by the first search, and updated with every later change.

    Args:
        table: table of the keys.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._screen: Screen | None = None

    def clear(self) -> None:
        """Wipe and drop the codes."""
        if self._screen is not None:
            for column in self._screen.columns:
                column.zero_()
            self._screen = None

    def get(self) -> Screen:
        """Return the codes of the rows in use."""
        if self._screen is None:
            with long_lived():
                self._screen = Screen.of(self._table["keys"])
        return Screen(*(column[: self._table.used] for column in self._screen.columns))

    def kept(self) -> list[Tensor]:
        """Return the columns of the codes, if there are any."""
        return [] if self._screen is None else list(self._screen.columns)

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that update the codes with the keys."""
        screen = self._screen
        if screen is None:
            return []
        if isinstance(change, Removed):
            return [change.erase(column, scratch) for column in screen.columns]
        if isinstance(change, Added):
            new = Screen(*(column[change.rows] for column in screen.columns))
            return [lambda: new.write(self._table["keys"][change.rows])]
        if isinstance(change, Moved):
            made = Screen(*(scratch.unless_kept(change.made(column)) for column in screen.columns))
            return [lambda: setattr(self, "_screen", made), *(column.zero_ for column in screen.columns)]
        return [self.clear]

"""Averages of a model that holds a store: one row for each value, which follows the changes of the table."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Replaced, Step
from munkey.store.erase import Scratch
from munkey.store.follower import Follower
from munkey.store.table import Table
from treediff.core.ema import EMA

__all__ = ["AverageRows"]


class AverageRows(Follower):
    """The average of the values in an `EMA`.

    Args:
        table: table of the averaged values.
        ema: the averages of a model with these values.

    Raises:
        ValueError: if the average is not of these values, has other rows, or did not follow earlier changes.
    """

    def __init__(self, table: Table, ema: EMA) -> None:
        self._table, self.held = table, ema
        self._check_rows()
        ema.before_load.append(self._check_load)

    def _check_rows(self) -> None:
        values, ema = self._table.values, self.held
        names = [name for name, weight in ema.model.named_parameters() if weight is values]
        if not names:
            raise ValueError("the EMA does not follow this store's values; make it of a model that holds the store")
        found = ema.weights.get(names[0])
        if found is None or found.shape != values.shape:
            rows = "none" if found is None else len(found)
            raise ValueError(
                f"the EMA has an average of {rows} of {len(values)} rows: the store joined the model, or grew, since "
                "it was made; make it again"
            )
        if self._table.rewritten and not bool((found == values.detach().to(found.dtype)).all()):
            raise ValueError(
                "rows were deleted or moved since the store was made or loaded, and this EMA may not have followed: "
                "its average would keep what was forgotten. Make the EMA again and attach it before it is updated"
            )

    def release(self) -> None:
        """Stop following; the average keeps its rows of instances."""
        self.held.before_load.remove(self._check_load)

    def is_of(self, held: object) -> bool:
        """Return whether something is this EMA."""
        return held is self.held

    def _check_load(self) -> None:
        if self._table.rewritten:
            raise ValueError(
                "rows were deleted or moved since the store was made or loaded, so older averages would bring back "
                "what they kept of these rows, under other ids; load them before forget and compact, right after the "
                "store was loaded"
            )

    def check(self, change: Change) -> None:
        """Raise ValueError while the average is in place of the values, or if all rows are to be replaced."""
        if self.held.own is not None:
            raise ValueError("the values are those of an EMA at present; leave `with ema.average()` first")
        if isinstance(change, Replaced):
            raise ValueError("an average follows the present rows; load first, then attach, or detach it")

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that change the average like the values; the average of a new value is the value itself."""
        steps: list[Step] = []
        for weights, name in self._kept():
            old = weights[name]
            if isinstance(change, Removed):
                steps.append(change.erase(old, scratch))
            elif isinstance(change, Moved):
                new = scratch.unless_kept(change.made(old))
                steps += [_put(weights, name, new), old.zero_]
            elif isinstance(change, Added):
                steps.append(_copy(old[change.rows], self._table["values"][change.rows]))
        return steps

    def kept(self) -> list[Tensor]:
        """Return the averages of the values."""
        return [weights[name] for weights, name in self._kept()]

    def _kept(self) -> Iterator[tuple[dict[str, Tensor], str]]:
        for name, weight in self.held.model.named_parameters():
            if weight is self._table.values:
                yield self.held.weights, name


def _put(weights: dict[str, Tensor], name: str, tensor: Tensor) -> Step:
    return lambda: weights.__setitem__(name, tensor)


def _copy(to: Tensor, rows: Tensor) -> Step:
    return lambda: to.copy_(rows)

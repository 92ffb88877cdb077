"""Optimisers that train the values of a store: their state has one row for each row, and follows the table.

Letters: `R` rows that a parameter has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from munkey.store.change import Change, Moved, Removed, Replaced, Step
from munkey.store.erase import Scratch
from munkey.store.follower import Follower
from munkey.store.table import Table

__all__ = ["OptimizerRows"]

_ADVICE = "train values with an optimiser whose state has a row for each, like Adam, AdamW, SGD or SparseAdam"


class OptimizerRows(Follower):
    """State of one optimiser, such as the moments of Adam, with a row for each value.

    Args:
        table: table of the values that the optimiser trains.
        optimizer: the optimiser.
        stepped: is called after each step.

    Raises:
        ValueError: if the optimiser does not train the values, or its state has not followed the rows so far.
    """

    def __init__(self, table: Table, optimizer: torch.optim.Optimizer, stepped: Callable[[], None]) -> None:
        values = table.values
        if not any(weight is values for group in optimizer.param_groups for weight in group["params"]):
            raise ValueError("the optimiser does not train this store's values; pass store.values to it")
        if table.rewritten and optimizer.state.get(values):
            raise ValueError(
                "rows have moved since this optimiser's first step, and it did not follow; attach an optimiser before "
                "that, or right after store and optimiser were loaded"
            )
        self._table, self.held = table, optimizer
        self._hooks = (
            optimizer.register_step_post_hook(lambda *_: stepped()),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._check_load()),
        )

    def release(self) -> None:
        """Stop following; the optimiser keeps its state of instances."""
        for hook in self._hooks:
            hook.remove()

    def is_of(self, held: object) -> bool:
        """Return whether something is the optimiser, or wraps it and so has the same state."""
        return held is self.held or getattr(held, "state", None) is self.held.state

    @property
    def has_rows(self) -> bool:
        """True if the state has a row for each value."""
        return bool(self.held.state.get(self._table.values))

    def _check_load(self) -> None:
        if self._table.rewritten:
            raise ValueError(
                "rows were deleted or moved since the store was made or loaded, so an older state of the optimiser "
                "would bring back what it kept of these rows, under other ids; load it before forget and compact, "
                "right after the store was loaded"
            )

    def check(self, change: Change) -> None:
        """Raise ValueError if the state cannot be split by row, or has rows when all rows are to be replaced."""
        if isinstance(change, Replaced) and self.has_rows:
            raise ValueError("an optimiser follows the present rows; load first, then attach, or detach it")
        if isinstance(change, Removed) or (isinstance(change, Moved) and change.order is not None):
            for weight, states in self.held.state.items():
                own = self._table.values if weight is self._table.values else None
                for name, state in states.items():
                    problem = _problem(state, own)
                    if problem:
                        raise ValueError(
                            f"{type(self.held).__name__} keeps {name!r}{problem}, in which no instance can be found "
                            f"and erased; {_ADVICE}"
                        )

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the steps that change all tensors of the state like the values."""
        steps: list[Step] = []
        for state, name in self._kept():
            steps += _following(change, state, name, scratch)
        return steps

    def kept(self) -> list[Tensor]:
        """Return all tensors of the state with `R` rows."""
        return [state[name] for state, name in self._kept()]

    def _kept(self) -> Iterator[tuple[dict[str, Tensor], str]]:
        values = self._table.values
        state = self.held.state.get(values, {})
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[:1] == values.shape[:1]:
                yield state, name


def _following(change: Change, state: dict[str, Tensor], name: str, scratch: Scratch) -> list[Step]:
    """Return the steps that change one tensor of a dictionary like the values."""
    old = state[name]
    if isinstance(change, Removed):
        return [change.erase(old, scratch)]
    if not isinstance(change, Moved):
        return []
    new = scratch.unless_kept(change.made(old))
    return [lambda: state.__setitem__(name, new), old.zero_]


def _problem(state: object, values: nn.Parameter | None) -> str | None:
    """Return why rows cannot be erased from a state of `values`, or of another weight if `values` is None."""
    if not isinstance(state, Tensor):
        return None if isinstance(state, int | float | None) else f", a {type(state).__name__}"
    if values is None or state.numel() <= 1:
        return None
    if state.layout != torch.strided:
        return ", a sparse tensor"
    wide = (*values.shape[1:], *([1] * state.ndim))
    if state.shape[:1] == values.shape[:1] and all(
        size in (1, full) for size, full in zip(state.shape[1:], wide, strict=False)
    ):
        return None
    return f" of shape {tuple(state.shape)} for values of shape {tuple(values.shape)}"

"""Readouts: what turns an input, its key and its neighbours into a prediction.

Letters: `B` inputs, `D` width of a key, `k` neighbours, `n` outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Protocol

from torch import Tensor, nn

from munkey.search import Neighbours
from munkey.store.store import KeyStore
from munkey.task import Task

__all__ = ["Query", "Readout"]


class Memory(Protocol):
    """Interface of a memory for readouts, see `munkey.KeyValueMemory`."""

    store: KeyStore

    def scaled(self, x: Tensor, name: str) -> Tensor:
        """Return keys or queries in the scale of the store."""

    def neighbours(self, queries: Tensor, k: int, *, exclude_ids: Iterable[int] | Tensor | None = None) -> Neighbours:
        """Return the nearest rows of each query."""

    def labels(self, rows: Tensor) -> Tensor:
        """Return the labels of rows."""


class Query:
    """Inputs whose labels are to be predicted, with their neighbours, which are searched once for all readouts.

    Args:
        memory: memory of the rows.
        inputs: `(B, ...)`.
        keys: `(B, D)`, as the key encoder returns them.
        neighbours: greatest number of neighbours that a readout reads.
        exclude_ids: `(B,)` ids whose rows no input has for neighbours, one for each input.
        without: rows `(m,)` that do not count in sums, as in cross-validation.
    """

    def __init__(
        self,
        memory: Memory,
        inputs: Tensor,
        keys: Tensor,
        neighbours: int,
        *,
        exclude_ids: Iterable[int] | Tensor | None = None,
        without: Tensor | None = None,
    ) -> None:
        self.memory, self.inputs, self.keys, self.without = memory, inputs, keys, without
        self._most, self._exclude = neighbours, exclude_ids
        self._found: tuple[Neighbours, Tensor] | None = None

    def neighbours(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows `(B, k)`, scores `(B, k)` and labels `(B, k, ...)` of the nearest rows.

        In place of a neighbour that does not exist, the row is -1, the score `-inf`, and the label missing.
        """
        if self._found is None:
            with self.memory.store.lock:  # no row may move between search and reading
                found = self.memory.neighbours(self.keys, self._most, exclude_ids=self._exclude)
                self._found = found, self.memory.labels(found.rows)
        found, labels = self._found
        return found.rows[:, :k], found.scores[:, :k], labels[:, :k]


class Readout(nn.Module, ABC):
    """A prediction from the memory; subclasses define it in `forward`.

    Attributes:
        task: kind of label that is predicted.
        deletion: effect of a deletion on the prediction: 'rows' if rows are read, which are then gone; 'sums' if it is
            a function of sums, from which rows are subtracted to the bit; 'weights' if it depends on weights, which
            stay.
        neighbours: number of neighbours that are read for each input.
    """

    deletion: ClassVar[str]
    task: Task
    neighbours: int = 0

    @abstractmethod
    def forward(self, query: Query) -> Tensor:
        """Return outputs `(B, n)`: log-probabilities of classes, logits of properties, or numbers."""

"""Readouts: what turns an input, its key and its neighbours into a prediction.

Letters: `B` inputs, `D` width of a key, `k` neighbours, `n` outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import ClassVar, Protocol

from torch import Tensor, nn

from munkey.readout.aggregate import Retrieved
from munkey.search import Neighbours
from munkey.store.store import KeyStore
from munkey.task import Task

__all__ = ["Memory", "Query", "Readout", "with_no_opinion"]


class Memory(Protocol):
    """Interface of a memory for readouts, see `munkey.KeyValueMemory`."""

    store: KeyStore
    null: nn.Parameter

    def scaled(self, x: Tensor, name: str) -> Tensor:
        """Return keys or queries in the scale of the store."""

    def neighbours(self, queries: Tensor, k: int, *, exclude_ids: Iterable[int] | Tensor | None = None) -> Neighbours:
        """Return the nearest rows of each query."""

    def labels(self, rows: Tensor) -> Tensor:
        """Return the labels of rows."""

    def read(self, rows: Tensor, *, sparse: bool = False, frozen: bool = False) -> Tensor:
        """Return the values of rows."""

    def neighbours_of_rows(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the rows nearest to rows, and their scores."""


class Query:
    """Inputs whose labels are to be predicted, with their neighbours, which are searched once for all readouts.

    Args:
        memory: memory of the rows.
        inputs: `(B, ...)`.
        keys: `(B, D)`, as the key encoder returns them, or a function that computes them when they are first asked for.
        neighbours: greatest number of neighbours that a readout reads.
        exclude_ids: `(B,)` ids whose rows no input has for neighbours, one for each input.
        without: rows `(m,)` that do not count in sums, as in cross-validation.
        use_input: whether a transformer reads the input.
        use_memory: whether a transformer reads neighbours.
    """

    def __init__(
        self,
        memory: Memory,
        inputs: Tensor,
        keys: Tensor | Callable[[], Tensor],
        neighbours: int,
        *,
        exclude_ids: Iterable[int] | Tensor | None = None,
        without: Tensor | None = None,
        use_input: bool = True,
        use_memory: bool = True,
    ) -> None:
        self.memory, self.inputs, self.without = memory, inputs, without
        self.use_input, self.use_memory = use_input, use_memory
        self._keys, self._most, self._exclude = keys, neighbours, exclude_ids

    @cached_property
    def keys(self) -> Tensor:
        """Keys of the inputs, `(B, D)`."""
        return self._keys if isinstance(self._keys, Tensor) else self._keys()

    @cached_property
    def _found(self) -> Neighbours:
        return self.memory.neighbours(self.keys, self._most, exclude_ids=self._exclude)

    @cached_property
    def _labels(self) -> Tensor:
        return self.memory.labels(self._found.rows)

    def neighbours(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows `(B, k)`, scores `(B, k)` and labels `(B, k, ...)` of the nearest rows.

        In place of a neighbour that does not exist, the row is -1, the score `-inf`, and the label missing.
        """
        with self.memory.store.lock:  # no row may move between search and reading
            found = self._found
            return found.rows[:, :k], found.scores[:, :k], self._labels[:, :k]

    def retrieved(self, k: int) -> Retrieved:
        """Return the values, scores and ids of the nearest rows, through which gradients flow."""
        with self.memory.store.lock:
            found = self._found
            return Retrieved(self.memory.read(found.rows[:, :k]), found.scores[:, :k], found.ids[:, :k])


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

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs of the readout, if it reads inputs."""

    @abstractmethod
    def forward(self, query: Query) -> Tensor:
        """Return outputs `(B, n)`: log-probabilities of classes, logits of properties, or numbers."""


def with_no_opinion(outputs: Tensor, known: Tensor) -> Tensor:
    """Return outputs `(B, n)` in which classes that are not known `(n,)` have the greatest output of those that are.

    Whether it is such a class is then left to other readouts of a mixture.

    Examples:
        >>> import torch
        >>> with_no_opinion(torch.tensor([[1.0, 2.0, -9.0]]), torch.tensor([True, True, False]))
        tensor([[1., 2., 2.]])
    """
    greatest = outputs.masked_fill(~known, -float("inf")).amax(1, keepdim=True)
    return outputs.where(known, greatest)

"""What a store holds, by id: which rows an instance owns, and what is in them.

Letters: `M` rows, `D` width of a key, `V` width of a value, `B` instances of a call.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.checks import as_ids, some
from munkey.hashed import HashedTable

__all__ = ["Rows", "StoredRows"]


@dataclass(frozen=True)
class Rows:
    """What a store holds of some instances, one row for each key, in the order of the request.

    Args:
        ids: `(M,)` int64.
        views: `(M,)` int64, the number of each key among those of its id.
        labels: `(M,)` int64; -1 for none.
        permanent: `(M,)` bool, whether they can not be forgotten.
        keys: `(M, D)`.
        values: `(M, V)`.
    """

    ids: Tensor
    views: Tensor
    labels: Tensor
    permanent: Tensor
    keys: Tensor
    values: Tensor


class StoredRows(HashedTable):
    """A `HashedTable` that is read by id; arguments and errors as there."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def forgettable(self) -> int:
        """How many rows are not there for good."""
        return self.used - int(self.permanent[: self.used].sum())

    def __contains__(self, instance: SupportsIndex) -> bool:
        return operator.index(instance) in self.index

    def __iter__(self) -> Iterator[int]:
        """Ids in ascending order; the order of rows would tell the history."""
        return iter(sorted(self.index))

    def contains(self, ids: Iterable[int] | Tensor) -> Tensor:
        """`(B,)` bool, which ids are there."""
        return torch.tensor([instance in self.index for instance in as_ids(ids)], dtype=torch.bool)

    def rows_of(self, ids: Iterable[int] | Tensor) -> Tensor:
        """`(M,)` numbers of the rows of ids, those of one id after those of another.

        Row numbers change whenever something is forgotten.

        Raises:
            KeyError: if an id is not there.
        """
        wanted = as_ids(ids)
        self._require(wanted)
        return torch.tensor(self.index.of_all(wanted), dtype=torch.int64, device=self.ids.device)

    def one_row_of_each(self, ids: Iterable[int] | Tensor, uniform: Tensor) -> Tensor:
        """`(B,)` number of one row of each id; uniform numbers `(B,)` in [0, 1) decide which of several.

        Raises:
            KeyError: if an id is not there.
        """
        wanted = as_ids(ids)
        self._require(wanted)
        rows = self.index.one_of_each(wanted, uniform.tolist())
        return torch.tensor(rows, dtype=torch.int64, device=self.ids.device)

    def get(self, ids: Iterable[int] | Tensor) -> Rows:
        """A copy of what is stored of ids.

        Raises:
            KeyError: if an id is not there.
        """
        rows = self.rows_of(ids)
        return Rows(*(column[rows] for column in self.columns))

    def read(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        """`(..., V)` values of rows, through which a gradient flows.

        Args:
            rows: `(...)` int64 row numbers.
            sparse: whether the gradient is sparse, so that a step costs no more than the rows that were read.
        """
        read = F.embedding(rows, self.values, sparse=sparse)
        if read.requires_grad and not self.holders.optimizers and not torch.compiler.is_compiling():
            read.register_hook(_warn_unattached)
        return read

    def _require(self, ids: list[int]) -> None:
        unknown = self.index.missing(ids)
        if unknown:
            raise not_there(unknown)


def not_there(ids: list[int]) -> KeyError:
    """The error that says that ids are not in a store."""
    return KeyError(f"ids {some(ids)} are not in the store; forget can pass over them with missing='ignore'")


def _warn_unattached(grad: Tensor) -> None:
    warnings.warn(
        "values of a store are trained by an optimiser the store does not know; what it keeps of an instance would not "
        "be forgotten. Tell the store: store.attach(optimizer)",
        stacklevel=2,
    )

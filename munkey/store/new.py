"""New rows, which are checked as a whole and written in chunks.

Letters: `B` instances, `P` keys of each, `D` width of a key, `V` width of a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from munkey.store.checks import check_rows
from munkey.store.schema import COLUMNS, Column, Rows
from treediff.core.noise import counter_normal

__all__ = ["NewRows"]

_ROWS = 1 << 14  # at a time


class NewRows:
    """Rows of instances that are to be added; arguments and errors as for `KeyStore.add`.

    Args:
        ids: `(B,)`.
        keys: `(B, D)` or `(B, P, D)`.
        labels: `(B, ...)`, or None.
        values: `(B, V)` or `(B, P, V)`; None for noise.
        permanent: whether the instances are permanent.
        schema: the columns of the store.
        seed: seed of the noise.
        scale: standard deviation of the noise.

    Attributes:
        rows: number of rows, `B P`.
    """

    def __init__(
        self,
        ids: Sequence[int],
        keys: Tensor,
        labels: Tensor | None,
        values: Tensor | None,
        permanent: bool,
        schema: Sequence[Column],
        seed: int,
        scale: float,
    ) -> None:
        shapes = {column.name: column for column in schema}
        keys, labels, values = check_rows(ids, keys, labels, values, shapes)
        self.ids = list(ids)
        self._keys = keys.detach().flatten(0, 1)
        self._values = None if values is None else values.detach().flatten(0, 1)
        self._labels, self._count = labels, keys.shape[1]
        self._permanent, self._seed, self._scale = permanent, seed, scale
        self.rows = len(self._keys)

    def write(self, columns: Sequence[Tensor]) -> None:
        """Write the rows into the columns `(B P, ...)` of a table."""
        to = dict(zip(COLUMNS, columns, strict=True))
        owners = torch.tensor(self.ids, dtype=torch.int64)
        to["ids"].view(-1, self._count).copy_(owners[:, None].expand(-1, self._count))
        to["views"].view(-1, self._count).copy_(torch.arange(self._count).expand(len(owners), -1))
        to["labels"].copy_(self._labels.repeat_interleave(self._count, 0))
        to["permanent"].fill_(self._permanent)
        to["keys"].copy_(self._keys)
        if self._values is not None:
            to["values"].copy_(self._values)
            return
        for ids, views, values in zip(*(to[name].split(_ROWS) for name in ("ids", "views", "values")), strict=True):
            noise = counter_normal(self._seed, ids, values.shape[1:], draw=views, dtype=values.dtype)
            torch.mul(noise, self._scale, out=values)

    def made(self, like: Sequence[Tensor]) -> Rows:
        """Return the rows as new tensors, with the dtypes and on the device of a table."""
        columns = [column.new_zeros(self.rows, *column.shape[1:]) for column in like]
        self.write(columns)
        return Rows(*columns)

"""Rows that belong to groups, and a linear layer per group.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from treediff.layers.products import affine, sizes_of

__all__ = ["Groups", "Weights", "check_rows", "grouped_linear"]

Weights = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Groups:
    """Which group each row belongs to; rows are sorted by group.

    Args:
        index: `(T,)` int64, ascending: the group of each row. Not checked, because looking would stop an
            accelerator's stream.
        count: number of groups `G`; some may have no row.

    Examples:
        >>> Groups(torch.tensor([0, 0, 2]), count=3).sizes
        [2, 0, 1]
    """

    index: Tensor
    count: int
    # What was derived so far. A plain dictionary, because `torch.compile` cannot enter a `cached_property`.
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def ends(self) -> Tensor:
        """`(G,)` int32: one past the last row of each group."""
        if "ends" not in self._derived:
            steps = torch.arange(1, self.count + 1, device=self.index.device)
            self._derived["ends"] = torch.searchsorted(self.index, steps).to(torch.int32)
        ends: Tensor = self._derived["ends"]
        return ends

    @property
    def sizes(self) -> list[int]:
        """Rows per group, on the host."""
        if "sizes" not in self._derived:
            self._derived["sizes"] = sizes_of(self.ends)
        sizes: list[int] = self._derived["sizes"]
        return sizes


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """A linear layer per group: `y[t] = weight[g] x[t] + bias[g]` where `g` is the group of row `t`.

    Args:
        x: `(T, ..., in_features)`, sorted by group; a row may hold several vectors.
        weight: `(G, out_features, in_features)`.
        bias: `(G, out_features)` or None.
        groups: the groups of the rows.

    Returns:
        `(T, ..., out_features)`.

    Raises:
        ValueError: if rows, weights and groups do not belong together.

    Examples:
        >>> groups = Groups(torch.tensor([0, 1, 1]), count=2)
        >>> grouped_linear(torch.ones(3, 4), torch.ones(2, 1, 4), torch.tensor([[0.0], [1.0]]), groups)
        tensor([[4.],
                [5.],
                [5.]])
    """
    check_rows(x, len(weight), groups)
    if x.ndim < 2 or weight.ndim != 3 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            "expected rows (T, ..., in_features) and weights (groups, out_features, in_features), found "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
    rows = x if x.ndim < 4 else x.flatten(1, -2)
    y = affine(rows, weight, bias, groups.index, groups.ends)
    return y if rows is x else y.view(*x.shape[:-1], weight.shape[1])


def check_rows(x: Tensor, sets: int, groups: Groups) -> None:
    """Raise ValueError unless rows, groups and sets of weights belong together."""
    if len(x) != len(groups.index) or sets != groups.count:
        raise ValueError(
            f"expected a group for each row and weights for each group, found {len(x)} rows with "
            f"{len(groups.index)} entries in groups.index, and {sets} sets of weights for {groups.count} groups"
        )

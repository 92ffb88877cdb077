"""Groups of the rows of a batch.

Letters: `T` rows in all, `G` groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["Groups", "check_rows", "sizes_of"]


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignment of rows to groups; rows are sorted by group.

    Args:
        index: `(T,)` int64, ascending: the group of each row. Not checked, because reading the values would
            stop an accelerator's stream.
        count: number of groups `G`; some may have no row.

    Examples:
        >>> Groups(torch.tensor([0, 0, 2]), count=3).sizes
        [2, 0, 1]
    """

    index: Tensor
    count: int
    # Tables derived so far. A plain dictionary, because `torch.compile` cannot enter a `cached_property`.
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


def check_rows(x: Tensor, sets: int, groups: Groups) -> None:
    """Raise ValueError unless rows, groups and sets of weights belong together."""
    if len(x) != len(groups.index) or sets != groups.count:
        raise ValueError(
            f"expected a group for each row and weights for each group, found {len(x)} rows with "
            f"{len(groups.index)} entries in groups.index, and {sets} sets of weights for {groups.count} groups"
        )


def sizes_of(ends: Tensor) -> list[int]:
    """Return the rows per group, on the host, from one past the last row of each group."""
    return [b - a for a, b in pairwise([0, *ends.tolist()])]

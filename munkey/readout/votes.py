"""Votes of neighbours: a prediction from the labels of the nearest rows.

Letters: `B` inputs, `k` neighbours, `n` outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from munkey.readout.base import Query, Readout
from munkey.task import Classification, Task
from treediff.core.checks import check_positive

__all__ = ["LabelCounts", "NeighbourVote"]

_WEIGHTS = ("softmax", "rank", "distance", "equal")


@dataclass(frozen=True)
class LabelCounts:
    """The summand of numbers of rows: label and 1; all 0 for a row without a label.

    Args:
        task: kind of label.
    """

    task: Task
    greatest = 1

    @property
    def width(self) -> int:
        """`n + 1`."""
        return self.task.outputs + 1

    def __call__(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return `[y, 1]` of rows, `(M, n + 1)` float64."""
        y = self.task.vectors(labels)
        return torch.cat([y, y.new_ones(len(y), 1)], 1).mul_(~self.task.missing(labels)[:, None])


class NeighbourVote(Readout):
    """The mean label of the nearest rows, weighted by similarity `s_j`, or by rank `j = 0, 1, ...`.

    - *softmax*: `exp((s_j - s_0) / temperature)`
    - *rank*: `1 / (j + 2)`
    - *distance*: `1 / sqrt(2 - 2 s_j)`, for keys of length 1
    - *equal*: 1

    For classes the result is `log((1 - smoothing) p + smoothing / n)` with the share `p` of the votes for each class;
    for properties the logit of that mean; for numbers the mean. Rows without a label have no vote, and without any vote
    all classes are equally likely. With `balance`, a vote for class `c` is divided by `N_c^balance`, where `N_c` counts
    the rows of the class, so that a rare or a new class is heard.

    Deletion: votes read rows. A deleted row has no vote, and is not counted.

    Args:
        task: kind of label.
        k: neighbours that vote.
        weights: 'softmax', 'rank', 'distance' or 'equal'.
        temperature: of 'softmax', in units of similarity.
        smoothing: share of the prediction that is the same for all classes, so that no probability is 0.
        balance: from 0, where all votes are alike, to 1, where classes are, however many rows they have.

    Raises:
        TypeError: if `k` is not whole, or there are no classes to balance.
        ValueError: if a number is out of range, or there are no such weights.

    Source: *softmax* Wu et al. (arXiv 1805.01978), eq. 6; *rank* Geirhos et al. (arXiv 2408.08172).
    """

    deletion = "rows"

    def __init__(
        self,
        task: Task,
        k: int = 16,
        *,
        weights: str = "softmax",
        temperature: float = 0.05,
        smoothing: float = 0.02,
        balance: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(k=k)
        if weights not in _WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(_WEIGHTS)}; found {weights!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        if not 0 < smoothing < 1:
            raise ValueError(f"smoothing must be between 0 and 1, found {smoothing}")
        if not 0 <= balance <= 1:
            raise ValueError(f"balance must be between 0 and 1, found {balance}")
        if balance and not isinstance(task, Classification):
            raise TypeError(f"classes are balanced, found {task}; use balance=0")
        self.task, self.neighbours, self.weights = task, int(k), weights
        self.temperature, self.smoothing, self.balance = float(temperature), float(smoothing), float(balance)
        self._counts = LabelCounts(task)

    def forward(self, query: Query) -> Tensor:
        """Return outputs `(B, n)`; see the class."""
        rows, scores, labels = query.neighbours(self.neighbours)
        there = (rows >= 0) & ~self.task.missing(labels)
        weights = self._weights(scores)
        if self.balance:
            weights = weights / self._rows_of_class(query)[labels.clamp_min(0)] ** self.balance
        weights = torch.where(there, weights, 0.0)
        total = weights.sum(1, keepdim=True)
        share = torch.where(total > 0, weights / total, 0.0)
        mean = (share[..., None] * self.task.vectors(labels)).sum(1)
        return self.task.of_mean(mean, total[:, 0] > 0, self.smoothing).to(query.keys.dtype)

    def _rows_of_class(self, query: Query) -> Tensor:
        """Return the number of rows of each class `(n,)`, at least 1."""
        sums = query.memory.store.sums(self._counts)
        counts = sums.get() if query.without is None else sums.get() - sums.of(query.without)
        return counts.diagonal()[:-1].clamp_min(1)

    def _weights(self, scores: Tensor) -> Tensor:
        """Return the weight of each neighbour, `(B, k)`."""
        if self.weights == "softmax":
            return ((scores - scores[:, :1]) / self.temperature).exp().nan_to_num(0.0)
        if self.weights == "rank":
            return 1 / (torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype) + 2).expand_as(scores)
        if self.weights == "distance":
            return (2 - 2 * scores).clamp_min(1e-6).rsqrt()
        return torch.ones_like(scores)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"k={self.neighbours}, weights={self.weights!r}, temperature={self.temperature}, balance={self.balance}"

"""What a model makes of several neighbours: one prediction from all of their tokens.

*Ensemble* runs the model once for each neighbour and averages; *softmax* and *rank* mix the tokens into one and run it
once. The paper names the three (MUNKEY, arXiv 2603.15033); the formulas are ours.

Letters: `B` batch, `k` neighbours, `V` width of a value, `n` classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treediff.core.checks import check_positive

__all__ = ["AGGREGATIONS", "Aggregation", "Ensemble", "RankMix", "Retrieved", "SoftmaxMix"]

Predict = Callable[[Tensor], Tensor]
Average = Callable[[Tensor, Tensor], Tensor]


class Aggregation(nn.Module, ABC):
    """From neighbours to one prediction.

    Args of a call:
        found: the neighbours.
        predict: from tokens `(B, m, V)` to outputs `(B, m, n)`, each token on its own.
        average: from outputs `(B, m, n)` and weights `(B, m)` to outputs `(B, n)`, see `munkey.task.Task.average`.
    """

    @abstractmethod
    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """Return outputs `(B, n)`."""

    @abstractmethod
    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """`(B, V)` one token for a single run, as training needs it; uniform numbers `(B,)` in [0, 1) decide."""


class Ensemble(Aggregation):
    """The mean of the predictions of all neighbours there are; that of the null token where there is none.

    Of class probabilities `log (1/k sum_j softmax(logits_j))`, of other predictions what the task says, or the mean of
    the logits.

    Args:
        average: 'probabilities' or 'logits'.

    Raises:
        ValueError: if it is something else.
    """

    def __init__(self, average: str = "probabilities") -> None:
        super().__init__()
        if average not in ("probabilities", "logits"):
            raise ValueError(f"average must be 'probabilities' or 'logits', found {average!r}")
        self.average = average

    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """See the class."""
        logits, there = predict(found.tokens), found.there
        # Where nothing is there, all tokens are the null token, and their mean is its prediction.
        there = there | ~there.any(1, keepdim=True)
        weights = there.to(logits.dtype) / there.sum(1, keepdim=True)
        if self.average == "logits":
            return (weights[..., None] * logits).sum(1).to(logits.dtype)
        return average(logits, weights)

    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """That of any of the neighbours there are, which come before those that are not."""
        pick = self.pick(found.there, uniform)
        return found.tokens[torch.arange(len(pick), device=pick.device), pick]

    @staticmethod
    def pick(there: Tensor, uniform: Tensor) -> Tensor:
        """`(B,)` the place of one of the neighbours there are, `(B, k)`, each as likely; 0 if there is none."""
        return (uniform * there.sum(1)).to(torch.int64)

    def extra_repr(self) -> str:
        """What is averaged."""
        return self.average


class _Mix(Aggregation):
    """One token from all neighbours there are."""

    def mixed(self, found: Retrieved) -> Tensor:
        """`(B, V)`; the null token where there is no neighbour."""
        there = found.there
        there = there | ~there.any(1, keepdim=True)
        weights = self.preferences(found).masked_fill(~there, -torch.inf).softmax(1)
        return (weights[..., None] * found.tokens).sum(1)

    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """The mixture."""
        return self.mixed(found)

    @abstractmethod
    def preferences(self, found: Retrieved) -> Tensor:
        """`(B, k)` logits of the weights, finite."""

    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """See the class."""
        return predict(self.mixed(found)[:, None]).squeeze(1)


class SoftmaxMix(_Mix):
    """`sum_j softmax(score_j / temperature) v_j` with a learned temperature.

    Args:
        temperature: to begin with; above 0.
        device: where the parameter lives.
        dtype: of the parameter.

    Raises:
        ValueError: if the temperature is not above 0.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=device, dtype=dtype))

    def preferences(self, found: Retrieved) -> Tensor:
        """See the class."""
        scores = torch.where(found.there, found.scores, 0.0).to(self.log_temperature.dtype)
        return scores * torch.exp(-self.log_temperature)


class RankMix(_Mix):
    """`sum_j w_j v_j` with a learned weight for each rank, whatever the scores.

    Args:
        count: greatest number of neighbours.
        device: where the parameters live.
        dtype: of the parameters.

    Raises:
        TypeError: if the number is not whole.
        ValueError: if it is below 1, or more neighbours are given.
    """

    def __init__(
        self, count: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(count=count)
        self.weights = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))

    def preferences(self, found: Retrieved) -> Tensor:
        """See the class."""
        k = found.ids.shape[1]
        if k > len(self.weights):
            raise ValueError(f"there are weights for {len(self.weights)} neighbours, found {k}")
        return self.weights[:k].expand(len(found.ids), -1)


#: Aggregations by name; each is made for a greatest number of neighbours.
AGGREGATIONS: dict[str, Callable[[int], Aggregation]] = {
    "ensemble": lambda count: Ensemble(),
    "softmax": lambda count: SoftmaxMix(),
    "rank": RankMix,
}


@dataclass(frozen=True, eq=False)
class Retrieved:
    """What a memory holds near some queries, the nearest first.

    Args:
        tokens: `(B, k, V)` values; the null token where there were fewer than `k` rows.
        scores: `(B, k)` similarities; `-inf` where there is no row.
        ids: `(B, k)` owners; -1 where there is no row, which may be an owner's id as well.
    """

    tokens: Tensor
    scores: Tensor
    ids: Tensor

    @property
    def there(self) -> Tensor:
        """`(B, k)` bool, whether there is a row."""
        return self.scores > -torch.inf

"""Aggregations of several neighbours: one prediction from all of their tokens.

*Ensemble* runs the model once for each neighbour and averages. *Softmax* and *rank* mix the tokens into one token and
run the model once. The paper names all three (MUNKEY, arXiv 2603.15033); the formulas are our choice. *Attend* runs the
model once, which attends to all tokens beside each other.

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

__all__ = ["AGGREGATIONS", "Aggregation", "Attend", "Ensemble", "RankMix", "Retrieved", "SoftmaxMix"]

Predict = Callable[..., Tensor]
Average = Callable[[Tensor, Tensor], Tensor]


class Aggregation(nn.Module, ABC):
    """A map from neighbours to one prediction.

    Args of a call:
        found: the neighbours.
        predict: from tokens `(B, m, V)` to outputs `(B, m, n)`, each token independently; or from tokens
            `(B, m, j, V)` and a mask `(B, m, j)` to `(B, m, n)`, the tokens of the mask at a time.
        average: from outputs `(B, m, n)` and weights `(B, m)` to outputs `(B, n)`, see `munkey.task.Task.average`.
    """

    @abstractmethod
    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """Return outputs `(B, n)`."""

    @abstractmethod
    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """Return the tokens `(B, j, V)` of one pass in training; random choices follow numbers `(B,)` in [0, 1)."""


class Ensemble(Aggregation):
    """The mean of the predictions beside all neighbours; without neighbours, the prediction beside the null token.

    For 'probabilities' of classes, the mean is `log (1/k sum_j softmax(logits_j))`; for other labels the task defines
    the mean. For 'logits', the logits are averaged.

    Args:
        average: 'probabilities' or 'logits'.

    Raises:
        ValueError: if `average` is something else.
    """

    def __init__(self, average: str = "probabilities") -> None:
        super().__init__()
        if average not in ("probabilities", "logits"):
            raise ValueError(f"average must be 'probabilities' or 'logits', found {average!r}")
        self.average = average

    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """Return the mean of the predictions, `(B, n)`; arguments as for `Aggregation`."""
        logits, there = predict(found.tokens), found.there
        # Without neighbours all tokens are the null token, so that the mean is the prediction beside the null token.
        there = there | ~there.any(1, keepdim=True)
        weights = there.to(logits.dtype) / there.sum(1, keepdim=True)
        if self.average == "logits":
            return (weights[..., None] * logits).sum(1).to(logits.dtype)
        return average(logits, weights)

    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """Return the token `(B, 1, V)` of a random neighbour; existing neighbours precede missing neighbours."""
        pick = self.pick(found.there, uniform)
        return found.tokens[torch.arange(len(pick), device=pick.device), pick][:, None]

    @staticmethod
    def pick(there: Tensor, uniform: Tensor) -> Tensor:
        """Return the place `(B,)` of an existing neighbour `(B, k)`, all equally likely; 0 if there is none."""
        return (uniform * there.sum(1)).to(torch.int64)

    def extra_repr(self) -> str:
        """Return what is averaged."""
        return self.average


class _Mix(Aggregation):
    """One token that is mixed from all existing neighbours."""

    def mixed(self, found: Retrieved) -> Tensor:
        """Return the mixed token `(B, V)`; the null token if there is no neighbour."""
        there = found.there
        there = there | ~there.any(1, keepdim=True)
        weights = self.preferences(found).masked_fill(~there, -torch.inf).softmax(1)
        return (weights[..., None] * found.tokens).sum(1)

    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """Return the mixed token `(B, 1, V)`; nothing is random."""
        return self.mixed(found)[:, None]

    @abstractmethod
    def preferences(self, found: Retrieved) -> Tensor:
        """Return finite logits `(B, k)` of the weights."""

    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """Return the prediction beside the mixed token, `(B, n)`; arguments as for `Aggregation`."""
        return predict(self.mixed(found)[:, None]).squeeze(1)


class SoftmaxMix(_Mix):
    """A mix of values, `sum_j softmax(score_j / temperature) v_j`, with a learned temperature.

    Args:
        temperature: initial value, above 0.
        device: of the parameter.
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
        """Return the scores over the temperature, `(B, k)`."""
        scores = torch.where(found.there, found.scores, 0.0).to(self.log_temperature.dtype)
        return scores * torch.exp(-self.log_temperature)


class RankMix(_Mix):
    """A mix of values, `sum_j w_j v_j`, with a learned weight for each rank, independent of the scores.

    Args:
        count: greatest number of neighbours.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: if `count` is not whole.
        ValueError: if `count` is below 1, or more neighbours are given.
    """

    def __init__(
        self, count: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(count=count)
        self.weights = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))

    def preferences(self, found: Retrieved) -> Tensor:
        """Return the learned logits of the ranks, `(B, k)`."""
        k = found.ids.shape[1]
        if k > len(self.weights):
            raise ValueError(f"there are weights for {len(self.weights)} neighbours, found {k}")
        return self.weights[:k].expand(len(found.ids), -1)


class Attend(Aggregation):
    """One prediction beside all neighbours, to which the transformer attends; without neighbours, to the null token.

    The cost is that of one pass with `k` more tokens, not of `k` passes.
    """

    def forward(self, found: Retrieved, predict: Predict, average: Average) -> Tensor:
        """Return the prediction beside all tokens, `(B, n)`; arguments as for `Aggregation`."""
        return predict(found.tokens[:, None], self.read(found.there)[:, None]).squeeze(1)

    @staticmethod
    def read(there: Tensor) -> Tensor:
        """Return which tokens `(B, k)` are read: those of neighbours, and in any case the first."""
        first = torch.arange(there.shape[1], device=there.device) == 0
        return there | first

    def one(self, found: Retrieved, uniform: Tensor) -> Tensor:
        """Return all tokens `(B, k, V)`; nothing is random."""
        return found.tokens


#: Aggregations by name; each is built for a greatest number of neighbours.
AGGREGATIONS: dict[str, Callable[[int], Aggregation]] = {
    "attend": lambda count: Attend(),
    "ensemble": lambda count: Ensemble(),
    "softmax": lambda count: SoftmaxMix(),
    "rank": RankMix,
}


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Rows of a memory near some queries, the nearest first.

    Args:
        tokens: `(B, k, V)` values; the null token where there is no row.
        scores: `(B, k)` similarities; `-inf` where there is no row.
        ids: `(B, k)` owners; -1 where there is no row, although -1 may also be the id of an owner.
    """

    tokens: Tensor
    scores: Tensor
    ids: Tensor

    @property
    def there(self) -> Tensor:
        """True where there is a row, `(B, k)` bool."""
        return self.scores > -torch.inf

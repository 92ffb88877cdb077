"""Linear heads on features of keys that are functions of sums over rows, from which a row is subtracted to the bit.

Letters: `B` inputs, `M` rows, `D` width of a key, `F` features, `n` outputs, `N_c` rows of class `c`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from munkey.readout.base import Query, Readout
from munkey.readout.features import Features
from munkey.shrinkage import check_shrinkage, shrink
from munkey.task import Classification, Task

__all__ = ["DiscriminantReadout", "LabelledFeatures", "LinearReadout", "RidgeReadout"]

_LABEL_BITS = 10  # of the unit of a real label
_GREATEST_LABEL = 32.0


@dataclass(frozen=True)
class LabelledFeatures:
    """The summand of linear heads: label, features, and 1; all 0 for a row without a label.

    Args:
        features: frozen map from keys to whole numbers.
        task: kind of label.
    """

    features: Features
    task: Task

    @property
    def width(self) -> int:
        """`n + F + 1`."""
        return self.task.outputs + self.features.width + 1

    @property
    def unit(self) -> float:
        """Label that the number 1 stands for."""
        return 2.0**-_LABEL_BITS if self.task.label_dtype.is_floating_point else 1.0

    @property
    def greatest(self) -> int:
        """The greatest absolute number."""
        return int(max(2**self.features.bits, _GREATEST_LABEL / self.unit if self.unit < 1 else 1))

    def __call__(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return `[y, phi(k), 1]` of rows, `(M, n + F + 1)` float64.

        Raises:
            ValueError: if a real label is out of range.
        """
        y, there = self.task.vectors(labels), ~self.task.missing(labels)
        unit = self.unit
        if unit < 1 and y.numel() and float(y.abs().max()) > _GREATEST_LABEL:
            raise ValueError(
                f"a head on sums takes labels between -{_GREATEST_LABEL:g} and {_GREATEST_LABEL:g}, found "
                f"{float(y.abs().max()):g}; scale labels to about unit size"
            )
        z = torch.cat([(y / unit).round_() if unit < 1 else y, self.features(keys), y.new_ones(len(y), 1)], 1)
        return z.mul_(there[:, None])


class LinearReadout(Readout):
    """A head `W phi(k) + b` whose weights are solved from sums over the rows of a memory, when they are next needed.

    The store keeps the sums in whole numbers, through every change; see `munkey.store.sums`. Weights are overwritten as
    soon as rows change, and solved again for the next prediction. Both are functions of the rows alone: after `forget`
    they are bit-equal to those of a memory that never held the rows, on one machine with one number of threads.

    Deletion: the row is subtracted from the sums.

    Args:
        task: kind of label.
        features: frozen map from keys to whole numbers; heads with the same module and task share the sums.
        shrinkage: from 0 to 1; see the subclass.

    Raises:
        ValueError: if `shrinkage` is out of range.
    """

    deletion = "sums"

    def __init__(self, task: Task, features: Features, shrinkage: float) -> None:
        super().__init__()
        self.task, self.features, self.shrinkage = task, features, check_shrinkage(shrinkage)
        self._summand = LabelledFeatures(features, task)

    def forward(self, query: Query) -> Tensor:
        """Return outputs `(B, n)`; see the class."""
        unit = self.features(query.memory.scaled(query.keys, "queries")) * 2.0**-self.features.bits
        with query.memory.store.lock:  # another thread may change rows, which overwrites the weights
            weight, bias = self.solved(query)
            scores = unit @ weight + bias
        return self.outputs(scores).to(query.keys.dtype)

    def solved(self, query: Query) -> tuple[Tensor, Tensor]:
        """Return weights `(F, n)` and biases `(n,)` for features in [-1, 1], float64."""
        sums = query.memory.store.sums(self._summand)
        if query.without is None:
            return sums.derived((type(self), self.shrinkage, *self._settings()), self.solve)
        return self.solve(sums.get() - sums.of(query.without))

    def _settings(self) -> tuple[Any, ...]:
        """Return settings of the solution besides the shrinkage."""
        return ()

    @abstractmethod
    def solve(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `(F, n)` and biases `(n,)` from sums `(n + F + 1, n + F + 1)`, which are overwritten.

        See `LabelledFeatures`.
        """

    @abstractmethod
    def outputs(self, scores: Tensor) -> Tensor:
        """Return outputs from scores, `(B, n)` each."""

    def extra_repr(self) -> str:
        """Return the shrinkage."""
        return f"shrinkage={self.shrinkage}"

    def _parts(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Return `sum phi phi'`, `sum phi y'`, `sum phi`, `sum y` and the number of rows, for features in [-1, 1].

        The first is scaled in place.
        """
        n, unit = self.task.outputs, 2.0**-self.features.bits
        rows = float(sums[-1, -1])
        label = self._summand.unit
        return (
            sums[n:-1, n:-1].mul_(unit**2),
            sums[n:-1, :n] * (unit * label),
            sums[n:-1, -1] * unit,
            sums[:n, -1] * label,
            rows,
        )


class RidgeReadout(LinearReadout):
    """Least squares with a penalty: `W = C^-1 cov(phi, y)` with the shrunk covariance `C = (1 - a) cov(phi) + a m I`.

    `m` is the mean variance of the features. Labels are vectors: 1 for the class and 0 elsewhere, properties, or real
    numbers. The scores of classes and properties are no probabilities; times `scale` they are taken for logits.

    Deletion: the row is subtracted from the sums.

    Args:
        task: kind of label.
        features: frozen map from keys to whole numbers.
        shrinkage: `a`, above 0, and 1 at most.
        scale: of scores as logits.

    Raises:
        ValueError: if a number is out of range.

    Source: exact deletion from the two sums, arXiv 2603.12977; sums in whole numbers are ours.
    """

    def __init__(self, task: Task, features: Features, *, shrinkage: float = 0.03, scale: float = 10.0) -> None:
        super().__init__(task, features, shrinkage)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0, found {scale}")
        self.scale = float(scale)

    def solve(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `(F, n)` and biases `(n,)`; without rows, 0."""
        gram, cross, phi, y, rows = self._parts(sums)
        if not rows:
            return torch.zeros_like(cross), torch.zeros_like(y)
        covariance = gram.addr_(phi, phi / rows, alpha=-1).div_(rows)
        factor = torch.linalg.cholesky(shrink(covariance, self.shrinkage))
        weight = torch.cholesky_solve((cross - torch.outer(phi, y / rows)) / rows, factor)
        return weight, (y - phi @ weight) / rows

    def outputs(self, scores: Tensor) -> Tensor:
        """Return outputs of the task from scores."""
        return self.task.of_scores(scores, self.scale)


class DiscriminantReadout(LinearReadout):
    """A linear discriminant: Gaussian classes with means `mu_c` and one covariance `C` within classes.

    `log p(c | k) = log softmax(t (mu_c' C^-1 phi - mu_c' C^-1 mu_c / 2 + log(N_c / M)))` with the shrunk covariance
    `C = (1 - a) within + a m I`, where `m` is the mean variance within classes. A class without a row has probability
    `1e-6` of a class with one row.

    Deletion: the row is subtracted from the sums.

    Args:
        task: classification.
        features: frozen map from keys to whole numbers.
        shrinkage: `a`, above 0, and 1 at most.
        temperature: `t`; below 1 as features are no Gaussians, whose distances would tell more.
        balance: from 0 for priors `N_c / M` to 1 for equal priors.

    Raises:
        TypeError: if the task is no classification.
        ValueError: if a number is out of range.

    Source: regularised discriminant analysis (Friedman, 1989), eq. 15 to 18 with one covariance.
    """

    def __init__(
        self,
        task: Task,
        features: Features,
        *,
        shrinkage: float = 0.3,
        temperature: float = 0.3,
        balance: float = 0.0,
    ) -> None:
        super().__init__(task, features, shrinkage)
        if not isinstance(task, Classification):
            raise TypeError(f"a discriminant needs classes, found {task}; use RidgeReadout")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0, found {temperature}")
        if not 0 <= balance <= 1:
            raise ValueError(f"balance must be between 0 and 1, found {balance}")
        self.temperature, self.balance = float(temperature), float(balance)

    def _settings(self) -> tuple[Any, ...]:
        return (self.balance,)

    def solve(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `(F, n)` and biases `(n,)`; without rows, 0."""
        gram, cross, phi, count, rows = self._parts(sums)
        if not rows:
            return torch.zeros_like(cross), torch.zeros_like(count)
        mean = phi / rows
        means = cross / count.clamp_min(1) - mean[:, None]  # around the mean of all rows
        means = torch.where(count > 0, means, 0.0)
        within = gram.addr_(phi, mean, alpha=-1).addmm_(means * count, means.T, alpha=-1)
        factor = torch.linalg.cholesky(shrink(within.div_(rows), self.shrinkage))
        weight = torch.cholesky_solve(means, factor)
        prior = (1 - self.balance) * (count.clamp_min(1e-6) / rows).log()
        return weight, prior - (0.5 * (means * weight).sum(0) + mean @ weight)

    def outputs(self, scores: Tensor) -> Tensor:
        """Return log-probabilities from scores."""
        return (self.temperature * scores).log_softmax(1)

"""Tasks of a classifier: the kind of a label, the loss, and the average of several predictions.

Letters: `B` instances, `k` neighbours, `n` outputs of the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import check_positive

__all__ = ["TASKS", "Classification", "MultiLabel", "Regression", "Task", "task_from"]


class Task(ABC):
    """A kind of label, and everything that depends on it.

    Args:
        outputs: `n`, dimensions of the network's prediction for one instance.

    Raises:
        TypeError: if `outputs` is not whole.
        ValueError: if `outputs` is below 1.

    Attributes:
        label_shape: of one label.
        label_dtype: of labels as given, stored, and hashed.
    """

    name: ClassVar[str]
    label_dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, outputs: int) -> None:
        check_positive(outputs=outputs)
        self.outputs = int(outputs)

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label."""
        return (self.outputs,)

    def config(self) -> dict[str, Any]:
        """Return the configuration of the task for `task_from`, as plain JSON."""
        return {"name": self.name, "outputs": self.outputs}

    def check(self, labels: Any, count: int) -> Tensor:  # noqa: ANN401 - anything that a tensor can be made from
        """Return the labels of `count` instances as a tensor of the task's dtype.

        Args:
            labels: a tensor, a NumPy array, or a list; integers of any width if the task has integer labels.
            count: number of instances.

        Raises:
            TypeError: if labels are not numbers, or of another kind.
            ValueError: if labels have another shape, or a label is out of range.
        """
        try:
            found = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"expected labels as numbers, found {type(labels).__name__} ({error}); {self._advice}"
            ) from None
        kind = str(self.label_dtype).removeprefix("torch.")
        if found.dtype == torch.bool or found.is_floating_point() != self.label_dtype.is_floating_point:
            raise TypeError(f"labels must be {kind}, found {found.dtype}; {self._advice}")
        if found.shape != (count, *self.label_shape):
            shape = "" if not self.label_shape else f" of shape {self.label_shape}"
            raise ValueError(f"expected one label{shape} for each of {count} inputs, found {tuple(found.shape)}")
        if count:
            self._check_range(found)
        return found.to(self.label_dtype)

    _advice: ClassVar[str] = "number the classes, as numpy.unique(labels, return_inverse=True)[1] does"

    @abstractmethod
    def _check_range(self, labels: Tensor) -> None:
        """Raise ValueError if a label is out of range."""

    @abstractmethod
    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each instance, `(B,)`, from outputs `(B, n)`."""

    @abstractmethod
    def average(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return one prediction `(B, n)` from the predictions beside several neighbours.

        Args:
            outputs: `(B, k, n)` of the network.
            weights: `(B, k)`, which add up to 1.
        """

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """Return labels `(B, ...)` from outputs `(B, n)`."""

    @abstractmethod
    def scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the score of each prediction, `(B,)` float64, whose mean is reported; higher is better."""

    @abstractmethod
    def vectors(self, labels: Tensor) -> Tensor:
        """Return labels `(...)` as vectors `(..., n)` float64, whose mean is a prediction; 0 for a missing label."""

    @abstractmethod
    def of_mean(self, mean: Tensor, known: Tensor, smoothing: float) -> Tensor:
        """Return outputs `(B, n)` from mean vectors `(B, n)` of labels.

        Args:
            mean: weighted means of `vectors`.
            known: `(B,)` whether there was any label.
            smoothing: share of the prediction that is made without labels, so that no probability is 0 or 1.
        """

    @abstractmethod
    def of_scores(self, scores: Tensor, scale: float) -> Tensor:
        """Return outputs `(B, n)` from a least-squares fit `(B, n)` to `vectors`, times `scale` if they are logits."""

    def missing(self, labels: Tensor) -> Tensor:
        """Return which labels `(...)` are missing: -1 or NaN."""
        gone = _missing(labels)
        return gone.flatten(gone.ndim - len(self.label_shape)).any(-1) if self.label_shape else gone

    @abstractmethod
    def embedding(self, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401 - device and dtype
        """Return a module that maps labels, some of which may be missing, to vectors of a width."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Task) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash((self.name, self.outputs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.outputs})"


class Classification(Task):
    """Classification into one of `n` classes; labels `(B,)` int64 from 0 to `n - 1`.

    Loss: cross-entropy in nats. Average: `log sum_j w_j softmax(outputs_j)`, the mean of the probabilities. Score: 1
    for a correct prediction, else 0.

    Examples:
        >>> task = Classification(3)
        >>> task.predict(torch.tensor([[0.1, 2.0, -1.0]]))
        tensor([1])
    """

    name = "classification"

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of one label: a number."""
        return ()

    def _check_range(self, labels: Tensor) -> None:
        low, high = (int(value) for value in labels.aminmax())
        if low < 0:  # cross-entropy silently ignores a label of -100
            raise ValueError(f"a label is at least 0, found {low}; leave out inputs that have no label")
        if high >= self.outputs:
            raise ValueError(f"expected labels below {self.outputs}, found {high}")

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each instance, `(B,)`; arguments as for `Task.losses`."""
        return F.cross_entropy(outputs, labels, reduction="none")

    def average(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the log of the mean probabilities, `(B, n)`; arguments as for `Task.average`."""
        return torch.logsumexp(weights.log()[..., None] + outputs.log_softmax(2), 1).to(outputs.dtype)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the class of the greatest output, `(B,)`; arguments as for `Task.predict`."""
        return outputs.argmax(1)

    def scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return 1 for each correct prediction, else 0, `(B,)`; arguments as for `Task.scores`."""
        return (outputs.argmax(1) == labels).double()

    def vectors(self, labels: Tensor) -> Tensor:
        """Return a 1 at the place of the class, `(..., n)`; arguments as for `Task.vectors`."""
        places = torch.arange(self.outputs, device=labels.device)
        return (labels[..., None] == places).double()

    def of_mean(self, mean: Tensor, known: Tensor, smoothing: float) -> Tensor:
        """Return log-probabilities, `(B, n)`; arguments as for `Task.of_mean`."""
        same = 1 / self.outputs
        return torch.where(known[:, None], (1 - smoothing) * mean + smoothing * same, same).log()

    def of_scores(self, scores: Tensor, scale: float) -> Tensor:
        """Return log-probabilities, `(B, n)`; arguments as for `Task.of_scores`."""
        return (scale * scores).log_softmax(1)

    def embedding(self, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
        """Return an embedding with a vector for each class, and a vector for a missing label."""
        return _ClassEmbedding(self.outputs + 1, width, **factory)


class MultiLabel(Task):
    """Prediction of any of `n` properties; labels `(B, n)` int64 of 0 and 1.

    Loss: mean binary cross-entropy of the properties in nats. Average: the logit of the mean probability of each
    property. Score: share of the properties that are predicted correctly.

    Examples:
        >>> task = MultiLabel(3)
        >>> task.predict(torch.tensor([[0.1, 2.0, -1.0]]))
        tensor([[1, 1, 0]])
    """

    name = "multi_label"
    _advice: ClassVar[str] = "give 0 or 1 for each property, as torch.as_tensor(labels).long() does of a mask"

    def _check_range(self, labels: Tensor) -> None:
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"labels of several properties are 0 or 1, found {low} to {high}")

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean binary cross-entropy of each instance, `(B,)`; arguments as for `Task.losses`."""
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none").mean(1)

    def average(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the logits of the mean probabilities, `(B, n)`; arguments as for `Task.average`."""
        logs = weights.log()[..., None]
        yes, no = (torch.logsumexp(logs + F.logsigmoid(sign * outputs), 1) for sign in (1, -1))
        return (yes - no).to(outputs.dtype)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return 1 for each property with a positive logit, else 0; arguments as for `Task.predict`."""
        return (outputs > 0).long()

    def scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the share of correct properties of each instance, `(B,)`; arguments as for `Task.scores`."""
        return (self.predict(outputs) == labels).double().mean(1)

    def vectors(self, labels: Tensor) -> Tensor:
        """Return the properties as numbers, `(..., n)`; arguments as for `Task.vectors`."""
        return labels.clamp_min(0).double()

    def of_mean(self, mean: Tensor, known: Tensor, smoothing: float) -> Tensor:
        """Return the logits of the mean probabilities, `(B, n)`; arguments as for `Task.of_mean`."""
        return torch.where(known[:, None], (1 - smoothing) * mean + smoothing / 2, 0.5).logit()

    def of_scores(self, scores: Tensor, scale: float) -> Tensor:
        """Return logits that are 0 for a score of one half, `(B, n)`; arguments as for `Task.of_scores`."""
        return scale * (scores - 0.5)

    def embedding(self, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
        """Return a linear map of label vectors."""
        return _VectorEmbedding(self.outputs, width, **factory)


class Regression(Task):
    """Regression of `n` real numbers; labels `(B, n)` float32, best of about unit size.

    Loss: mean squared error. Average: the mean. Score: the negative mean squared error.

    Examples:
        >>> task = Regression(2)
        >>> task.losses(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([5.])
    """

    name = "regression"
    label_dtype = torch.float32

    _advice: ClassVar[str] = "use torch.as_tensor(labels).float()"

    def _check_range(self, labels: Tensor) -> None:
        low, high = (float(value) for value in labels.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("labels must be finite, found NaN or infinity; leave out inputs that have no label")

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error of each instance, `(B,)`; arguments as for `Task.losses`."""
        return (outputs - labels.to(outputs.dtype)).square().mean(1)

    def average(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of the outputs, `(B, n)`; arguments as for `Task.average`."""
        return (weights[..., None] * outputs).sum(1).to(outputs.dtype)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return the outputs as they are; arguments as for `Task.predict`."""
        return outputs

    def scores(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the negative mean squared error of each instance, `(B,)`; arguments as for `Task.scores`."""
        return -(outputs.double() - labels.double()).square().mean(1)

    def vectors(self, labels: Tensor) -> Tensor:
        """Return the numbers, `(..., n)`; arguments as for `Task.vectors`."""
        return labels.nan_to_num(0.0).double()

    def of_mean(self, mean: Tensor, known: Tensor, smoothing: float) -> Tensor:
        """Return the mean, 0 without any label, `(B, n)`; arguments as for `Task.of_mean`."""
        return torch.where(known[:, None], mean, 0.0)

    def of_scores(self, scores: Tensor, scale: float) -> Tensor:
        """Return the scores as they are; arguments as for `Task.of_scores`."""
        return scores

    def embedding(self, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
        """Return a linear map of label vectors."""
        return _VectorEmbedding(self.outputs, width, **factory)


#: Tasks by their names in files.
TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, MultiLabel, Regression)}


def task_from(config: Mapping[str, Any]) -> Task:
    """Return the task that `Task.config` describes.

    Raises:
        ValueError: if there is no task with this name.

    Examples:
        >>> task_from({"name": "regression", "outputs": 2})
        Regression(2)
    """
    if config.get("name") not in TASKS:
        raise ValueError(f"expected a task, one of {', '.join(TASKS)}, found {config.get('name')!r}")
    return TASKS[config["name"]](config["outputs"])


def _missing(labels: Tensor) -> Tensor:
    """Return which numbers are missing: -1 or NaN."""
    return labels.isnan() if labels.is_floating_point() else labels < 0


class _ClassEmbedding(nn.Embedding):
    """An embedding of classes; the first vector is for a missing label, -1."""

    def forward(self, labels: Tensor) -> Tensor:
        vectors: Tensor = super().forward(labels + 1)
        return vectors


class _VectorEmbedding(nn.Linear):
    """A linear map of label vectors; a missing label, -1 or NaN, adds only the bias."""

    def forward(self, labels: Tensor) -> Tensor:
        vectors: Tensor = super().forward(labels.masked_fill(_missing(labels), 0).to(self.weight.dtype))
        return vectors

"""Values that are written rather than learned: a function of an instance's own key and label.

Letters: `D` width of a key, `V` width of a value, `n` classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from munkey.task import Classification, Task
from treediff.core.checks import check_positive

__all__ = ["ValueWriter"]


class ValueWriter(nn.Module):
    """A writer of values: `W k + e(label)` from the key and the label of a row, or from the key alone without a label.

    A writer that is trained on permanent instances computes the value of any other instance in a forward pass. No
    weight is trained on these other instances.

    Args:
        key_width: `D`.
        value_width: `V`.
        task: kind of a label; a whole number `n` for one of `n` classes.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(M, D)` and labels `(M, ...)` to `(M, V)`; a label of -1 or NaN is missing.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1.

    Examples:
        >>> ValueWriter(key_width=3, value_width=2, task=10)(torch.rand(4, 3), torch.tensor([0, 9, 3, -1])).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        key_width: int,
        value_width: int,
        task: Task | int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(key_width=key_width, value_width=value_width)
        self.task = task if isinstance(task, Task) else Classification(task)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.of_key = nn.Linear(key_width, value_width, **factory)
        self.of_label = self.task.embedding(value_width, **factory)

    def check(self, labels: Tensor | None, count: int) -> None:
        """Raise TypeError or ValueError if labels do not fit the task."""
        if labels is not None:
            self.task.check(labels, count)

    def forward(self, keys: Tensor, labels: Tensor) -> Tensor:
        """Return the values `(M, V)` of keys `(M, D)` and labels `(M, ...)`."""
        values: Tensor = self.of_key(keys) + self.of_label(labels)
        return values

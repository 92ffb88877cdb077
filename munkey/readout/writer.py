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
    """`W k + e(label)`: the value of a row, from its key and its label, or from its key alone if it has none.

    Trained on permanent instances, it computes a value for any other instance in a forward pass: no weight was trained
    on that one.

    Args:
        key_width: `D`.
        value_width: `V`.
        task: what a label is; a whole number `n` for one of `n` classes.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(M, D)` and labels `(M, ...)` to `(M, V)`; a label of -1, or of NaN, is none.

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
        """Raise TypeError or ValueError if labels are not those of the task."""
        if labels is not None:
            self.task.check(labels, count)

    def forward(self, keys: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        values: Tensor = self.of_key(keys) + self.of_label(labels)
        return values

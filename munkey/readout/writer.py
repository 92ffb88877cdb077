"""Values that are written rather than learned: a function of an instance's own key and label.

Letters: `D` width of a key, `V` width of a value, `n` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from munkey.store.checks import check_width

__all__ = ["ValueWriter"]


class ValueWriter(nn.Module):
    """`W k + e_label`: the value of a row, from its key and its label, or from its key alone if it has none.

    Trained on instances that stay for good, it gives a value to any other one in a forward pass, and no weight has seen
    that one.

    Args:
        key_width: `D`.
        value_width: `V`.
        classes: `n`.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(..., D)` and `(...)` int64 to `(..., V)`; a label of -1 is none.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1.

    Examples:
        >>> ValueWriter(key_width=3, value_width=2, classes=10)(torch.rand(4, 3), torch.tensor([0, 9, 3, -1])).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        key_width: int,
        value_width: int,
        classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_width(key_width=key_width, value_width=value_width, classes=classes)
        self.of_key = nn.Linear(key_width, value_width, device=device, dtype=dtype)
        self.of_label = nn.Embedding(classes + 1, value_width, device=device, dtype=dtype)

    @property
    def classes(self) -> int:
        """`n`."""
        return self.of_label.num_embeddings - 1

    def check(self, labels: Tensor | None) -> None:
        """Raise ValueError if a label is of no class."""
        if labels is not None and labels.numel() and int(labels.max()) >= self.classes:
            raise ValueError(
                f"expected labels below {self.classes}, the classes of the writer, found {int(labels.max())}"
            )

    def forward(self, keys: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        values: Tensor = self.of_key(keys) + self.of_label(labels + 1)
        return values

"""Rows of several columns as bytes, which are sent in one message."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(columns: Sequence[Tensor]) -> Tensor:
    """Return the bytes `(n, bytes)` uint8 of columns `(n, ...)`."""
    flat = [column.detach().unsqueeze(-1).flatten(1).contiguous() for column in columns]
    return torch.cat([column.view(torch.uint8) for column in flat], 1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the columns of packed rows, with the dtypes and shapes of `like` except for the number of rows.

    Examples:
        >>> columns = torch.arange(3), torch.eye(3)
        >>> [column.shape for column in unpack(pack(columns), columns)]
        [torch.Size([3]), torch.Size([3, 3])]
    """
    widths = [math.prod(column.shape[1:]) * column.element_size() for column in like]
    return [
        part.reshape(-1).clone().view(column.dtype).view(len(packed), *column.shape[1:])  # aligned
        for part, column in zip(packed.split(widths, 1), like, strict=True)
    ]

"""Copies of rows that are overwritten after use: freed memory keeps its content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

__all__ = ["Scratch", "wipe", "wipe_copies"]


class Scratch:
    """Context that overwrites tensors with zeros on exit, also after an error.

    Examples:
        >>> import torch
        >>> with Scratch() as scratch:
        ...     copy = scratch(torch.ones(2) * 3)
        >>> copy
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        self._copies: list[Tensor] = []
        self._made: list[Tensor] = []

    def __call__(self, copy: Tensor) -> Tensor:
        """Register a tensor to be overwritten on exit; return the tensor."""
        self._copies.append(copy)
        return copy

    def unless_kept(self, made: Tensor) -> Tensor:
        """Register a tensor to be overwritten on exit unless `keep` was called; return the tensor."""
        self._made.append(made)
        return made

    def keep(self) -> None:
        """Exempt the tensors of `unless_kept` from overwriting: these tensors are in use now."""
        self._made = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tensor in (*self._copies, *self._made):
            wipe(tensor.detach())


def wipe(tensor: Tensor) -> None:
    """Overwrite a tensor with zeros, without waking the threads of PyTorch, which takes milliseconds.

    Examples:
        >>> import torch
        >>> copy = torch.ones(2, dtype=torch.bfloat16)
        >>> wipe(copy)
        >>> copy
        tensor([0., 0.], dtype=torch.bfloat16)
    """
    if tensor.ndim == 2 and not tensor.is_contiguous():
        tensor = tensor.T  # by columns, as LAPACK writes a matrix
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.ndim:
        tensor.view(torch.uint8).numpy().fill(0)
    else:
        tensor.zero_()


def wipe_copies(copies: Iterable[Tensor], of: Iterable[Tensor]) -> None:
    """Overwrite tensors that do not share memory with their originals."""
    for copy, original in zip(copies, of, strict=True):
        if copy.data_ptr() != original.data_ptr():
            wipe(copy)

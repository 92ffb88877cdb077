"""Encoders from any module."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder

__all__ = ["ModuleEncoder"]


class ModuleEncoder(KeyEncoder):
    """An encoder from any module; the result of the module is flattened.

    Args:
        module: from inputs to features; its parameters are frozen.
        width: dimensions of a flattened result.
        fitted_on: data that the module was trained on, one of `FITTED_ON`.
        row_wise: whether keys may be computed in batches; see `KeyEncoder`.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if the width is below 1, or `fitted_on` is another word.

    Examples:
        >>> import torch
        >>> ModuleEncoder(nn.Linear(5, 3), width=3, fitted_on="other data")(torch.rand(2, 5)).shape
        torch.Size([2, 3])
    """

    in_file = False

    def __init__(self, module: nn.Module, width: int, *, fitted_on: str, row_wise: bool = False) -> None:
        super().__init__(width, fitted_on)
        self.row_wise = row_wise
        self.config["module"] = repr(module)  # different activations may have the same weights
        self.module = module.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Return the flattened results of the module, `(B, D)`."""
        found: Tensor = self.module(x)
        return found.flatten(1)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Raise ValueError: a file does not hold the module."""
        raise ValueError(
            f"no file holds the module of a {cls.__name__}; make the module and {cls.__name__}(module, "
            f"width={config.get('width')}, fitted_on={config.get('fitted_on')!r}) around it, and compare fingerprints"
        )

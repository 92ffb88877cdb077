"""The input itself as its key."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from munkey.encoders.base import KeyEncoder
from treediff.core.checks import check_batch

__all__ = ["Identity"]


class Identity(KeyEncoder):
    """An encoder that returns its input, for features that another network has computed before.

    Args:
        width: `D`, dimensions of an input.
        fitted_on: data that the network behind the features was trained on, one of `FITTED_ON`.

    Shapes:
        `(B, D)` to `(B, D)`.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if the width is below 1, or `fitted_on` is another word.

    Examples:
        >>> import torch
        >>> Identity(3)(torch.eye(3)[:1])
        tensor([[1., 0., 0.]])
    """

    row_wise = True

    def __init__(self, width: int, *, fitted_on: str = "other data") -> None:
        super().__init__(width, fitted_on)

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of finite vectors of the encoder's width."""
        check_batch(x, (self.width,), None, None, "features")

    def encode(self, x: Tensor) -> Tensor:
        """Return a copy of the inputs, `(B, D)`."""
        return x.flatten(1).clone()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an encoder from settings."""
        return cls(config["width"], fitted_on=config["fitted_on"])

"""Encoder of vectors by a small network, for rows of tables and features of other networks.

Letters: `B` batch, `D` width of a key.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder
from treediff.core.checks import check_batch, check_positive

__all__ = ["PerceptronEncoder"]


class PerceptronEncoder(KeyEncoder):
    """A network with one hidden layer, `W_2 GELU(W_1 (x - mean) / spread + b_1) + b_2`.

    Args:
        inputs: dimensions of a vector.
        width: `D`.
        fitted_on: data that the encoder is fitted to, one of `FITTED_ON`.
        hidden: width of the hidden layer.

    Shapes:
        `(B, inputs)` to `(B, D)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or `fitted_on` is another word.

    Examples:
        >>> PerceptronEncoder(5, 16, fitted_on="permanent split")(torch.rand(2, 5)).shape
        torch.Size([2, 16])
    """

    row_wise = True
    mean: Tensor
    spread: Tensor

    def __init__(self, inputs: int, width: int, *, fitted_on: str, hidden: int = 512) -> None:
        super().__init__(width, fitted_on)
        check_positive(inputs=inputs, hidden=hidden)
        self.config |= {"inputs": inputs, "hidden": hidden}
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, width))

    @classmethod
    def standardising(cls, x: Tensor, width: int, *, fitted_on: str, hidden: int = 512) -> Self:
        """Build an encoder with mean and spread of some vectors `(N, inputs)`; a constant column has spread 1.

        Args:
            x: vectors to fit mean and spread to.
            width: `D`.
            fitted_on: kind of these vectors, one of `FITTED_ON`.
            hidden: width of the hidden layer.

        Raises:
            ValueError: if there is no vector; otherwise as for the class.
        """
        if x.ndim != 2 or not len(x):
            raise ValueError(f"expected vectors (N, inputs) with N above 0, found {tuple(x.shape)}")
        made = cls(x.shape[1], width, fitted_on=fitted_on, hidden=hidden).to(x.dtype)
        spread = x.double().std(0, correction=0)
        made.mean.copy_(x.double().mean(0))
        made.spread.copy_(torch.where(spread > 0, spread, 1.0))
        return made

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of finite vectors."""
        check_batch(x, tuple(self.mean.shape), None, None, "vectors")

    def encode(self, x: Tensor) -> Tensor:
        """Return the keys `(B, D)` of a batch, with gradients, to train the encoder."""
        keys: Tensor = self.body((x - self.mean) / self.spread)
        return keys

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an encoder from settings; its weights are loaded afterwards."""
        return cls(config["inputs"], config["width"], fitted_on=config["fitted_on"], hidden=config["hidden"])

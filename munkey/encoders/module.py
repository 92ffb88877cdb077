"""Encoders from any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder

__all__ = ["ModuleEncoder"]


class ModuleEncoder(KeyEncoder):
    """An encoder from any module, such as a pretrained network; the result of the module is flattened.

    The guide has a line for each of timm, torchvision, transformers and sentence-transformers.

    Args:
        module: from inputs to features; its parameters are frozen.
        width: dimensions of a flattened result.
        fitted_on: data that the module was trained on, one of `FITTED_ON`.
        row_wise: whether keys may be computed in batches; see `KeyEncoder`.
        features: from the result of the module to features, if the result is no tensor, or has tokens to choose from.
            The fingerprint does not cover it.
        autocast: lower precision to run the module in, such as `torch.bfloat16`; keys keep the dtype of the weights.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if the width is below 1, or `fitted_on` is another word.

    Examples:
        >>> ModuleEncoder(nn.Linear(5, 3), width=3, fitted_on="other data")(torch.rand(2, 5)).shape
        torch.Size([2, 3])
    """

    in_file = False

    def __init__(
        self,
        module: nn.Module,
        width: int,
        *,
        fitted_on: str,
        row_wise: bool = False,
        features: Callable[[Any], Tensor] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, fitted_on)
        self.row_wise, self.features, self.autocast = row_wise, features, autocast
        if autocast is not None:
            self.config["autocast"] = str(autocast)
        self.config["module"] = repr(module)  # different activations may have the same weights
        self.module = module.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Return the flattened results of the module, `(B, D)`."""
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            found = self.module(x)
            chosen: Tensor = found if self.features is None else self.features(found)
        if not isinstance(chosen, Tensor):
            raise TypeError(
                f"the module returned a {type(chosen).__name__}, expected a tensor; pass features=, such as "
                "features=lambda found: found.last_hidden_state[:, 0]"
            )
        return chosen.flatten(1).to(self.dtype or chosen.dtype)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Raise ValueError: a file does not hold the module."""
        raise ValueError(
            f"no file holds the module of a {cls.__name__}; make the module and {cls.__name__}(module, "
            f"width={config.get('width')}, fitted_on={config.get('fitted_on')!r}) around it, and compare fingerprints"
        )

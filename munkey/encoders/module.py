"""Any module as a key encoder."""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from munkey.encoders.base import KeyEncoder

__all__ = ["ModuleEncoder"]


class ModuleEncoder(KeyEncoder):
    """Any module as an encoder; its result is flattened.

    Args:
        module: from inputs to features; its parameters are frozen.
        width: numbers of a result.
        fitted_on: what the module was trained on, one of `FITTED_ON`.
        row_wise: see `KeyEncoder`; whether keys may be made in batches.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if it is below 1, or `fitted_on` is another word.

    Examples:
        >>> ModuleEncoder(nn.Linear(5, 3), width=3, fitted_on="other data")(torch.rand(2, 5)).shape
        torch.Size([2, 3])
    """

    in_file = False

    def __init__(self, module: nn.Module, width: int, *, fitted_on: str, row_wise: bool = False) -> None:
        super().__init__(width, fitted_on)
        self.row_wise = row_wise
        self.config["module"] = repr(module)  # weights do not tell activations apart
        self.module = module.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.module(x)
        return found.flatten(1)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Raises ValueError: a file does not say how the module is made."""
        raise ValueError(
            f"no file holds the module of a {cls.__name__}; make the module and {cls.__name__}(module, "
            f"width={config.get('width')}, fitted_on={config.get('fitted_on')!r}) around it, and compare fingerprints"
        )

"""Projections as key encoders: random weights, principal components, or whitening."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from munkey.encoders.base import KeyEncoder
from munkey.shrinkage import check_shrinkage, shrink
from treediff.core.checks import check_positive
from treediff.core.noise import counter_normal

__all__ = ["Projection"]


class Projection(KeyEncoder):
    """A projection of flattened inputs, `(x - mean) W`: random, to principal components, or whitening.

    Args:
        mean: `(n,)`.
        weight: `(n, D)`.
        fitted_on: one of `FITTED_ON`.

    Raises:
        ValueError: if the shapes do not fit.

    Examples:
        >>> Projection.random((1, 28, 28), 64)(torch.rand(3, 1, 28, 28)).shape
        torch.Size([3, 64])
    """

    row_wise = True
    mean: Tensor
    weight: Tensor

    def __init__(self, mean: Tensor, weight: Tensor, *, fitted_on: str) -> None:
        if mean.ndim != 1 or weight.ndim != 2 or len(mean) != len(weight):
            raise ValueError(
                f"expected a mean (n,) and weights (n, D), found {tuple(mean.shape)}, {tuple(weight.shape)}"
            )
        super().__init__(weight.shape[1], fitted_on)
        self.config["inputs"] = len(mean)
        # Contiguous, as in a loaded file: matrix products with a transposed matrix round differently.
        self.register_buffer("mean", mean.contiguous())
        self.register_buffer("weight", weight.contiguous())

    def encode(self, x: Tensor) -> Tensor:
        """Return the projections `(B, D)` of inputs `(B, ...)`."""
        x = x.flatten(1)
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"this projection takes inputs of {len(self.mean)} dimensions, found {x.shape[1]}; it was made for "
                "other data, or for images of another size"
            )
        return (x - self.mean) @ self.weight

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a projection from settings; its weights are loaded afterwards."""
        count = config["inputs"]
        return cls(torch.zeros(count), torch.zeros(count, config["width"]), fitted_on=config["fitted_on"])

    @classmethod
    def random(cls, inputs: tuple[int, ...], width: int, *, seed: int = 0) -> Self:
        """Build a projection with independent normal weights of variance `1 / n`.

        Distances are kept up to a factor (Johnson, Lindenstrauss).

        Raises:
            TypeError: if the width is not whole.
            ValueError: if the width is below 1.
        """
        check_positive(key_width=width)
        count = math.prod(inputs)
        weight = counter_normal(seed, torch.arange(count), (width,), dtype=torch.float32) / math.sqrt(count)
        return cls(torch.full((count,), 0.5, dtype=torch.float32), weight, fitted_on="nothing")

    @classmethod
    def principal(cls, x: Tensor, width: int, *, fitted_on: str) -> Self:
        """Build a projection to the first principal components of some inputs, each direction with a fixed sign.

        Args:
            x: `(N, ...)`, inputs to fit to.
            width: number of components.
            fitted_on: kind of these inputs, one of `FITTED_ON`.

        Raises:
            TypeError: if the width is not whole.
            ValueError: if the width is below 1, or above the number of components of the inputs.
        """
        check_positive(key_width=width)
        rows = x.flatten(1).double()
        if width > min(rows.shape):
            raise ValueError(
                f"{tuple(rows.shape)} inputs have at most {min(rows.shape)} components, found width={width}"
            )
        mean = rows.mean(0)
        _, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean))
        weight = directions[:, -width:].flip(1)
        weight = weight * weight.gather(0, weight.abs().argmax(0, keepdim=True)).sign()
        return cls(mean.to(x.dtype), weight.to(x.dtype), fitted_on=fitted_on)

    @classmethod
    def whitening(cls, x: Tensor, labels: Tensor, *, shrinkage: float = 0.3, fitted_on: str) -> Self:
        """Build a projection in which classes have round clouds of keys, `(x - mean) C^-1/2`.

        `C = (1 - a) within + a m I` with the covariance within classes, the mean `m` of its diagonal, and `a` the
        shrinkage. Cosines between whitened features tell classes apart better than cosines between features: directions
        in which features vary within a class count less.

        Args:
            x: `(N, ...)`, inputs to fit to.
            labels: `(N,)` int64, their classes.
            shrinkage: `a`, above 0, and 1 at most.
            fitted_on: kind of these inputs, one of `FITTED_ON`.

        Raises:
            ValueError: if there are fewer than two inputs, not one label for each, or the shrinkage is out of range.

        Source: Hastie et al., "The elements of statistical learning" (2009), section 4.3.2.
        """
        check_shrinkage(shrinkage)
        rows = x.flatten(1).double()
        if len(rows) < 2 or labels.shape != (len(rows),):
            raise ValueError(
                f"expected at least two inputs with one label each, found {len(rows)} inputs and labels of shape "
                f"{tuple(labels.shape)}"
            )
        _, of_row, count = labels.unique(return_inverse=True, return_counts=True)
        means = rows.new_zeros(len(count), rows.shape[1]).index_add_(0, of_row, rows) / count[:, None]
        within = rows - means[of_row]
        covariance = within.T @ within / max(1, len(rows) - len(count))
        factor = torch.linalg.cholesky(shrink(covariance, shrinkage, float(rows.square().mean())))
        weight = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False).T
        return cls(rows.mean(0).to(x.dtype), weight.to(x.dtype), fitted_on=fitted_on)

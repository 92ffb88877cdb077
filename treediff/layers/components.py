"""Principal components of features, and rows of one length, as layers.

Letters: `N` rows, `B` batch, `D` features, `P` components.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.core.checks import check_positive
from treediff.core.modes import lasting
from treediff.core.rows import Indexable, Rows

__all__ = ["PrincipalComponents", "UnitLength"]


class PrincipalComponents(nn.Module):
    """Projection on the directions of greatest variance, `y = s (x - mean) basis`, as a frozen layer.

    The scale `s` is one number, which makes the mean variance of the components 1, so that distances keep their
    proportions. With `whiten` each component has its own scale and the variance 1.

    Args:
        features: `D`, width of the inputs.
        components: `P`, at most `D`.
        device: of the tables.
        dtype: of the tables.

    Shapes:
        `(B, D)` to `(B, P)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if there are more components than features.

    Attributes:
        mean: `(D,)`.
        basis: `(D, P)`, with the scales.

    Examples:
        >>> rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 3.0])
        >>> layer = PrincipalComponents.fit(rows, components=2, whiten=True)
        >>> layer(rows).var(0, correction=0).round(decimals=3)
        tensor([1., 1.])
    """

    mean: Tensor
    basis: Tensor

    @lasting()
    def __init__(
        self,
        features: int,
        components: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(features=features, components=components)
        if components > features:
            raise ValueError(f"{features} features have at most as many components, found components={components}")
        factory: Any = {"device": device, "dtype": dtype}
        self.register_buffer("mean", torch.zeros(features, **factory))
        self.register_buffer("basis", torch.eye(features, components, **factory))

    @classmethod
    @torch.no_grad()
    def fit(cls, rows: Indexable, components: int, *, whiten: bool = False, batch_size: int = 4096) -> Self:
        """Find the components of rows `(N, D)`, by the eigenvectors of their covariance in float64.

        Args:
            rows: a tensor, or anything else that `Rows` takes; read once, a batch at a time.
            components: `P`.
            whiten: whether each component has the variance 1.
            batch_size: rows in a batch.

        Raises:
            ValueError: if rows are no vectors, there are fewer than two, or they are all alike.
        """
        data = Rows.of(rows)
        if len(data.shape) != 2 or len(data) < 2:
            raise ValueError(f"expected at least two rows (N, D), found shape {tuple(data.shape)}")
        layer = cls(data.shape[1], components)
        shift = data[0].double()  # sums of numbers far from 0 would lose their digits
        total, products = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
        for batch in data.split(batch_size):
            x = batch.cpu().double() - shift
            total += x.sum(0)
            products += x.T @ x
        mean = total / len(data)
        values, vectors = torch.linalg.eigh(products / len(data) - mean.outer(mean))
        variance, basis = values.flip(0)[:components].clamp_min(0), vectors.flip(1)[:, :components]
        if not bool(variance[0] > 0):
            raise ValueError("expected rows that differ, found rows that are all alike")
        floor = torch.finfo(torch.float32).eps * variance[0]
        scale = variance.clamp_min(floor).rsqrt() if whiten else variance.mean().rsqrt()
        # The sign of an eigenvector is arbitrary: the entry of greatest size is positive.
        sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
        layer.mean.copy_(mean + shift)
        layer.basis.copy_(basis * sign * scale)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map features `(B, D)` to components `(B, P)`."""
        return (x - self.mean) @ self.basis

    def extra_repr(self) -> str:
        """Return the widths, for `print(layer)`."""
        features, components = self.basis.shape
        return f"features={features}, components={components}"


class UnitLength(nn.Module):
    """Scaling of rows to the length `sqrt(D)`, so that only their directions count; a row of zeros stays.

    The contrast of a photograph changes the length of its features, and is no cluster.

    Shapes:
        `(B, D)` to `(B, D)`.

    Examples:
        >>> UnitLength()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.8485, 1.1314],
                [0.0000, 0.0000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale rows `(B, D)`."""
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        scaled: Tensor = x / length.masked_fill(length == 0, 1) * x.shape[1] ** 0.5
        return scaled

"""Building blocks of node networks, encoders and decoders.

Latents and features are vectors `(B, D)`, or maps `(B, D, h, w)` of a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treediff.core.checks import Shape, check_positive, check_shape
from treediff.layers.hidden import project, stack
from treediff.tree.probability import log_softplus

__all__ = ["BottomUpBlock", "GaussianHead", "LatentTransition"]


class LogVariance(nn.Module):
    """Layer that reads the second half of the channels as `softplus^-1` of a variance and returns its logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 2D, ...)` to `(B, 2D, ...)`: the mean unchanged, then the log-variance."""
        mean, raw = x.chunk(2, 1)
        return torch.cat([mean, log_softplus(raw)], 1)


class GaussianHead(nn.Sequential):
    """Head from features to a diagonal Gaussian: the part of a node's posterior that depends on the image.

    The variance is `softplus` of a projection, kept as its logarithm (TreeVAE, arXiv 2306.08984, eq. 7).

    Args:
        inputs: shape of the features, `(D,)` or `(D, h, w)`.
        latent: width of the latent.
        hidden: widths of hidden layers in between; none by default.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, D, ...)` to `(B, 2 * latent, ...)`: the mean, then the log-variance; `.chunk(2, dim=1)`
        separates both.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> mean, logvar = GaussianHead((16,), 4)(torch.zeros(2, 16)).chunk(2, dim=1)
        >>> mean.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        inputs: Shape,
        latent: int,
        hidden: Sequence[int] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        inputs = check_shape("inputs", inputs)
        check_positive(latent=latent)
        layers = stack(inputs, hidden, **factory)
        layers["gaussian"] = project(([inputs[0], *hidden][-1], *inputs[1:]), 2 * latent, **factory)
        layers["logvar"] = LogVariance()
        super().__init__(layers)


class LatentTransition(GaussianHead):
    """Transition from a parent's latent to the prior of its child, `p(z_child | z_parent)` (TreeVAE, eq. 3).

    This is a `GaussianHead` that keeps the latent's shape, with a hidden layer by default.

    Args:
        latent: shape of the latent, `(D,)` or `(D, h, w)`.
        hidden: widths of the hidden layers.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> LatentTransition((16, 2, 2))(torch.zeros(1, 16, 2, 2)).shape
        torch.Size([1, 32, 2, 2])
    """

    def __init__(
        self,
        latent: Shape,
        hidden: Sequence[int] = (128,),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(latent, check_shape("latent", latent)[0], hidden, device=device, dtype=dtype)


class BottomUpBlock(nn.Module):
    """Block of the deterministic ladder, from the features of a depth to the features of the depth above.

    `d_{h-1} = d_h + f(d_h)` with `f` a stack of project, normalise, activate. The sum keeps the root, at the
    far end of the ladder, as close to the image as the leaves are.

    Args:
        inputs: shape of the features, `(D,)` or `(D, h, w)`; kept.
        layers: number of repetitions of project, normalise, activate.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, *inputs)` to `(B, *inputs)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> BottomUpBlock((16,))(torch.zeros(2, 16)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        inputs: Shape,
        layers: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inputs = check_shape("inputs", inputs)
        check_positive(layers=layers)
        self.step = nn.Sequential(stack(inputs, [inputs[0]] * layers, device=device, dtype=dtype))

    def forward(self, d: Tensor) -> Tensor:
        """Return the features of the depth above, `d + f(d)`."""
        step: Tensor = self.step(d)
        return d + step

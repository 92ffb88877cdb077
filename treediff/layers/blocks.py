"""The small pieces that node networks, encoders and decoders are made of.

Latents and features are vectors `(B, D)`, or maps `(B, D, h, w)` of a fixed size.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from treediff.layers.gaussians import LogVariance

__all__ = ["BottomUpBlock", "GaussianHead", "LatentTransition", "Router"]

Shape = tuple[int, ...]


def check_shape(name: str, shape: Shape) -> Shape:
    """A feature shape is `(D,)` or `(D, h, w)`, all positive."""
    shape = check_numbers(name, shape)
    if len(shape) not in (1, 3):
        raise ValueError(f"{name} must be (width,) or (channels, height, width), found {shape}")
    return shape


def check_numbers(name: str, numbers: Sequence[int], *, some: bool = True) -> Shape:
    """Sizes or widths: a tuple of whole numbers from 1 on, and not an empty one where there must be `some`."""
    if isinstance(numbers, int):
        raise TypeError(f"{name} must be a tuple of numbers, found {numbers}; write ({numbers},) for one")
    if not isinstance(numbers, Sequence) or not all(isinstance(number, Integral) for number in numbers):
        raise TypeError(f"{name} must be a tuple of whole numbers, found {numbers!r}")
    numbers = tuple(numbers)
    if min(numbers, default=0 if some else 1) < 1:
        raise ValueError(f"{name} must hold numbers of at least 1, found {numbers}")
    return numbers


def check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """A size is `(height, width)`."""
    if len(numbers := check_numbers(name, size)) != 2:
        raise ValueError(f"{name} must be (height, width), found {numbers}")
    return numbers[0], numbers[1]


def check_positive(**numbers: int) -> None:
    """Counts and widths are whole numbers and begin at 1."""
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise TypeError(f"{name} must be a whole number, found {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, found {number}")


def norm(shape: Shape, **factory: Any) -> nn.Module:  # noqa: ANN401
    """A norm of one instance: LayerNorm for vectors, GroupNorm for maps.

    A group of channels has 8 of them where 8 divides their number, else more. A vector of one number has no
    norm: it would always come out as the same.
    """
    if len(shape) == 1:
        return nn.LayerNorm(shape[0], **factory) if shape[0] > 1 else nn.Identity()
    return nn.GroupNorm(math.gcd(shape[0], max(1, shape[0] // 8)), shape[0], **factory)


def project(inputs: Shape, width: int, **factory: Any) -> nn.Module:  # noqa: ANN401
    """A linear layer for vectors, a 3x3 convolution for maps."""
    if len(inputs) == 1:
        return nn.Linear(inputs[0], width, **factory)
    return nn.Conv2d(inputs[0], width, 3, padding=1, **factory)


def stack(inputs: Shape, widths: Sequence[int], **factory: Any) -> OrderedDict[str, nn.Module]:  # noqa: ANN401
    """Hidden layers: project, normalise, activate, for each width."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, width in enumerate(check_numbers("hidden", widths, some=False)):
        layers[f"project{i}"] = project(inputs, width, **factory)
        inputs = (width, *inputs[1:])
        layers[f"norm{i}"] = norm(inputs, **factory)
        layers[f"act{i}"] = nn.SiLU()
    return layers


class Router(nn.Sequential):
    """The decision at a node: features or a latent in, the logit of going **left** out.

    Hidden layers with LayerNorm and SiLU on the flattened input, then one number. The same class serves the
    posterior router `q(c | d)` (TreeVAE, arXiv 2306.08984, eq. 5) and the prior router `p(c | z)` (eq. 2).

    Args:
        inputs: shape of one instance, `(D,)` or `(D, h, w)`.
        hidden: widths of the hidden layers.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, *inputs)` to `(B,)`.

    Raises:
        ValueError: if a shape or a width has numbers below 1, or is no shape at all.
        TypeError: if a shape is given as one number.

    Examples:
        >>> Router((8,))(torch.zeros(3, 8)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        inputs: Shape,
        hidden: Sequence[int] = (128,),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: Any = {"device": device, "dtype": dtype}
        flat = (math.prod(check_shape("inputs", inputs)),)
        layers = stack(flat, hidden, **factory)
        layers["logit"] = nn.Linear([*flat, *hidden][-1], 1, **factory)
        layers["squeeze"] = nn.Flatten(0)
        super().__init__(OrderedDict(flatten=nn.Flatten(1), **layers))

    def fit(
        self,
        x: Tensor,
        left: Tensor,
        *,
        confidence: float = 0.98,
        steps: int = 150,
        generator: torch.Generator | None = None,
    ) -> None:
        """Learn a given cut of some inputs into two, by cross-entropy.

        A router that learns along with the children it serves soon sends everything to the one that happens to be
        ahead. Children that begin with a share of the inputs each learn different things from the first step.

        Args:
            x: `(n, *inputs)`, what the router will see.
            left: `(n,)` booleans, which of them go left.
            confidence: probability aimed at for the side an input is on, above 1/2 and below 1.
            steps: of AdamW, on up to 1024 inputs each.
            generator: where the choice of inputs comes from, a CPU generator.

        Raises:
            ValueError: if there is no input, or not one boolean for each; or if the confidence is out of range.
        """
        if not len(x) or left.shape != x.shape[:1]:
            raise ValueError(
                f"a cut needs at least one input and one boolean for each; found {len(x)} inputs and booleans of shape "
                f"{tuple(left.shape)}"
            )
        if not 0.5 < confidence < 1:
            raise ValueError(f"confidence must be above 0.5 and below 1, found {confidence}")
        x = x.detach()
        target = torch.where(left, confidence, 1 - confidence).to(x)
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(x), (min(len(x), 1024),), generator=generator).to(x.device)
                loss = nn.functional.binary_cross_entropy_with_logits(self(x[rows]), target[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


class GaussianHead(nn.Sequential):
    """Features to a diagonal Gaussian: the part of a node's posterior that sees the image.

    The variance is `softplus` of a projection, kept as its logarithm (TreeVAE, arXiv 2306.08984, eq. 7).

    Args:
        inputs: shape of the features, `(D,)` or `(D, h, w)`.
        latent: width of the latent.
        hidden: widths of hidden layers in between; none by default.
        device: where the parameters live.
        dtype: of the parameters.

    Shapes:
        `(B, D, ...)` to `(B, 2 * latent, ...)`: the mean, then the log-variance; `.chunk(2, dim=1)` parts
        them.

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
    """A parent's latent to the prior of its child, `p(z_child | z_parent)` (TreeVAE, eq. 3).

    A `GaussianHead` that keeps the latent's shape, with a hidden layer by default.

    Args:
        latent: shape of the latent, `(D,)` or `(D, h, w)`.
        hidden: widths of the hidden layers.
        device: where the parameters live.
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
    """One step of the deterministic ladder, from the features of a depth to those of the depth above.

    `d_{h-1} = d_h + f(d_h)` with `f` a stack of project, normalise, activate. The sum keeps the root, at the
    far end of the ladder, as close to the image as the leaves are.

    Args:
        inputs: shape of the features, `(D,)` or `(D, h, w)`; kept.
        layers: how many times project, normalise, activate.
        device: where the parameters live.
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
        """See the class."""
        step: Tensor = self.step(d)
        return d + step

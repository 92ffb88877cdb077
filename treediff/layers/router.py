"""Routers: the decisions at nodes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from treediff.core.checks import Shape, check_shape
from treediff.core.modes import evaluating
from treediff.layers.hidden import stack

__all__ = ["Router", "fit_router"]

_RATE = 1e-2  # greatest learning rate of a fit


class Router(nn.Sequential):
    """Router of a node: features or a latent in, the logit of going **left** out.

    The flattened input passes hidden layers with LayerNorm and SiLU, then a projection to one number. The posterior
    router `q(c | d)` (TreeVAE, arXiv 2306.08984, eq. 5) and the prior router `p(c | z)` (eq. 2) are both of this class.

    Args:
        inputs: shape of one instance, `(D,)` or `(D, h, w)`.
        hidden: widths of the hidden layers.
        device: of the parameters.
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
        steps: int = 100,
        generator: torch.Generator | None = None,
    ) -> None:
        """Train the router on a given cut of inputs into two parts, by cross-entropy.

        A router that is trained together with new children soon sends all inputs to the child that happens to be ahead.
        If each child begins with its own share of the inputs, the children differ from the first step on.

        Args:
            x: `(n, *inputs)`, inputs of the router.
            left: `(n,)` booleans, True for the inputs that go left.
            confidence: target probability of the side that an input is on, above 1/2 and below 1.
            steps: of AdamW, on up to 512 inputs each.
            generator: source of the choice of inputs, a CPU generator.

        Raises:
            ValueError: if there are no inputs, or not one boolean for each input; or if the confidence is out of range.
        """
        fit_router(self, x, left, confidence=confidence, steps=steps, generator=generator)


def fit_router(
    router: nn.Module,
    x: Tensor,
    left: Tensor,
    *,
    confidence: float = 0.98,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> None:
    """Train any router on a given cut, in eval mode; arguments and errors as for `Router.fit`.

    Where inputs do not tell the sides apart well, the likeliest side is the larger one everywhere. A router that sends
    less than half of the smaller side's share there is trained on, with as much weight on either side, so that both
    sides get inputs. A router without parameters that train is unchanged.

    Args:
        router: inputs to the logit of going left, `(n, *inputs)` to `(n,)`.
        x: inputs.
        left: sides.
        confidence: target probability.
        steps: of AdamW.
        generator: source of the choice of inputs.

    Examples:
        >>> router = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
        >>> weight = nn.init.zeros_(router[0].weight)
        >>> fit_router(router, torch.tensor([[-9.0], [9.0]]), torch.tensor([False, True]))
        >>> (router(torch.tensor([[-9.0], [9.0]])) > 0).tolist()
        [False, True]
    """
    if not len(x) or left.shape != x.shape[:1]:
        raise ValueError(
            f"a cut needs at least one input and one boolean for each; found {len(x)} inputs and booleans of shape "
            f"{tuple(left.shape)}"
        )
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must be above 0.5 and below 1, found {confidence}")
    trained = [parameter for parameter in router.parameters() if parameter.requires_grad]
    if not trained:
        return
    x = x.detach()
    target = torch.where(left, confidence, 1 - confidence).to(x)
    with torch.enable_grad(), evaluating(router):
        _descend(router, trained, x, target, torch.ones_like(target), steps, generator)
        with torch.no_grad():
            found = router(x) > 0
        shares = left.float().mean(), (~left).float().mean()
        fewer = bool(shares[0] < 0.5)
        if int((found == fewer).sum()) < int((left == fewer).sum()) / 2:
            even = torch.where(left, 0.5 / shares[0], 0.5 / shares[1]).to(x)
            _descend(router, trained, x, target, even, steps, generator)


def _descend(
    router: nn.Module,
    trained: list[nn.Parameter],
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    steps: int,
    generator: torch.Generator | None,
) -> None:
    """Minimise the weighted cross-entropy to target probabilities, at a rate that rises for a third of the steps."""
    optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=1e-3, fused=True)
    for step in range(steps):
        done = step / steps
        rate = 0.15 + 0.85 * done / 0.3 if done < 0.3 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.3) / 0.7)
        optimizer.param_groups[0]["lr"] = _RATE * rate
        rows = torch.randint(len(x), (min(len(x), 512),), generator=generator).to(x.device)
        loss = nn.functional.binary_cross_entropy_with_logits(router(x[rows]), target[rows], weight[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

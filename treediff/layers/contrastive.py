"""Contrastive losses: two views of one image should have similar features and the same turn at every router.

TreeVAE (arXiv 2306.08984) adds both losses to the negative ELBO on colour images, times 100 in its reference
code. `nt_xent` is applied to the projected features of every bottom-up level and averaged over levels.
`decision_nt_xent` is applied to the routers and summed over routers.

Letters: `B` pairs of views, so `2B` items, `D` feature width, `I` routed nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ProjectionHead", "decision_nt_xent", "nt_xent"]


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.5, weights: Tensor | None = None) -> Tensor:
    r"""Compute the normalised, temperature-scaled cross-entropy between the two views of every image (SimCLR).

    With `u` the rows of `[first; second]` scaled to length 1, `s_ij = u_i . u_j / temperature`, and `p(i)`
    the other view of item `i`:

        loss_i = log sum_{j != i} exp(s_ij) - s_{i p(i)}        loss = sum_i w_i loss_i / sum_i w_i

    The sum in the denominator runs over all other `2B - 1` items. A weight of 0 takes an item out of the
    *mean* only: the item stays in the denominators of other items, through which it still gets a gradient. If
    all weights are 0 the loss is 0. A row of zeros has no direction and counts as orthogonal to every other row.

    The loss is computed in float32 at least, under autocast too. It is symmetric in its two views.

    Args:
        first: `(B, D)` features of the first views, of any length.
        second: `(B, D)` features of the second views, row by row of the same images.
        temperature: above 0; the smaller, the more the most similar of the other items count.
        weights: none below 0; `(B,)` for one weight per pair, `(2, B)` for one per item, None for equal weights.

    Returns:
        The loss in nats, a scalar; `log(2B - 1)` if all items are equal, and 0 for a single pair.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not above 0.
        TypeError: if the features are not floating point.

    Source: SimCLR (arXiv 2002.05709), eq. 1; TreeVAE (arXiv 2306.08984) uses it at temperature 0.5.

    Examples:
        >>> views = torch.eye(2)
        >>> nt_xent(views, views, temperature=1.0)  # log(e + 1 + 1) - 1
        tensor(0.5514)
    """
    _check_views(first, second, ndims=(2,), expected="(B, D)")
    spread = _weights_per_item(weights, first.shape[:1])
    with torch.autocast(first.device.type, enabled=False):
        items = torch.cat([_at_least_float32(first), _at_least_float32(second)])
        return _weighted_mean(_item_losses(_directions(items), temperature), spread)


def decision_nt_xent(
    logits_first: Tensor,
    logits_second: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Compute NT-Xent on decisions: both views of an image should take one turn, other images the other turn.

    At one router a sample is the vector `(s, 1 - s) / |(s, 1 - s)|` with `s = sigmoid(logit)`; the loss is then
    `nt_xent` of these vectors. With a column per router the losses of the columns are added up.

    The weights are the probabilities of reaching the router. They weight the items and are not to be learned, so
    no gradient flows into the weights. A router that no item reaches (all weights 0) adds 0.

    Memory grows as `I (2B)^2`: all routers are computed at once.

    Args:
        logits_first: `(B,)` for one router, or `(B, I)` for all of them, from the first views.
        logits_second: `(B,)` or `(B, I)` from the second views.
        weights: none below 0. The logits' shape gives one weight per pair, and `(2, B)` or `(2, B, I)` one per item
            (`torch.stack([reach_first, reach_second])`, as in TreeVAE). None means equal weights.
        temperature: above 0.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not above 0.
        TypeError: if the logits are not floating point.

    Source: TreeVAE (arXiv 2306.08984), the contrastive term on decisions; temperature 1 and detached weights
    from its reference implementation.

    Examples:
        >>> sure = torch.tensor([100.0, -100.0])  # one image goes left, the other right, in both views
        >>> decision_nt_xent(sure, sure)
        tensor(0.5514)
        >>> decision_nt_xent(torch.zeros(2, 3), torch.zeros(2, 3))  # three undecided routers: 3 log(3)
        tensor(3.2958)
    """
    _check_views(logits_first, logits_second, ndims=(1, 2), expected="(B,) or (B, I)")
    reach = None if weights is None else weights.detach()
    spread = _weights_per_item(reach, logits_first.shape)
    with torch.autocast(logits_first.device.type, enabled=False):
        logits = torch.cat([_at_least_float32(logits_first), _at_least_float32(logits_second)])
        # s^2 / (s^2 + (1 - s)^2) = sigmoid(2 logit): the unit vector is its square root, taken in log space.
        turns = torch.stack([logits, -logits], dim=-1)  # (2B, 2) or (2B, I, 2)
        units = torch.exp(0.5 * F.logsigmoid(2 * turns))
        losses = _item_losses(units.movedim(0, -2), temperature).movedim(-1, 0)
        return _weighted_mean(losses, spread).sum()


class ProjectionHead(nn.Module):
    """Projection head: the small network between features and the contrastive loss, discarded after training.

    `Linear -> norm -> SiLU -> Linear`. A map `(B, C, H, W)` is flattened first. The loss scales the output to
    length 1 itself.

    Args:
        in_features: width `D` of the vectors, or `C * H * W` of the maps.
        hidden: width of the hidden layer.
        out_features: width of the output.
        norm: builds the norm from its width and `device`, `dtype`. The default treats rows independently;
            `nn.BatchNorm1d`, which the papers use, couples the instances of a batch.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a width is below 1, or the input's width is not `in_features`.

    Source: SimCLR (arXiv 2002.05709), section 4.2; widths 512 and 64 as in TreeVAE's TensorFlow code.

    Examples:
        >>> head = ProjectionHead(in_features=8 * 2 * 2, hidden=16, out_features=4)
        >>> head(torch.rand(3, 8, 2, 2)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        *,
        in_features: int,
        hidden: int = 512,
        out_features: int = 64,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, hidden, out_features) < 1:
            raise ValueError(
                "a projection head needs widths of at least 1; found "
                f"in_features={in_features}, hidden={hidden}, out_features={out_features}"
            )
        self.in_features, self.hidden, self.out_features = in_features, hidden, out_features
        self.network = nn.Sequential(
            nn.Linear(in_features, hidden, device=device, dtype=dtype),
            norm(hidden, device=device, dtype=dtype),
            nn.SiLU(),
            nn.Linear(hidden, out_features, device=device, dtype=dtype),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Project features `(B, D)` or `(B, C, H, W)` to `(B, out_features)`."""
        rows = features.flatten(1)
        if rows.shape[1] != self.in_features:
            raise ValueError(
                f"expected {self.in_features} features per row (for maps: channels * height * width); found "
                f"{rows.shape[1]} in an input of shape {tuple(features.shape)}; build the head with "
                f"in_features={rows.shape[1]}"
            )
        projected: Tensor = self.network(rows)
        return projected

    def extra_repr(self) -> str:
        """Return the widths, for `print(head)`."""
        return f"in_features={self.in_features}, hidden={self.hidden}, out_features={self.out_features}"


def _directions(rows: Tensor) -> Tensor:
    """Scale rows to length 1; rows of zeros stay, with the gradient of the identity.

    `F.normalize` divides rows of zeros by its epsilon instead, and their gradient becomes 1e12 times too large.
    """
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.masked_fill(lengths == 0, 1)


def _item_losses(units: Tensor, temperature: float) -> Tensor:
    """Compute each item's loss: unit vectors `(..., 2B, D)`, first views before second views, to `(..., 2B)`."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}; the usual values are 0.1 to 1")
    items = units.shape[-2]
    similarity = units @ units.mT / temperature
    itself = torch.eye(items, dtype=torch.bool, device=units.device)
    others = similarity.masked_fill(itself, -torch.inf).logsumexp(-1)
    partner = units.roll(items // 2, dims=-2)
    return others - (units * partner).sum(-1) / temperature


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over the items, the first axis: one number per router, 0 where the weights add up to 0."""
    if weights is None:
        return losses.mean(0)
    total = weights.sum(0)
    # Where all weights are 0 the sum is 0 already; only the division by 0 must be avoided.
    return (weights * losses).sum(0) / total.masked_fill(total == 0, 1)


def _weights_per_item(weights: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return weights per pair `shape`, or per item `(2, *shape)`, as a column of `2B` in the order of the items."""
    if weights is None:
        return None
    if weights.shape not in (shape, (2, *shape)):
        raise ValueError(
            f"expected weights of shape {tuple(shape)}, one per pair, or {(2, *shape)}, one per item; found "
            f"{tuple(weights.shape)}"
        )
    return _at_least_float32(weights).expand(2, *shape).flatten(0, 1)


def _check_views(first: Tensor, second: Tensor, *, ndims: tuple[int, ...], expected: str) -> None:
    """Raise unless the views are, row by row, the two sides of at least one pair."""
    if first.shape != second.shape or first.ndim not in ndims or len(first) == 0:
        raise ValueError(
            f"expected two views of the same shape {expected} with at least one pair; found "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(f"expected float views; found {first.dtype} and {second.dtype}; call .float()")


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32: it has too few digits for a sum of exponentials."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

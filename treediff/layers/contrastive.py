"""Contrastive losses: two views of one image should look alike to the encoder and turn alike at every router.

TreeVAE (arXiv 2306.08984) adds both to the negative ELBO on colour images, times 100 in its reference code:
`nt_xent` on the projected features of every bottom-up level, averaged over levels, and `decision_nt_xent` on
the routers, summed over routers.

Letters: `B` pairs of views, so `2B` items; `D` feature width; `I` routed nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ProjectionHead", "decision_nt_xent", "nt_xent"]


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.5, weights: Tensor | None = None) -> Tensor:
    r"""Normalised, temperature-scaled cross-entropy between the two views of every image (SimCLR).

    With `u` the rows of `[first; second]` scaled to length 1, `s_ij = u_i . u_j / temperature`, and `p(i)`
    the other view of item `i`:

        loss_i = log sum_{j != i} exp(s_ij) - s_{i p(i)}        loss = sum_i w_i loss_i / sum_i w_i

    The sum in the denominator runs over all other `2B - 1` items. A weight of 0 takes an item out of the
    *mean* only: it stays in the denominators of the others, and gradient still reaches it through them. If
    all weights are 0 the loss is 0. A row of zeros has no direction and counts as orthogonal to every other.

    Computed in float32 at least, under autocast too. Symmetric in its two views.

    Args:
        first: `(B, D)` features of the first views, of any length.
        second: `(B, D)` features of the second views, row by row of the same images.
        temperature: above 0; the smaller, the more the most similar of the others count.
        weights: none below 0; `(B,)` for one weight per pair, `(2, B)` for one per item, None for equal ones.

    Returns:
        The loss in nats, a scalar; `log(2B - 1)` when all items look the same, and 0 for a single pair.

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
    r"""NT-Xent on routing decisions: both views of an image should take one turn, other images the other.

    At one router a sample is the vector `(s, 1 - s) / |(s, 1 - s)|` with `s = sigmoid(logit)`; the loss is
    then that of `nt_xent`. With a column per router the losses of the columns are added up.

    The weights are the probabilities of reaching the router. They say who counts, not what to learn, so no
    gradient flows into them. A router that nobody reaches (all weights 0) adds 0.

    Memory grows as `I (2B)^2`: all routers are computed at once.

    Args:
        logits_first: `(B,)` for one router, or `(B, I)` for all of them, from the first views.
        logits_second: the same for the second views.
        weights: none below 0; of the logits' shape for one weight per pair, `(2, B)` or `(2, B, I)` for one
            per item (`torch.stack([reach_first, reach_second])`, as TreeVAE has it), None for equal ones.
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
    """The small network between features and the contrastive loss; thrown away when training is over.

    `Linear -> norm -> SiLU -> Linear`. A map `(B, C, H, W)` is flattened first. The loss scales the output to
    length 1 itself.

    Args:
        in_features: width `D` of the vectors, or `C * H * W` of the maps.
        hidden: width of the hidden layer.
        out_features: width of the output.
        norm: makes the norm from its width and `device`, `dtype`. The default treats rows independently;
            `nn.BatchNorm1d`, as the papers have it, ties the instances of a batch together.
        device: where the parameters live.
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
        """The widths, for `print(head)`."""
        return f"in_features={self.in_features}, hidden={self.hidden}, out_features={self.out_features}"


def _directions(rows: Tensor) -> Tensor:
    """Rows scaled to length 1; rows of zeros stay, with the gradient of the identity.

    `F.normalize` divides them by its epsilon instead, and their gradient becomes 1e12 times too large.
    """
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.masked_fill(lengths == 0, 1)


def _item_losses(units: Tensor, temperature: float) -> Tensor:
    """Every item's loss: unit vectors `(..., 2B, D)`, first views before second ones, to `(..., 2B)`."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}; the usual values are 0.1 to 1")
    items = units.shape[-2]
    similarity = units @ units.mT / temperature
    itself = torch.eye(items, dtype=torch.bool, device=units.device)
    others = similarity.masked_fill(itself, -torch.inf).logsumexp(-1)
    partner = units.roll(items // 2, dims=-2)
    return others - (units * partner).sum(-1) / temperature


def _weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the items, the first axis, leaving one number per router; 0 where the weights add up to 0."""
    if weights is None:
        return losses.mean(0)
    total = weights.sum(0)
    # Where nobody has weight the sum is 0 already; only the division by 0 must not happen.
    return (weights * losses).sum(0) / total.masked_fill(total == 0, 1)


def _weights_per_item(weights: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Weights per pair `shape`, or per item `(2, *shape)`, as a column of `2B` in the order of the items."""
    if weights is None:
        return None
    if weights.shape not in (shape, (2, *shape)):
        raise ValueError(
            f"expected weights of shape {tuple(shape)}, one per pair, or {(2, *shape)}, one per item; found "
            f"{tuple(weights.shape)}"
        )
    return _at_least_float32(weights).expand(2, *shape).flatten(0, 1)


def _check_views(first: Tensor, second: Tensor, *, ndims: tuple[int, ...], expected: str) -> None:
    """Refuse views that are not row by row the two sides of at least one pair."""
    if first.shape != second.shape or first.ndim not in ndims or len(first) == 0:
        raise ValueError(
            f"expected two views of the same shape {expected} with at least one pair; found "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    if not (first.is_floating_point() and second.is_floating_point()):
        raise TypeError(f"expected float views; found {first.dtype} and {second.dtype}; call .float()")


def _at_least_float32(x: Tensor) -> Tensor:
    """Half precision has too few digits for a sum of exponentials."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

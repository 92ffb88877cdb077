"""Contrastive terms of a TreeVAE: two views of an image should have similar features and take the same turns.

TreeVAE (arXiv 2306.08984) adds the terms to the negative ELBO on colour images, where reconstruction alone groups
images by their background. The losses themselves are in `treediff.layers.contrastive`; this module applies the losses
to the ladder and the routers.

Letters: `B` pairs of views, so `2B` rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from treediff.core.distributed import ALONE, World
from treediff.core.modes import evaluating
from treediff.layers.contrastive import ProjectionHead, decision_nt_xent, nt_xent
from treediff.layers.init import initialize
from treediff.tree.visits import Visits

if TYPE_CHECKING:
    from treediff.treevae.model import TreeVAE

__all__ = ["TreeContrast"]


class TreeContrast(nn.Module):
    """Contrastive loss of a TreeVAE: a term on the features of the ladder and a term on the routers' decisions.

    `weight * mean over levels of NT-Xent(features) + decision_weight * sum over routers of NT-Xent(decisions)`

    Features pass through a projection head per level of the ladder; features and heads are discarded after training. A
    router's term weights each view by the probability with which the view reaches the router.

    Give the module to `Stage.loss` together with a second view of the batch, and train its parameters along with the
    stage's.

    Args:
        model: the TreeVAE whose ladder is projected; only shapes are read.
        weight: of the term on features against the negative ELBO in nats; 100 in TreeVAE.
        decision_weight: of the term on decisions, `weight` by default as in TreeVAE. The term prefers halves: where
            clusters differ in size it can move a good cut, and 0 leaves routers to the ELBO.
        temperature: of the term on features; the temperature of the term on decisions is 1.
        hidden: width of the heads' hidden layer.
        out_features: width of the heads' output.
        generator: source of the initial weights.
        world: the processes that share a batch; the loss contrasts pairs of all processes.

    Raises:
        ValueError: if a weight is negative or not finite, or a width is below 1.

    Source: TreeVAE (arXiv 2306.08984), section on contrastive losses, with the weights of its reference implementation.

    Examples:
        >>> from treediff import TreeTopology, TreeVAE
        >>> model = TreeVAE.for_images(size=8, channels=3, topology=TreeTopology.balanced(1))
        >>> contrast = TreeContrast(model)
        >>> ladder = model.features(torch.rand(6, 3, 8, 8))
        >>> contrast(ladder, model.route(ladder)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: TreeVAE,
        *,
        weight: float = 100.0,
        decision_weight: float | None = None,
        temperature: float = 0.5,
        hidden: int = 512,
        out_features: int = 64,
        generator: torch.Generator | None = None,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.weight, self.temperature, self.world = weight, temperature, world
        self.decision_weight = weight if decision_weight is None else decision_weight
        for name in ("weight", "decision_weight"):
            if not 0 <= (found := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, found {found}")
        with evaluating(model), torch.no_grad():
            ladder = model.features(torch.zeros(1, *model.inputs, device=model.device, dtype=model.dtype))
        with torch.device("meta"):
            heads = [ProjectionHead(in_features=d[0].numel(), hidden=hidden, out_features=out_features) for d in ladder]
        self.heads = nn.ModuleList(heads).to_empty(device=model.device).to(model.dtype)
        initialize(self.heads, generator=generator)

    def extra_repr(self) -> str:
        """Return weights and temperature, for `print(contrast)`."""
        return f"weight={self.weight}, decision_weight={self.decision_weight}, temperature={self.temperature}"

    def forward(self, ladder: Tensor, visits: Visits, *, splits: Collection[int] = ()) -> Tensor:
        """Return the weighted sum of both terms, a scalar in nats.

        Args:
            ladder: `model.features(x)` for `2B` rows, the first views before the second views.
            visits: `model.route(ladder)`, without a threshold.
            splits: ids of routed nodes whose decisions alone count, without the term on features: the loss of a stage
                that trains only these decisions.

        Raises:
            ValueError: if the number of rows is odd, `visits` belongs to other rows, or decisions count and a threshold
                left out some of them.
        """
        rows = len(ladder[0])
        if rows % 2 or visits.batch != rows:
            raise ValueError(
                "expected the first views and then the second views of the same images, as torch.cat((first, second)), "
                f"and the visits of these rows; found {rows} rows and visits of {visits.batch}"
            )
        if not rows:
            return ladder[0].sum()
        total = ladder[0].new_zeros(())
        if self.decision_weight:
            total = self.decision_weight * self._decisions(visits, splits)
        if not splits:
            pairs = [self._pairs(head(d)) for head, d in zip(self.heads, ladder, strict=True)]
            losses = [nt_xent(first, second, temperature=self.temperature) for first, second in pairs]
            total = total + self.weight * torch.stack(losses).mean()
        return total

    def _decisions(self, visits: Visits, splits: Collection[int]) -> Tensor:
        plan, routed = visits.plan, visits.routed
        if not visits.dense:
            raise ValueError(
                "decisions are compared among all rows, so every row must visit every node; found "
                f"{visits.starts[-1]} visits of {visits.batch} rows to {len(plan.nodes)} nodes; leave out threshold="
            )
        columns = plan.ids(plan.routed)
        logits, reach = (
            visits.table(routed, values, plan.routed_rank, len(columns), 0.0)
            for values in (visits.logits, visits.log_reach[routed].exp())
        )
        if splits:
            chosen = [column for column, node in enumerate(columns) if node in splits]
            logits, reach = logits[:, chosen], reach[:, chosen]
        return decision_nt_xent(*self._pairs(logits), weights=torch.stack(self._pairs(reach)))

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and the second views of all processes."""
        first, second = x.chunk(2)
        return self.world.gather(first), self.world.gather(second)

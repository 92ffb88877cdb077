"""Stage of growth: the parameters that train, their rows and their loss, for a custom loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treediff.core.checks import check_positive
from treediff.core.noise import combine_seeds
from treediff.growth.annealing import KLAnnealing
from treediff.treevae.contrast import TreeContrast
from treediff.treevae.model import TreeVAE

__all__ = ["Stage"]


@dataclass
class Stage:
    """One stage of training, for a custom loop.

    A new stage sets `requires_grad` of every parameter: True for the parameters that train, False for all others, and
    for the `frozen` parameters in any case.

    Args:
        model: the model that trains.
        kind: 'initial', 'settle', 'subtree', 'intermediate' or 'final'; see `TreeGrowth`.
        index: number of stages before this stage.
        epochs: number of epochs to train.
        rows: `(n,)` row indices of the data to train on.
        annealing: the weight of the KL terms over the stage's epochs.
        splits: ids of the leaves that were split, all of one depth, in a settle or subtree stage.
        above: rows reach one of these nodes with at least this probability.
        threshold: nodes that an image reaches with less probability are visited at random. These visits are weighted
            up, so the expected loss is unchanged; 0 visits all. Contrastive terms always count all rows.
        seed: seed of the order of rows.
        frozen: names of parameters that no stage trains, such as the parameters of a pretrained encoder.
    """

    model: TreeVAE
    kind: str
    index: int
    epochs: int
    rows: Tensor
    annealing: KLAnnealing
    splits: tuple[int, ...] = ()
    above: float = 0.0
    threshold: float = 0.0
    seed: int = 0
    frozen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        trained = {id(p) for p in self.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
            if not parameter.requires_grad:
                # A gradient left by the last stage would still move the parameter, in an optimiser of all parameters.
                parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train and are not frozen: all, or those in the routers and children of the splits.

        A settle stage leaves out the posterior router, so that the first cut stays.
        """
        model = self.model
        frozen = {id(weight) for name, weight in model.named_parameters() if name in self.frozen}
        if not self.splits:
            return [weight for weight in model.parameters() if id(weight) not in frozen]
        children = [child for split in self.splits for child in model.topology.children(split)]
        banks = (model.banks.heads, model.banks.transitions, model.banks.decoders)
        routers = [model.banks.prior_routers.weights_of(split) for split in self.splits]
        if self.kind != "settle":
            routers += [model.banks.posterior_routers.weights_of(split) for split in self.splits]
        trained = [*routers, *(bank.weights_of(child) for bank in banks for child in children)]
        return [weight for weight in trained if id(weight) not in frozen]

    def kl_weight(self, epoch: float) -> float:
        """Return the weight of the KL terms at an epoch of this stage, counted from 0; fractions are allowed."""
        return self.annealing(epoch)

    def batches(self, epoch: int, batch_size: int) -> Iterator[Tensor]:
        """Yield index tensors that cover `rows` once, in an order that depends on the seed, the stage and the epoch."""
        check_positive(batch_size=batch_size)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, self.index, epoch))
        for picked in torch.randperm(len(self.rows), generator=generator).split(batch_size):
            yield self.rows[picked]

    def loss(
        self,
        x: Tensor,
        kl_weight: float = 1.0,
        *,
        view: Tensor | None = None,
        contrast: TreeContrast | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the scalar to minimise for a batch of observations.

        In a settle or subtree stage only the paths to the split nodes and their children are computed. Only the terms
        of the children and of the splits' decisions count, each weighted by the probability of reaching its node.

        Args:
            x: `(B, *inputs)`, what is reconstructed.
            kl_weight: weight of the KL terms.
            view: `(B, *inputs)`, a changed copy of each observation, which only the encoder and the routers read.
                TreeVAE reconstructs both views: its loss is the mean of two losses, one with `x` and `view` exchanged.
            contrast: the terms that compare `x` and `view`; in a settle or subtree stage only the terms of the
                splits' routers.
            generator: source of the noise of the latents and of the random visits below the threshold.

        Raises:
            ValueError: if `x` or `view` is not what the model takes, their shapes differ, or only one of `view` and
                `contrast` is given.
        """
        model, tree = self.model, self.model.topology
        computed = {node for split in self.splits for node in (*tree.path(split), *tree.children(split))}
        nodes = tuple(node for node in tree.ids if node in computed) or None
        model.check(x)
        if (view is None) != (contrast is None) or (view is not None and view.shape != x.shape):
            found = "none" if view is None else tuple(view.shape)
            raise ValueError(
                f"view and contrast go together, and a view has the shape of x, {tuple(x.shape)}; found a view of "
                f"{found} and {'no ' if contrast is None else 'a '}contrast"
            )
        if view is not None:
            model.check(view)
        both = model.features(x if view is None else torch.cat([x, view]))
        ladder = both[:, : len(x)]
        chance = torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device) if self.threshold else None
        visits = model.route(ladder, nodes=nodes, threshold=self.threshold, chance=chance)
        posterior = model.latents(ladder, visits, generator=generator)
        depth = tree.depth(self.splits[0]) if self.splits else None
        bound = posterior.bound(model.leaf_log_likelihood(posterior, x), from_depth=depth)
        loss = bound.loss(kl_weight)
        if contrast is None:
            return loss
        # Every row is compared with all others at every router, so every router runs on all rows, without a threshold.
        extra: Tensor = contrast(both, model.route(both, nodes=nodes), splits=self.splits)
        return loss + extra

"""Small growths, a training loop, and the tree's probabilities worked out node by node."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from worlds import seeded

from treediff import Stage, TreeGrowth, TreeTopology, TreeVAE
from treediff.growth import KLAnnealing

# Every setting is given, so that a better default changes no test.
SETTINGS: dict[str, Any] = {
    "max_leaves": 4,
    "epochs": 1,
    "intermediate_every": 2,
    "policy": "largest",
    "warm_start": True,
    "min_share": 0.0,
    "min_rows": 8,
    "cut_on": "inputs",
    "augment": None,
    "threshold": 0.0,
    "annealing": KLAnnealing.constant(0.5),
    "initial_annealing": KLAnnealing.constant(1.0),
    "seed": 0,
}


def blobs(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Clusters of the given sizes around corners of a cube, in random order."""
    generator = seeded(seed)
    which = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    which = which[torch.randperm(len(which), generator=generator)]
    corners = torch.tensor([[0, 0, 0], [4, 0, 0], [0, 2, 0], [4, 2, 0], [0, 0, 1], [4, 0, 1]], dtype=torch.float64)
    noise = torch.randn(len(which), 3, generator=generator, dtype=torch.float64)
    return (corners[which] - torch.tensor([2.0, 1.0, 0.5]) + 0.3 * noise).to(dtype)


def small(
    tree: TreeTopology | None = None,
    *,
    seed: int = 0,
    width: int = 8,
    max_depth: int = 4,
    dtype: torch.dtype = torch.float32,
) -> TreeVAE:
    """A model for `blobs`."""
    tree = TreeTopology.balanced(1) if tree is None else tree
    return TreeVAE.for_vectors(
        features=3, latent=2, width=width, max_depth=max_depth, topology=tree, generator=seeded(seed), dtype=dtype
    )


def growth_of(model: TreeVAE, **settings: Any) -> TreeGrowth:  # noqa: ANN401
    return TreeGrowth(model, **{**SETTINGS, **settings})


def train(stage: Stage, x: Tensor, *, batch_size: int = 64) -> None:
    """A user's loop."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.01, weight_decay=0.1)
    generator = seeded(stage.index)
    for epoch in range(stage.epochs):
        for rows in stage.batches(epoch, batch_size):
            loss = stage.loss(x[rows], stage.kl_weight(epoch), generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def weights(model: TreeVAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def reach(model: TreeVAE, x: Tensor, node: int) -> Tensor:
    """`P(node | x)`, from the routers on the way there, as plain modules."""
    ladder, tree, total = model.features(x), model.topology, torch.ones(len(x), dtype=torch.float64)
    path = tree.path(node)
    for above, below in pairwise(path):
        children = tree.children(above)
        if len(children) == 2:
            left = torch.sigmoid(model.banks.posterior_routers.module(above)(ladder[tree.depth(above)])).double()
            total = total * (left if below == children[0] else 1 - left)
    return total


@torch.no_grad()
def send_left(model: TreeVAE, node: int, logit: float) -> None:
    """Let a router say the same of everything."""
    weight = model.banks.posterior_routers.named_weights(node)
    weight["logit.weight"].zero_()
    weight["logit.bias"].fill_(logit)

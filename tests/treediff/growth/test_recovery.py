"""Growth finds a tree that is known: clusters nearly as good as Bayes' rule gives them, and the hierarchy itself."""

from __future__ import annotations

import torch
from sklearn.metrics import normalized_mutual_info_score as nmi
from torch import Tensor
from worlds import seeded

from treediff import Stage, TreeGrowth, TreeTopology, TreeVAE
from treediff.growth import KLAnnealing
from treediff.testing import GaussianTree, same_hierarchy

# Five leaves, two of them deeper than the rest.
TREE = TreeTopology.balanced(2).split(3)


def train(stage: Stage, x: Tensor, batch_size: int = 64, learning_rate: float = 5e-3) -> None:
    optimizer = torch.optim.Adam(stage.parameters(), lr=learning_rate)
    steps = stage.epochs * -(-len(stage.rows) // batch_size)
    # A full first step of Adam would shake a whole tree whose parts have just been trained.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    generator = seeded(stage.index)
    for epoch in range(stage.epochs):
        for rows in stage.batches(epoch, batch_size):
            loss = stage.loss(x[rows], stage.kl_weight(epoch), generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def test_growth_recovers_a_tree_of_gaussians() -> None:
    seed = 10  # here the largest leaf always has more below it, as the policy "largest" takes for granted
    known = GaussianTree.random(TREE, latent=3, features=5, separation=8.0, generator=seeded(seed))
    generator = seeded(100 + seed)
    (x, _), (unseen, leaf) = (known.sample(n, generator=generator) for n in (1200, 2000))
    # The decoders' variance begins at 1 and moves by a learning rate a step. Were the clusters closer than that,
    # leaves that share one would be the better bound for most of so short a training.
    mean, scale = x.mean(0), x.std() / 6
    x, scaled = ((rows - mean).div(scale).float() for rows in (x, unseen))
    model = TreeVAE.for_vectors(features=5, latent=3, width=32, max_depth=3, generator=seeded(seed))
    growth = TreeGrowth(
        model,
        max_leaves=len(TREE.leaves),
        epochs=10,
        intermediate_epochs=5,
        final_epochs=5,
        intermediate_every=3,
        policy="largest",
        warm_start=True,
        min_share=0.01,
        min_rows=32,
        threshold=1e-3,
        annealing=KLAnnealing.constant(1.0),
        initial_annealing=KLAnnealing.constant(1.0),
        final_annealing=KLAnnealing.constant(1.0),
        seed=seed,
    )
    for stage in growth.stages(x):
        train(stage, x)

    found = model.cluster(scaled)
    bayes = torch.tensor(TREE.leaves)[known.leaf_log_posterior(unseen).argmax(1)]
    best = nmi(leaf, bayes)
    assert best > 0.99  # the world can be told apart
    assert nmi(leaf, found) >= 0.95 * best
    majority = {node: int(found[leaf == node].mode().values) for node in TREE.leaves}
    assert same_hierarchy(TREE, model.topology, majority)

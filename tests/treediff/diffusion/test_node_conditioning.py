"""Told an inner node, a network learns the mixture of its leaves, with weights that depend on the noisy image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import seeded

from treediff import TreeCondition, TreeTopology
from treediff.diffusion import CosineSchedule, NodeEmbedding, NodeIndex
from treediff.diffusion.unet_blocks import TimestepEmbedding
from treediff.testing import GaussianTree

# Leaf 1 right under the root, 5 and 6 three steps down: shares of nodes must not depend on how deep leaves lie.
TREE = TreeTopology.balanced(1).split(2).split(3)
SCHEDULE = CosineSchedule()
WIDTH = 64
TIMES = (0.3, 0.5, 0.7)


def known_world() -> GaussianTree:
    """Leaves that overlap once there is noise, so that where `x_t` lies says something of the leaf, but not all."""
    nothing, eye = torch.zeros(2), torch.eye(2)
    places = {1: (-1.5, 0.2), 4: (0.4, 1.6), 5: (0.2, -1.4), 6: (1.7, -0.8)}
    return GaussianTree(
        topology=TREE,
        weight=dict.fromkeys(TREE.ids[1:], 0 * eye),
        bias=dict.fromkeys(TREE.ids[1:], nothing),
        logvar=dict.fromkeys(TREE.ids[1:], nothing),
        branch_logit={0: 0.3, 2: -0.6, 3: 0.5},
        decoder_weight={leaf: (0.3 + 0.03 * leaf) * eye for leaf in TREE.leaves},
        decoder_bias={leaf: torch.tensor(place) for leaf, place in places.items()},
        variance=0.02,
    )


class Network(nn.Module):
    """`x_t`, time and node to the estimate of `x_0`."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.time = NodeEmbedding(TREE, WIDTH), TimestepEmbedding(WIDTH, 16)
        self.inputs = nn.Linear(2, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, 2)

    def forward(self, x_t: Tensor, t: Tensor, condition: TreeCondition) -> Tensor:
        told = self.node(condition).vector + self.time(t)
        h = self.inputs(x_t)
        for layer in self.layers:
            h = h + nn.functional.silu(layer(h + told))
        result: Tensor = self.out(h)
        return result


def train(known: GaussianTree, steps: int = 2000, batch: int = 512) -> Network:
    """A plain loop over fresh data: each row is told a node on the path to its leaf."""
    generator, index = seeded(0), NodeIndex(TREE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data, leaves = known.sample(200_000, generator=generator)
    everywhere = torch.ones(batch, dtype=torch.bool)
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,), generator=generator)
        x, t = data[rows].float(), torch.rand(batch, generator=generator) * 0.8 + 0.1
        told = TreeCondition(leaves[rows]).coarser(index, everywhere, torch.rand(batch, generator=generator))
        x_t = SCHEDULE.add_noise(x, torch.randn(x.shape, generator=generator), t)
        loss = (network(x_t, t, told) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network


@pytest.fixture(scope="module")
def trained() -> tuple[GaussianTree, Network]:
    known = known_world()
    return known, train(known)


def noisy(known: GaussianTree, node: int, t: float, n: int = 2000) -> Tensor:
    """Noisy images that pass a node."""
    x, leaf = known.sample(8 * n, generator=seeded(11))
    under = torch.isin(leaf, torch.tensor(known.topology.leaves_under(node)))
    x = x[under][:n]
    return SCHEDULE.add_noise(x, torch.randn(x.shape, generator=seeded(12), dtype=torch.float64), t)


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square."""
    return float((found - exact).square().sum(1).mean().sqrt())


@torch.no_grad()
def estimate(network: Network, node: int, x_t: Tensor, t: float) -> Tensor:
    found: Tensor = network(x_t.float(), torch.full((len(x_t),), t), TreeCondition.at(node, len(x_t))).double()
    return found


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("node", [2, 3, 0])
def test_an_inner_node_is_the_mixture_of_its_leaves(trained: Any, node: int, t: float) -> None:  # noqa: ANN401
    """Far closer to `E[x_0 | x_t, node]` than any average of the leaves' estimates with fixed weights is."""
    known, network = trained
    x_t = noisy(known, node, t)
    exact = known.denoiser(SCHEDULE, node)(x_t, t)
    found = estimate(network, node, x_t, t)
    leaves = TREE.leaves_under(node)
    prior = known.log_prior()[[TREE.leaves.index(leaf) for leaf in leaves]].softmax(0)
    columns = torch.stack([known.denoiser(SCHEDULE, leaf)(x_t, t) for leaf in leaves], 2)
    # The weights of the prior, and the best fixed ones there are.
    best = torch.linalg.lstsq(columns.flatten(0, 1), exact.flatten()).solution
    for weights in (prior, best):
        assert error(found, exact) < 0.35 * error(columns @ weights, exact), (error(found, exact), weights)
    assert error(found, exact) < 0.2 * float(exact.std(0).norm())


@pytest.mark.parametrize("t", TIMES)
def test_the_root_is_the_unconditional_estimate(trained: Any, t: float) -> None:  # noqa: ANN401
    known, network = trained
    x_t = noisy(known, 0, t)
    exact = known.denoiser(SCHEDULE)(x_t, t)
    found = estimate(network, 0, x_t, t)
    assert error(found, exact) < 0.2 * float(exact.std(0).norm())
    for other in (1, 2, 5):  # and nobody else's
        assert error(estimate(network, other, x_t, t), exact) > 3 * error(found, exact)


@pytest.mark.parametrize("t", TIMES)
def test_a_leaf_is_itself(trained: Any, t: float) -> None:  # noqa: ANN401
    known, network = trained
    for leaf in TREE.leaves:
        x_t = noisy(known, leaf, t)
        exact = known.denoiser(SCHEDULE, leaf)(x_t, t)
        spread = float(known.denoiser(SCHEDULE)(noisy(known, 0, t), t).std(0).norm())
        assert error(estimate(network, leaf, x_t, t), exact) < 0.1 * spread


def test_shares_of_leaves_do_not_depend_on_their_depth(trained: Any) -> None:  # noqa: ANN401
    """At much noise the root's estimate is near the mean of all data, which weighs leaves by `P(leaf)`."""
    known, network = trained
    x_t = noisy(known, 0, 0.9)
    means, prior = known.mixture.means, known.log_prior().exp()
    by_depth = prior / torch.tensor([len(TREE.path(leaf)) for leaf in TREE.leaves])
    right, wrong = prior @ means, (by_depth / by_depth.sum()) @ means
    found = estimate(network, 0, x_t, 0.9).mean(0)
    assert torch.dist(found, right) < 0.3 * torch.dist(found, wrong)

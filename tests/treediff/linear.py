"""A TreeVAE whose generative model is a GaussianTree, so that `log p(x)` is known; with posteriors good and bad."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.layers import GaussianLikelihood
from treediff.testing import GaussianTree


class Affine(nn.Linear):
    """A linear map in float64, with weights that may be given."""

    def __init__(self, inputs: int, outputs: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            if weight is not None:
                self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)


class Decision(nn.Sequential):
    """A linear router."""

    def __init__(self, inputs: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__(Affine(inputs, 1, weight, bias), nn.Flatten(0))


class ExactDecision(nn.Module):
    """The log-odds of left given `x`, from the mixture that the world is; weights say at which node, and how sure."""

    def __init__(self, known: GaussianTree, node: int = -1) -> None:
        super().__init__()
        self.node = nn.Parameter(torch.tensor([float(node)], dtype=torch.float64))
        self.sureness = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.known = (known,)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.constant_(self.node, -1.0)
        nn.init.constant_(self.sureness, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        (known,) = self.known
        if self.node < 0:
            return self.sureness * x.sum(1)  # before the weights say at which node
        posterior, tree = known.leaf_log_posterior(x), known.topology
        sides = [
            [k for k, leaf in enumerate(tree.leaves) if leaf in tree.leaves_under(child)]
            for child in tree.children(int(self.node))
        ]
        left, right = (posterior[:, columns].logsumexp(1) for columns in sides)
        return self.sureness * (left - right)


def linear_model(known: GaussianTree, *, exact_routers: bool = False, seed: int = 0) -> TreeVAE:
    """The world's own prior and decoders; heads and posterior routers random, of moderate size."""
    tree, d, f = known.topology, known.latent, known.features
    model = TreeVAE(
        topology=tree,
        encoder=nn.Identity(),
        bottom_up=[nn.Identity() for _ in range(tree.max_depth)],
        head=Affine(f, 2 * d),
        transition=Affine(d, 2 * d),
        posterior_router=ExactDecision(known) if exact_routers else Decision(f),
        prior_router=Decision(d),
        decoder=Affine(d, f),
        likelihood=GaussianLikelihood(variance=known.variance, data_range=None, dtype=torch.float64),
        latent=(d,),
        inputs=(f,),
        generator=seeded(seed),
    )
    for node in tree.ids[1:]:
        weight = torch.cat([known.weight[node], torch.zeros(d, d)])
        model.banks.transitions.assign(
            node, Affine(d, 2 * d, weight, torch.cat([known.bias[node], known.logvar[node]]))
        )
    for node in tree.routed:
        model.banks.prior_routers.assign(node, Decision(d, torch.zeros(1, d), known.branch_logit[node]))
        if exact_routers:
            model.banks.posterior_routers.assign(node, ExactDecision(known, node))
    for leaf in tree.leaves:
        model.banks.decoders.assign(leaf, Affine(d, f, known.decoder_weight[leaf], known.decoder_bias[leaf]))
    return model


def solvable_world(tree: TreeTopology, seed: int = 0) -> GaussianTree:
    """A world whose posterior a TreeVAE can hold: scalar latents, and after a decision a latent starts anew.

    A TreeVAE's posterior of a latent does not know which way the path will go on, so the true one must not either.
    """
    generator = seeded(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    below = tree.ids[1:]
    return GaussianTree(
        topology=tree,
        weight={n: draw(1, 1) * (tree.parent(n) not in tree.routed) for n in below},
        bias={n: draw(1) for n in below},
        logvar={n: 0.5 * draw(1) for n in below},
        branch_logit={n: draw().item() for n in tree.routed},
        decoder_weight={leaf: draw(3, 1) for leaf in tree.leaves},
        decoder_bias={leaf: draw(3) for leaf in tree.leaves},
        variance=0.3,
    )


def exact_model(known: GaussianTree) -> TreeVAE:
    """The linear model of a `solvable_world` with the true posterior in its heads and routers."""
    model, tree, f = linear_model(known, exact_routers=True), known.topology, known.features
    for leaf in tree.leaves:
        # What x says of the latent alone: a Gaussian in z with mean `m @ x + c` and variance `v`, from least squares.
        w = known.decoder_weight[leaf]
        m = w.T / w.square().sum()
        c, v = -(m @ known.decoder_bias[leaf]), known.variance / w.square().sum()
        for node in reversed(tree.path(leaf)):
            if len(tree.children(node)) == 2:
                break
            _say(model, node, m, c, v)
            if node != tree.root and tree.parent(node) not in tree.routed:
                a = known.weight[node].squeeze()
                m, c, v = m / a, (c - known.bias[node]) / a, (v + known.logvar[node].exp().squeeze()) / a**2
    for node in tree.ids:
        if any(len(tree.children(below)) == 2 for below in tree.ids if node in tree.path(below)):
            # x says nothing of this latent.
            _say(model, node, torch.zeros(1, f).double(), torch.zeros(1).double(), torch.tensor(1e300).double())
    return model


def spoil(model: TreeVAE) -> TreeVAE:
    """Make a true posterior wrong, by little: wider, shifted and less sure, so that importance weights stay tame."""
    with torch.no_grad():
        for node in model.topology:
            model.banks.heads.named_weights(node)["bias"].add_(0.3)
        for node in model.topology.routed:
            model.banks.posterior_routers.named_weights(node)["sureness"].fill_(0.7)
    return model


def _say(model: TreeVAE, node: int, m: Tensor, c: Tensor, v: Tensor) -> None:
    """Set a head to a Gaussian message; the root's is merged with its prior, as a TreeVAE does not do that itself."""
    if node == model.topology.root:
        m, c, v = m / (1 + v), c / (1 + v), v / (1 + v)
        v = torch.where(v.isnan(), 1.0, v)
    bias = torch.cat([c, torch.full((1,), math.log(v), dtype=torch.float64)])
    f = m.shape[1]
    model.banks.heads.assign(node, Affine(f, 2, torch.cat([m, torch.zeros(1, f).double()]), bias))

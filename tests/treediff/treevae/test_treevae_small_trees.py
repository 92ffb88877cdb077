"""Trees without decisions are known models, written out here: a lone root is a VAE, a chain a LadderVAE."""

from __future__ import annotations

import math

import pytest
import torch
from models import build, noise_for, observations
from torch import Tensor, nn
from torch.nn import functional as F

from treediff import ELBO, TreeTopology, TreeVAE


def bernoulli_loss(logits: Tensor, x: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return -(x * torch.log(p) + (1 - x) * torch.log1p(-p)).flatten(1).sum(1)


def gaussian_loss(mean: Tensor, x: Tensor, variance: float) -> Tensor:
    return ((x - mean) ** 2 / (2 * variance) + 0.5 * math.log(2 * math.pi * variance)).flatten(1).sum(1)


def kl(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    terms = (var_p / var_q).log() + (var_q + (mean_q - mean_p) ** 2) / var_p - 1
    return 0.5 * terms.flatten(1).sum(1)


def gaussian(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, from a network whose last layer takes the logarithm: that is left out."""
    for name, layer in module.named_children():
        x = x if name == "logvar" else layer(x)
    mean, raw = x.chunk(2, 1)
    return mean, F.softplus(raw)


def loss_of(model: TreeVAE, kind: str, output: Tensor, x: Tensor) -> Tensor:
    return bernoulli_loss(output, x) if kind in ("mlp", "maps") else gaussian_loss(output, x, 0.5)


def compare(found: ELBO, reconstruction: Tensor, kl_root: Tensor, kl_nodes: Tensor) -> None:
    torch.testing.assert_close(found.reconstruction, reconstruction, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.kl_root, kl_root, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.kl_nodes, kl_nodes, rtol=1e-9, atol=1e-9)
    assert not found.kl_decisions.any()


@pytest.mark.parametrize("kind", ["mlp", "conv", "maps"])
def test_a_lone_root_is_a_vae(kind: str) -> None:
    model = build(TreeTopology.balanced(0), kind)
    x, noise = observations(model, 4), noise_for(model, 4)
    d = model.encoder(x)
    for block in model.bottom_up:
        d = block(d)
    mean, variance = gaussian(model.banks.heads.module(0), d)
    z = mean + variance.sqrt() * noise[:, 0]
    reconstruction = loss_of(model, kind, model.banks.decoders.module(0)(z), x)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    compare(model.elbo(x, noise=noise), reconstruction, kl(mean, variance, zero, one), torch.zeros(4).double())


@pytest.mark.parametrize("kind", ["mlp", "conv", "maps"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_chain_is_a_laddervae(kind: str, depth: int) -> None:
    model = build(TreeTopology.chain(depth), kind)
    x, noise = observations(model, 4), noise_for(model, 4)
    bottom_up = [model.encoder(x)]
    for block in model.bottom_up:
        bottom_up.append(block(bottom_up[-1]))
    # The ladder has four steps here. The root reads its far end, whatever the depth of the tree.
    ladder = bottom_up[::-1][: depth + 1]

    z, total, kl_root = torch.zeros(()), torch.zeros(4).double(), torch.zeros(())
    for step, d in enumerate(ladder):
        mean_hat, var_hat = gaussian(model.banks.heads.module(step), d)
        if step == 0:
            mean, variance = mean_hat, var_hat
            kl_root = kl(mean, variance, torch.zeros_like(mean), torch.ones_like(mean))
        else:
            mean_p, var_p = gaussian(model.banks.transitions.module(step), z)
            variance = 1 / (1 / var_hat + 1 / var_p)
            mean = variance * (mean_hat / var_hat + mean_p / var_p)
            total = total + kl(mean, variance, mean_p, var_p)
        z = mean + variance.sqrt() * noise[:, step]
    compare(model.elbo(x, noise=noise), loss_of(model, kind, model.banks.decoders.module(depth)(z), x), kl_root, total)


@pytest.mark.parametrize("tree", [TreeTopology.balanced(0), TreeTopology.chain(2)], ids=["root", "chain"])
def test_without_decisions_there_is_one_cluster(tree: TreeTopology) -> None:
    model = build(tree)
    x = observations(model, 3)
    assert model.leaf_log_probs(x).tolist() == [[0.0]] * 3
    assert model.cluster(x).tolist() == [tree.leaves[0]] * 3


def test_learned_variance_counts_in_the_reconstruction() -> None:
    model = build(TreeTopology.balanced(0))
    with torch.no_grad():
        model.likelihood.logvar.fill_(math.log(0.2))  # type: ignore[operator,union-attr]
    x, noise = observations(model, 3), noise_for(model, 3)
    z = model.posterior(x, noise=noise).z
    expected = gaussian_loss(model.banks.decoders.module(0)(z), x, 0.2)
    torch.testing.assert_close(model.elbo(x, noise=noise).reconstruction, expected, rtol=1e-9, atol=1e-9)

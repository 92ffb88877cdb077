"""TreeVAE as the plainest loop over nodes: the reference of the batched model, for values and for speed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from treediff.treevae.model import TreeVAE
from treediff.treevae.posterior import ELBO

__all__ = ["NaiveTreeVAE"]

_ROLES = ("heads", "transitions", "posterior_routers", "prior_routers", "decoders")


class NaiveTreeVAE(nn.Module):
    """Copy of a TreeVAE with an ordinary module per node, visited one after the other on the whole batch.

    The copy uses a queue of nodes, plain probabilities and standard deviations instead of logits and log-variances, and
    `torch.distributions`. This is the obvious first implementation, and also the published one. The class shares with
    `TreeVAE` only the code of the layers.

    Args:
        model: the model to copy, weights included.

    Examples:
        >>> model = TreeVAE.for_vectors(features=3, latent=2, width=8)
        >>> x, noise = torch.zeros(2, 3), torch.zeros(2, 1, 2)
        >>> naive = NaiveTreeVAE(model)
        >>> bool(torch.allclose(naive.elbo(x, noise).elbo, model.elbo(x, noise=noise).elbo, atol=1e-5))
        True
    """

    def __init__(self, model: TreeVAE) -> None:
        super().__init__()
        self.topology = model.topology
        self.encoder = copy.deepcopy(model.encoder)
        self.bottom_up = copy.deepcopy(model.bottom_up)
        self.likelihood = copy.deepcopy(model.likelihood)
        for role in _ROLES:
            bank = getattr(model.banks, role)
            setattr(self, role, nn.ModuleDict({str(node): bank.module(node) for node in bank.nodes}))

    def elbo(self, x: Tensor, noise: Tensor) -> ELBO:
        """Compute `TreeVAE.elbo(x, noise=noise)` at threshold 0; `noise` is `(B, N, *latent)`."""
        features = [self.encoder(x)]
        for block in self.bottom_up:
            features.insert(0, block(features[0]))
        tree, zero = self.topology, x.new_zeros(len(x))
        reconstruction, kl_root, kl_nodes, kl_decisions = zero, zero, zero, zero
        queue: list[tuple[int, Tensor, Tensor | None]] = [(tree.root, torch.ones_like(zero), None)]
        while queue:
            node, reach, parent = queue.pop(0)
            d = features[tree.depth(node)]
            posterior, prior = self._gaussians(node, d, parent)
            z = posterior.mean + posterior.stddev * noise[:, tree.index[node]]
            kl = reach * kl_divergence(posterior, prior).flatten(1).sum(1)
            kl_root, kl_nodes = (kl, kl_nodes) if parent is None else (kl_root, kl_nodes + kl)
            children = tree.children(node)
            if not children:
                log_prob = self.likelihood.log_prob(self._call("decoders", node, z), x)
                reconstruction = reconstruction - reach * log_prob
            elif len(children) == 1:
                queue.append((children[0], reach, z))
            else:
                left_q = torch.sigmoid(self._call("posterior_routers", node, d))
                left_p = torch.sigmoid(self._call("prior_routers", node, z))
                kl_decisions = kl_decisions + reach * kl_divergence(Bernoulli(left_q), Bernoulli(left_p))
                queue.append((children[0], reach * left_q, z))
                queue.append((children[1], reach * (1 - left_q), z))
        return ELBO(reconstruction, kl_root, kl_nodes, kl_decisions)

    def _gaussians(self, node: int, d: Tensor, parent: Tensor | None) -> tuple[Normal, Normal]:
        """Return posterior and prior of a node, from its features and the parent's sample."""
        mean_hat, std_hat = self._gaussian("heads", node, d)
        if parent is None:
            return Normal(mean_hat, std_hat), Normal(torch.zeros_like(mean_hat), torch.ones_like(std_hat))
        mean_p, std_p = self._gaussian("transitions", node, parent)
        variance = 1 / (1 / std_hat**2 + 1 / std_p**2)
        mean = variance * (mean_hat / std_hat**2 + mean_p / std_p**2)
        return Normal(mean, variance.sqrt()), Normal(mean_p, std_p)

    def _gaussian(self, role: str, node: int, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self._call(role, node, x).chunk(2, 1)
        return mean, torch.exp(0.5 * logvar)

    def _call(self, role: str, node: int, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, role)[str(node)](x)
        return result

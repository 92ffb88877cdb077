"""Tree of linear Gaussians: TreeVAE's generative model with known answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from treediff.diffusion.schedule import NoiseSchedule
from treediff.testing._nodes import checked_copies, require_nodes
from treediff.testing.denoiser import ExactDenoiser
from treediff.testing.mixture import GaussianMixture
from treediff.tree.probability import leaf_log_probs
from treediff.tree.topology import TreeTopology

__all__ = ["GaussianTree"]


class GaussianTree:
    """Tree of linear Gaussians with constant branch probabilities.

    The generative model of TreeVAE (arXiv 2306.08984, section 2) with its networks replaced by matrices:

        z_root ~ N(0, I)
        left at routed node i with probability sigmoid(branch_logit_i)
        z_c | z_pa ~ N(weight_c z_pa + bias_c, diag(exp(logvar_c)))
        x | z_l ~ N(decoder_weight_l z_l + decoder_bias_l, variance I)

    Tensors are copied and stored in float64, by node id. Columns of results follow `topology.leaves` or
    `topology.ids`.

    Args:
        topology: the tree.
        weight: `(D, D)` for every node but the root.
        bias: `(D,)` for every node but the root.
        logvar: `(D,)` for every node but the root.
        branch_logit: a number for every routed node; positive means left.
        decoder_weight: `(F, D)` for every leaf.
        decoder_bias: `(F,)` for every leaf.
        variance: of the observation noise, above 0.

    Raises:
        KeyError: if a map does not hold exactly the expected nodes.
        ValueError: if a shape does not fit, or a number is not finite, or the variance is not above 0.

    Examples:
        >>> world = GaussianTree(
        ...     topology=TreeTopology.balanced(0), weight={}, bias={}, logvar={}, branch_logit={},
        ...     decoder_weight={0: torch.ones(1, 1)}, decoder_bias={0: torch.zeros(1)}, variance=3.0,
        ... )
        >>> world.leaf_moments()
        (tensor([[0.]], dtype=torch.float64), tensor([[[4.]]], dtype=torch.float64))
    """

    def __init__(
        self,
        *,
        topology: TreeTopology,
        weight: Mapping[int, Tensor],
        bias: Mapping[int, Tensor],
        logvar: Mapping[int, Tensor],
        branch_logit: Mapping[int, float],
        decoder_weight: Mapping[int, Tensor],
        decoder_bias: Mapping[int, Tensor],
        variance: float,
    ) -> None:
        if not (variance > 0 and math.isfinite(variance)):
            raise ValueError(f"variance must be finite and above 0, found {variance}")
        below, leaves = topology.ids[1:], topology.leaves
        require_nodes("decoder_weight", decoder_weight, leaves)
        shape = tuple(decoder_weight[leaves[0]].shape)
        if len(shape) != 2:
            raise ValueError(f"decoder_weight must have the shape (features, latent), found {shape}")
        self.features, self.latent = features, latent = shape
        self.topology = topology
        self.variance = float(variance)
        self.weight = checked_copies("weight", weight, below, (latent, latent))
        self.bias = checked_copies("bias", bias, below, (latent,))
        self.logvar = checked_copies("logvar", logvar, below, (latent,))
        self.branch_logit = checked_copies("branch_logit", branch_logit, topology.routed, ())
        self.decoder_weight = checked_copies("decoder_weight", decoder_weight, leaves, shape)
        self.decoder_bias = checked_copies("decoder_bias", decoder_bias, leaves, (features,))
        self.mixture = self._marginal()

    @classmethod
    def random(
        cls,
        topology: TreeTopology,
        *,
        latent: int,
        features: int,
        separation: float = 8.0,
        variance: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> GaussianTree:
        """Draw a random tree whose hierarchy is visible in the data.

        The latent of a node of depth h has a standard deviation of about `2**-h` in every direction. The means of
        two siblings are `separation * 2**-h` apart, in `x` as in `z`. Directions are orthogonal
        along a path while the dimensions last. So if no leaf is deeper than `min(latent, features)`, the
        distance between the means of two leaves determines the depth at which their paths part.

        Args:
            topology: the tree.
            latent: latent width `D`.
            features: data width `F`.
            separation: distance between siblings, in standard deviations of their latents.
            variance: of the observation noise.
            generator: source of the random numbers; torch's default generator if None.

        Raises:
            ValueError: if a width is below 1, or the separation is below 0.

        Examples:
            >>> seed = torch.Generator().manual_seed(0)
            >>> world = GaussianTree.random(TreeTopology.balanced(1), latent=2, features=3, generator=seed)
            >>> left, right = world.leaf_moments()[0]
            >>> round(float(torch.dist(left, right)), 6)
            4.0
        """
        if latent < 1 or features < 1 or not separation >= 0:
            raise ValueError(
                "latent and features must be at least 1 and separation at least 0; "
                f"found {latent}, {features} and {separation}"
            )

        unit = partial(torch.rand, generator=generator, dtype=torch.float64)
        widest = max(latent, features)
        # The corner of a rotation keeps lengths and angles of vectors in the smaller of the two spaces.
        embed = _rotation(widest, generator)[:features, :latent]
        weight, bias, logvar = {}, {}, {}
        mean = {topology.root: torch.zeros(latent, dtype=torch.float64)}
        used = {topology.root: torch.zeros(0, latent, dtype=torch.float64)}
        for node, *children in zip(topology.ids, topology.left, topology.right, strict=True):
            direction = _direction(embed, used[node], generator)
            for side, child in zip((0.5, -0.5), children, strict=True):
                if child is None:
                    continue
                scale = 0.5 ** topology.depth(child)
                mean[child] = mean[node] + side * separation * scale * direction
                used[child] = torch.cat([used[node], direction[None]])
                # Half of the variance scale^2 comes from the parent (4 scale^2 / 8), half is new.
                weight[child] = _rotation(latent, generator) / math.sqrt(8)
                bias[child] = mean[child] - weight[child] @ mean[node]
                logvar[child] = math.log(scale**2 / 2) + unit(latent) - 0.5
        decoder_weight = {leaf: embed @ _rotation(latent, generator) for leaf in topology.leaves}
        return cls(
            topology=topology,
            weight=weight,
            bias=bias,
            logvar=logvar,
            branch_logit={node: 2 * float(unit(())) - 1 for node in topology.routed},
            decoder_weight=decoder_weight,
            decoder_bias={leaf: (embed - w) @ mean[leaf] for leaf, w in decoder_weight.items()},
            variance=variance,
        )

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw from the tree itself, from the root down, all samples at once.

        Args:
            n: number of samples, at least 0.
            generator: source of the random numbers; torch's default generator if None.

        Returns:
            `x` as `(n, F)` in float64, and the **ids** of the leaves they came from as `(n,)` in int64.

        Raises:
            ValueError: if `n` is below 0.

        Examples:
            >>> world = GaussianTree.random(TreeTopology.balanced(1), latent=2, features=3)
            >>> x, leaf = world.sample(5, generator=torch.Generator().manual_seed(0))
            >>> x.shape, leaf.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        if n < 0:
            raise ValueError(f"n must be at least 0, found {n}")
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        x = torch.empty(n, self.features, dtype=torch.float64)
        leaf = torch.empty(n, dtype=torch.int64)
        reached = {self.topology.root: (torch.arange(n), normal(n, self.latent))}
        for node in self.topology:
            rows, z = reached.pop(node)
            children = self.topology.children(node)
            if not children:
                noise = math.sqrt(self.variance) * normal(len(rows), self.features)
                x[rows] = z @ self.decoder_weight[node].T + self.decoder_bias[node] + noise
                leaf[rows] = node
                continue
            goes_first = torch.ones(len(rows), dtype=torch.bool)
            if len(children) == 2:
                uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
                goes_first = uniform < self.branch_logit[node].sigmoid()
            for child, here in zip(children, (goes_first, ~goes_first), strict=False):
                mean = z[here] @ self.weight[child].T + self.bias[child]
                noise = torch.exp(0.5 * self.logvar[child]) * normal(len(mean), self.latent)
                reached[child] = rows[here], mean + noise
        return x, leaf

    def leaf_moments(self) -> tuple[Tensor, Tensor]:
        """Return means `(K, F)` and covariances `(K, F, F)` of `x` given the leaf."""
        return self.mixture.means, self.mixture.covariances

    def log_prior(self) -> Tensor:
        """Return the log-probability of every leaf, `(K,)`, in nats."""
        return self.mixture.log_weights

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the exact log-evidence `log p(x)` in nats, `(B, F)` to `(B,)`. Raises ValueError for other shapes."""
        return self.mixture.log_prob(x)

    def leaf_log_posterior(self, x: Tensor) -> Tensor:
        """Compute `log P(leaf | x)`, `(B, F)` to `(B, K)`; `exp` sums to 1. Raises ValueError for other shapes."""
        return self.mixture.log_posterior(x)

    def node_log_posterior(self, x: Tensor) -> Tensor:
        """Compute `log P(node is reached | x)`, `(B, F)` to `(B, N)`: the sum over the leaves under the node.

        Raises ValueError for another shape.
        """
        posterior = self.leaf_log_posterior(x)
        column = {leaf: i for i, leaf in enumerate(self.topology.leaves)}
        under = [[column[leaf] for leaf in self.topology.leaves_under(node)] for node in self.topology]
        return torch.stack([posterior[:, columns].logsumexp(1) for columns in under], 1)

    def at(self, node: int) -> GaussianMixture:
        """Return the distribution of `x` given that its path passes a node: the mixture of the leaves under it.

        Raises:
            KeyError: if there is no such node.
        """
        column = {leaf: i for i, leaf in enumerate(self.topology.leaves)}
        return self.mixture.at([column[leaf] for leaf in self.topology.leaves_under(node)])

    def denoiser(self, schedule: NoiseSchedule, node: int | None = None) -> ExactDenoiser:
        """Return the exact denoiser of all data, or of the data whose paths pass a node.

        Raises:
            KeyError: if there is no such node.

        Examples:
            >>> from treediff.diffusion.schedule import LinearSchedule
            >>> world = GaussianTree.random(TreeTopology.balanced(1), latent=2, features=3)
            >>> world.denoiser(LinearSchedule(), node=1)(torch.zeros(4, 3), 0.5).shape
            torch.Size([4, 3])
        """
        return ExactDenoiser(self.mixture if node is None else self.at(node), schedule)

    def _marginal(self) -> GaussianMixture:
        """Sum out the latents: moments go down the tree, then through the decoders."""
        eye = torch.eye(self.latent, dtype=torch.float64)
        moments = {self.topology.root: (eye[0] * 0, eye)}
        for node in self.topology:
            for child in self.topology.children(node):
                mean, covariance = _push(*moments[node], self.weight[child], self.bias[child])
                moments[child] = mean, covariance + self.logvar[child].exp().diag()
        observed = [
            _push(*moments[leaf], self.decoder_weight[leaf], self.decoder_bias[leaf]) for leaf in self.topology.leaves
        ]
        means, covariances = (torch.stack(parts) for parts in zip(*observed, strict=True))
        logits = [[float(self.branch_logit[node]) for node in self.topology.routed]]
        log_weights = leaf_log_probs(torch.tensor(logits, dtype=torch.float64), self.topology)[0]
        noise = self.variance * torch.eye(self.features, dtype=torch.float64)
        return GaussianMixture(log_weights, means, covariances + noise)


def _push(mean: Tensor, covariance: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of `weight z + bias` from the moments of `z`."""
    return weight @ mean + bias, weight @ covariance @ weight.T


def _rotation(width: int, generator: torch.Generator | None) -> Tensor:
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return rotation


def _direction(embed: Tensor, used: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a unit vector `(D,)` that `embed` keeps at length 1, orthogonal to the rows `used` if possible."""
    direction: Tensor = embed.T @ torch.randn(len(embed), generator=generator, dtype=torch.float64)
    if len(used) < min(embed.shape):
        direction = direction - used.T @ (used @ direction)
    return F.normalize(direction, dim=0)

"""Density of the posterior latents of images, from which latents are drawn in place of the prior.

The second stage trains on latents of images. Latents of the prior lie elsewhere, the more so the worse the prior fits,
which degrades generated images. A density fitted to the latents of images after training fixes this without training
again: ex-post density estimation (Ghosh et al., arXiv 1903.12436; for a diffusion model on top of a VAE, DiffuseVAE,
Pandey et al., arXiv 2201.00308). There the density is one mixture over one latent; here it is one mixture per leaf,
over the path to the leaf.

Letters: `B` images, `K` leaves, `M` components, `S` depth of the tree, `D` latent,
`F = (S + 1) D` dimensions of a path.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from treediff.core.checks import check_positive, check_shape
from treediff.core.groups import Groups
from treediff.core.io import described_by, dtype_name, dtype_named, require_config
from treediff.core.modes import evaluating, lasting
from treediff.core.noise import combine_seeds, counter_normal, counter_uniform, seed_from, widest
from treediff.core.rows import Indexable, Rows
from treediff.diffusion.condition import NodeIndex
from treediff.layers.grouped.call import grouped_linear
from treediff.pipeline.conditions import condition_of
from treediff.tree.files import require_topology
from treediff.tree.probability import sample_leaf
from treediff.tree.topology import TreeTopology
from treediff.treevae.model import TreeVAE
from treediff.treevae.prior import TreeSample, check_draw

__all__ = ["LeafDensity"]

Array = npt.NDArray[np.float64]
_LEAF, _COMPONENT, _LATENTS = range(3)  # draw numbers of an image


class LeafDensity(nn.Module):
    """Density of latents: for each leaf its share, and a mixture of Gaussians over all latents from the root to it.

    `p(leaf k) = shares_k` and `p(z_root, ..., z_leaf | k) = sum_m weights_km N(means_km, factors_km factors_km^T)`:
    covariances are full. `LeafDensity.fit` estimates all parameters; a new density has equal shares and standard normal
    latents.

    Tables have one shape for all leaves: entries past a leaf are 0, and a component that a leaf does not need has
    weight 0. The tables hold about `K M F^2` numbers, so latents should be vectors, or small maps.

    Args:
        topology: the tree.
        latent: shape of one latent, `(D,)` or `(D, h, w)`.
        components: greatest number `M` of Gaussians for a leaf.
        device: device of the tables.
        dtype: dtype of the tables.

    Raises:
        ValueError: if a dimension or a number is below 1, or `latent` is not a shape.
        TypeError: if a number is not whole.

    Attributes:
        shares: `(K,)` in the order of the topology's leaves.
        weights: `(K, M)`.
        means: `(K, M, F)`.
        factors: `(K, M, F, F)` Cholesky factors of the covariances, lower triangular.

    Examples:
        >>> tree_vae = TreeVAE.for_images(size=8, latent=4, topology=TreeTopology.balanced(1))
        >>> LeafDensity(tree_vae.topology, tree_vae.latent).sample(tree_vae, 3, node=2).z.shape
        torch.Size([3, 2, 4])
    """

    shares: Tensor
    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(
        self,
        topology: TreeTopology,
        latent: tuple[int, ...],
        components: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(components=components)
        self.latent, self.components, self.index = (
            check_shape("latent", latent),
            components,
            NodeIndex(topology, device),
        )
        on_path = (self._paths() >= 0).repeat_interleave(math.prod(latent), 1)
        leaves, numbers = on_path.shape
        factory: Any = {"device": device, "dtype": dtype}
        self.register_buffer("shares", torch.full((leaves,), 1 / leaves, **factory))
        self.register_buffer("weights", torch.zeros(leaves, components, **factory))
        self.register_buffer("means", torch.zeros(leaves, components, numbers, **factory))
        self.register_buffer("factors", torch.zeros(leaves, components, numbers, numbers, **factory))
        self.weights[:, 0] = 1
        self.factors.diagonal(dim1=-2, dim2=-1).copy_(on_path[:, None])

    def _paths(self) -> Tensor:
        """Return the ids from the root to each leaf, `(K, S + 1)`; -1 past the leaf."""
        return self.index.paths[self.index.leaves]

    def extra_repr(self) -> str:
        """Return the shape of a latent and the number of components as text."""
        return f"latent={self.latent}, components={self.components}"

    def check(self, tree_vae: TreeVAE) -> None:
        """Raise ValueError unless a TreeVAE has this tree and these latents."""
        if (tree_vae.topology, tree_vae.latent) != (self.index.topology, self.latent):
            raise ValueError(
                f"the density is for latents {self.latent} on {self.index.topology}, found a TreeVAE with latents "
                f"{tree_vae.latent} on {tree_vae.topology}; fit a density to this TreeVAE with LeafDensity.fit"
            )

    # --- fitting ------------------------------------------------------------------------------------------

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        tree_vae: TreeVAE,
        images: Indexable,
        *,
        components: int = 64,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Fit a density, in float32, to the latents that a TreeVAE's posterior gives images.

        One leaf and one path of latents are drawn per image, as in `condition_of`. A leaf's mixture is fitted to the
        paths that end at the leaf (EM from k-means, `sklearn.mixture.GaussianMixture`). The covariance of a component
        has as many columns as the leaf's path has dimensions, and a component needs more images than columns. So a leaf
        with few images gets fewer components, at least one. The share of a leaf is the mean of `P(leaf | x)`.

        Args:
            tree_vae: the trained TreeVAE.
            images: `(N, *inputs)`, the images that the TreeVAE was trained on: a tensor, or anything else that `Rows`
                takes; read a batch at a time.
            components: greatest number of Gaussians for a leaf.
            batch_size: images in a batch; changes the result by rounding only.
            generator: gives the seed.

        Raises:
            ImportError: if scikit-learn is not installed.
            TypeError: if `images` has the wrong dtype, or a number is not whole.
            ValueError: if `images` does not fit the TreeVAE, a number is below 1, or a leaf gets fewer than two images,
                too few for a Gaussian. Such a leaf is best pruned.
        """
        check_positive(components=components, batch_size=batch_size)
        rows = tree_vae.rows(images)
        with lasting():
            density = cls(tree_vae.topology, tree_vae.latent, components, device=tree_vae.device, dtype=torch.float32)
        seed = seed_from(generator)
        node, z, weights = _paths_of(tree_vae, rows, batch_size, seed)
        density.shares.copy_(weights.cpu().double().mean(0))
        for k, leaf in enumerate(tree_vae.topology.leaves):
            numbers = len(tree_vae.topology.path(leaf)) * math.prod(tree_vae.latent)
            latents = z[node == leaf, :numbers].cpu().double().numpy()
            if len(latents) < 2:
                raise ValueError(
                    f"a Gaussian needs at least 2 images, found {len(latents)} of {len(rows)} at leaf {leaf}; give "
                    f"more images, or prune the leaf with tree_vae.prune({leaf})"
                )
            shares, means, factors = map(torch.from_numpy, _mixture(latents, components, combine_seeds(seed, leaf)))
            density.weights[k, : len(shares)] = shares
            density.means[k, : len(shares), :numbers] = means
            density.factors[k, : len(shares), :numbers, :numbers] = factors
        return density

    # --- drawing ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        tree_vae: TreeVAE,
        n: int,
        *,
        node: int | None = None,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
    ) -> TreeSample:
        """Draw a leaf, the latents on the path to the leaf, and the image that its decoder makes of these latents.

        The method is the counterpart of `TreeVAE.sample`, which draws from the prior, with the same arguments and the
        same kind of result. Image `i` depends on the generator's seed and on `first_index + i` only, and one decoder
        runs per image.

        Args:
            tree_vae: the TreeVAE, which has the decoders.
            n: number of samples.
            node: id of a node that every path passes; the leaves below the node keep the ratios of their shares.
            temperature: factor on the standard deviations of every Gaussian; has no effect on leaf and component.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.

        Raises:
            KeyError: if there is no such node.
            TypeError: if `n` or `first_index` is not an integer, or the temperature is not a number.
            ValueError: if `n` or the temperature is negative, or the TreeVAE does not fit this density.
        """
        self.check(tree_vae)
        tree, device, dtype = self.index.topology, self.means.device, self.means.dtype
        below = tree.leaves_under(tree.root if node is None else node)
        check_draw(n, temperature, first_index)
        seed = combine_seeds(seed_from(generator), 2)  # independent of the draws of the tree and of the second stage
        index = torch.arange(first_index, first_index + n, device=device)
        ranks = torch.tensor([tree.leaves.index(leaf) for leaf in below], device=device)
        leaf = ranks[_choose(self.shares[ranks].expand(n, -1), seed, index, _LEAF)]
        group = leaf * self.components + _choose(self.weights[leaf], seed, index, _COMPONENT)
        order = group.argsort(stable=True)  # by component, and so by leaf
        leaf, group = leaf[order], group[order]
        noise = temperature * counter_normal(seed, index[order], self.means.shape[2:], draw=_LATENTS, dtype=dtype)
        components = Groups(group, self.weights.numel())
        flat = grouped_linear(noise, self.factors.flatten(0, 1), self.means.flatten(0, 1), components)
        z = flat.to(tree_vae.dtype).view(n, tree.max_depth + 1, *self.latent)
        end = self.index.depth[self.index.leaves[leaf]]
        ends = z[torch.arange(n, device=device), end]
        with evaluating(tree_vae):
            images = tree_vae.likelihood.mean(
                tree_vae.banks.decoders(ends, Groups(leaf, len(tree.leaves)), tree.leaves)
            )
        steps, back = max(map(tree.depth, below)) + 1, order.argsort()
        path = self._paths()[leaf[back], :steps]
        return TreeSample(images[back], path.gather(1, end[back, None]).squeeze(1), path, z[back, :steps])

    # --- files --------------------------------------------------------------------------------------------

    def header(self) -> dict[str, Any]:
        """Return the header of a file of the density, which is everything but the tables."""
        return {
            "components": self.components,
            "dtype": dtype_name(self.means.dtype),
            "latent": list(self.latent),
            "topology": json.loads(self.index.topology.to_json()),
        }

    @classmethod
    def from_header(cls, header: object, path: str | os.PathLike[str]) -> Self:
        """Build the density that a file's header describes, without its tables; the path is for messages.

        Raises:
            ValueError: if the header is damaged.
        """
        if not isinstance(header, dict) or not header.keys() >= {"components", "latent", "topology"}:
            raise ValueError(f"the header of {os.fspath(path)!r} is damaged: it describes no density, {header!r}")
        topology, dtype = require_topology(header, path), dtype_named(header.get("dtype"), path)
        sizes = require_config({"config": {key: header[key] for key in ("latent", "components")}}, path)
        with described_by(path, sizes):
            return cls(topology, tuple(sizes["latent"]), sizes["components"], dtype=dtype)


def _paths_of(tree_vae: TreeVAE, images: Rows, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return leaf ids `(N,)`, latents `(N, F)` and probabilities of the leaves `(N, K)` of all images."""
    parts = []
    for i, x in enumerate(images.split(batch_size)):
        generator = torch.Generator().manual_seed(seed)
        found = condition_of(
            tree_vae, x.to(tree_vae.device), decode=False, first_index=i * batch_size, generator=generator
        )
        parts.append((found.node, cast(Tensor, found.z).flatten(1), cast(Tensor, found.weights)))
    node, z, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return node, z, weights


def _choose(shares: Tensor, seed: int, index: Tensor, draw: int) -> Tensor:
    """Draw one column for each row of shares `(B, ...)`, which need not add up to 1."""
    wide = widest(shares.device)
    return sample_leaf(shares.to(wide).log(), counter_uniform(seed, index, draw=draw, dtype=wide))


def _mixture(rows: Array, components: int, seed: int) -> tuple[Array, Array, Array]:
    """Fit a mixture of Gaussians to the rows `(n, F)`, and return its weights, means and Cholesky factors."""
    try:
        from sklearn.mixture import GaussianMixture
    except ImportError as error:
        raise ImportError(
            "mixtures are fitted by scikit-learn, which is not installed; pip install 'treediff[metrics]'"
        ) from error
    enough = max(1, min(components, len(rows) // (rows.shape[1] + 1)))
    mixture = GaussianMixture(enough, max_iter=200, random_state=seed % 2**32).fit(rows)
    return mixture.weights_, mixture.means_, np.linalg.cholesky(mixture.covariances_)

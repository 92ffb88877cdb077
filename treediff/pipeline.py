"""Both stages as one thing that generates: a TreeVAE finds the place, a diffusion model draws what belongs there.

`z_0 ~ N(0, I)` is handed down the tree to a leaf, the leaf's decoder makes a blurry image of it, and the diffusion
model turns noise into a sharp one under that condition (Diffuse-TreeVAE, arXiv 2407.06124; TreeDiffusion, arXiv
2410.16910). One path is walked and one decoder runs per image.

Letters: `B` images, `K` leaves, `S` depth of the tree, `D` latent, `C H W` image.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.ddpm import LeafConditionedDDPM
from treediff.diffusion.condition import TreeCondition
from treediff.generation import TreeSample
from treediff.io import load_into, read_header, save_model
from treediff.noise import counter_normal, counter_uniform, seed_from
from treediff.posterior import leaf_log_probs_of
from treediff.topology import TreeTopology
from treediff.treevae import TreeVAE

__all__ = ["DiffuseTreeVAE", "Refined", "condition_of", "condition_of_sample"]

_LEAF = -1  # the draw of the leaf; latents are numbered by their nodes


@dataclass(frozen=True)
class Refined:
    """Images of both stages.

    Args:
        images: `(B, C, H, W)` in [0, 1], drawn by the diffusion model.
        coarse: `(B, C, H, W)`, what the leaf's decoder made of the same latents.
        leaf: `(B,)` node id of each image's leaf.
    """

    images: Tensor
    coarse: Tensor
    leaf: Tensor


@torch.no_grad()
def condition_of(
    model: TreeVAE,
    x: Tensor,
    *,
    leaf: Tensor | str = "sample",
    first_index: int = 0,
    generator: torch.Generator | None = None,
) -> TreeCondition:
    """Where images belong by the posterior of a TreeVAE: a leaf, the latents on the way to it, and its reconstruction.

    Leaf and latents of image `i` depend on the generator's seed and on `first_index + i` only.

    Args:
        model: the TreeVAE.
        x: `(B, C, H, W)`.
        leaf: 'sample' for a leaf drawn from `P(leaf | x)`, 'argmax' for the most probable one, or `(B,)` leaf ids.
        first_index: index of the first image.
        generator: gives the seed.

    Raises:
        ValueError: if `leaf` is another word, or `x` is not what the model takes.
        KeyError: if an id is not that of a leaf.
    """
    model.check(x)
    features = model.features(x)
    everywhere = model.route(features)
    plan, log_probs = everywhere.plan, leaf_log_probs_of(everywhere)
    seed, index = seed_from(generator), torch.arange(first_index, first_index + len(x), device=x.device)
    leaves = plan.ids(plan.leaves)
    if isinstance(leaf, Tensor):
        rank = model._leaf_ranks(leaf, len(x), leaves)
    elif leaf == "sample":
        sums = log_probs.exp().cumsum(1)
        # Below the last sum, so that rounding never leads past the last leaf.
        point = counter_uniform(seed, index, draw=_LEAF, dtype=sums.dtype) * sums[:, -1]
        rank = (sums <= point[:, None]).sum(1).clamp(max=len(leaves) - 1)
    elif leaf == "argmax":
        rank = log_probs.argmax(1)
    else:
        raise ValueError(f"leaf must be 'sample', 'argmax' or (B,) leaf ids, found {leaf!r}")
    visits = everywhere.along(rank)
    noise = [counter_normal(seed, index, model.latent, draw=node, dtype=features.dtype) for node in plan.nodes]
    posterior = model.latents(features, visits, noise=torch.stack(noise, 1))
    z = posterior.z.new_zeros(len(x), len(plan.levels), *model.latent)
    z[visits.image, plan.depth[visits.node]] = posterior.z
    ends = visits.at_leaves()
    images = model.likelihood.mean(model.decode_visits(posterior, ends))
    image = torch.empty_like(images).index_copy(0, visits.image[ends], images)
    return TreeCondition(torch.tensor(leaves, device=x.device)[rank], z=z, image=image, weights=log_probs.exp())


def condition_of_sample(sample: TreeSample, topology: TreeTopology) -> TreeCondition:
    """The place of images that a TreeVAE drew from its prior."""
    missing = topology.max_depth + 1 - sample.z.shape[1]
    # A sample is as long as the deepest leaf it could have reached; conditions are as long as the tree is deep.
    z = torch.cat([sample.z, sample.z.new_zeros(len(sample.z), missing, *sample.z.shape[2:])], 1)
    return TreeCondition(sample.leaf, z=z, image=sample.images)


class DiffuseTreeVAE(nn.Module):
    """A TreeVAE and a diffusion model on its tree.

    Args:
        tree_vae: the first stage.
        ddpm: the second, for the same tree and images.

    Raises:
        ValueError: if the two have different trees or images.

    Examples:
        >>> from treediff import TreeTopology
        >>> tree_vae = TreeVAE.for_images(size=8, latent=4, topology=TreeTopology.balanced(1))
        >>> model = DiffuseTreeVAE(tree_vae, LeafConditionedDDPM.for_tree(tree_vae, width=16))
        >>> model.generate(3, node=2, steps=2).images.shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, tree_vae: TreeVAE, ddpm: LeafConditionedDDPM) -> None:
        super().__init__()
        if tree_vae.topology != ddpm.index.topology:
            raise ValueError(
                f"both stages must have one tree, found {tree_vae.topology} and {ddpm.index.topology}; a tree that "
                "grows or is pruned needs a new second stage"
            )
        images = (ddpm.unet.out_channels, *ddpm.unet.size)
        if tree_vae.inputs != images:
            raise ValueError(f"both stages must have images of one shape, found {tree_vae.inputs} and {images}")
        self.tree_vae, self.ddpm = tree_vae, ddpm

    def loss(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The second stage's loss on images whose leaf and latents come from the posterior of the first, frozen one.

        Raises:
            TypeError: if `x` is no floating-point tensor.
            ValueError: if `x` is not what the model takes.
        """
        return self.ddpm.loss(x, condition_of(self.tree_vae, x, generator=generator), generator=generator)

    def generate(
        self,
        n: int,
        *,
        node: int | None = None,
        leaf: int | None = None,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        **sampling: Any,  # noqa: ANN401
    ) -> Refined:
        """Draw images, from the root or through a node.

        Image `i` depends on the generator's seed and on `first_index + i` only.

        Args:
            n: how many.
            node: id of a node that every path passes; the root by default.
            leaf: the same for a leaf, and refuses any other node.
            temperature: factor on the standard deviation of every latent.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.
            **sampling: settings of `LeafConditionedDDPM.sample`.

        Raises:
            KeyError: if there is no such node, or it is no leaf.
            ValueError: if both a node and a leaf are given, or a setting is out of range.
        """
        if leaf is not None:
            if node is not None:
                raise ValueError(f"give a node or a leaf, found node={node} and leaf={leaf}")
            if leaf not in self.tree_vae.topology.leaves:
                raise KeyError(f"node {leaf} is not a leaf; the leaves are {list(self.tree_vae.topology.leaves)}")
            node = leaf
        seed = seed_from(generator)
        drawn = self.tree_vae.sample(
            n, node=node, temperature=temperature, first_index=first_index, generator=_seeded(seed)
        )
        condition = condition_of_sample(drawn, self.tree_vae.topology)
        images = self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling)
        return Refined(images, drawn.images, drawn.leaf)

    @torch.no_grad()
    def generate_tree(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        **sampling: Any,  # noqa: ANN401
    ) -> Refined:
        """Draw `n` roots and follow each to every leaf: the same thing seen by every cluster, from the same noise.

        Returns images of shape `(n, K, C, H, W)` in the order of the topology's leaves, and leaves `(n, K)`. Column `k`
        holds the pictures of `generate(n, leaf=topology.leaves[k])` for the same generator state.
        """
        seed = seed_from(generator)
        drawn = self.tree_vae.sample_leaves(
            n, temperature=temperature, first_index=first_index, generator=_seeded(seed)
        )
        columns = []
        leaves = self.tree_vae.topology.leaves
        for k, leaf in enumerate(leaves):
            place = torch.full((n,), leaf, device=drawn.z.device)
            condition = TreeCondition(place, z=drawn.z[:, k], image=drawn.images[:, k])
            columns.append(self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling))
        return Refined(torch.stack(columns, 1), drawn.images, torch.tensor(leaves, device=drawn.z.device).expand(n, -1))

    @torch.no_grad()
    def refine(
        self,
        x: Tensor,
        *,
        leaf: str | Tensor = "sample",
        first_index: int = 0,
        generator: torch.Generator | None = None,
        **sampling: Any,  # noqa: ANN401
    ) -> Refined:
        """Draw images that belong where given images belong.

        Args:
            x: `(B, C, H, W)` in [0, 1].
            leaf: 'sample' for a leaf drawn from `P(leaf | x)`, 'argmax' for the most probable one, or `(B,)` leaf ids;
                'all' for every leaf in turn, which gives images `(B, K, C, H, W)`, in each column those of its id.
            first_index: index of the first image.
            generator: gives the seed.
            **sampling: settings of `LeafConditionedDDPM.sample`.

        Raises:
            ValueError: if `leaf` is another word, or `x` is not what the model takes.
            KeyError: if an id is not that of a leaf.
        """
        seed = seed_from(generator)
        if isinstance(leaf, str) and leaf == "all":
            return self._refine_all(x, first_index, seed, sampling)
        return self._refine(x, leaf, first_index, seed, sampling)

    def _refine(self, x: Tensor, leaf: str | Tensor, first_index: int, seed: int, sampling: dict[str, Any]) -> Refined:
        condition = condition_of(self.tree_vae, x, leaf=leaf, first_index=first_index, generator=_seeded(seed))
        images = self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling)
        return Refined(images, condition.require_image(), condition.node)

    def _refine_all(self, x: Tensor, first_index: int, seed: int, sampling: dict[str, Any]) -> Refined:
        columns = []
        for leaf in self.tree_vae.topology.leaves:
            everywhere = torch.full((len(x),), leaf, device=x.device)
            columns.append(self._refine(x, everywhere, first_index, seed, sampling))
        return Refined(
            torch.stack([column.images for column in columns], 1),
            torch.stack([column.coarse for column in columns], 1),
            torch.stack([column.leaf for column in columns], 1),
        )

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both stages to one safetensors file; see `treediff.io`. Each can also be saved alone."""
        save_model(self, path, {"tree_vae": self.tree_vae.header(), "ddpm": self.ddpm.header()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Self | None = None) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model on the same tree to fill, if a stage was built from parts of your own. It stays as it was if
                the file does not fit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if a stage was built
                from parts and no model is given.
        """
        header = read_header(path, cls.__name__)
        first, second = header.get("tree_vae"), header.get("ddpm")
        if not isinstance(first, dict) or not isinstance(second, dict):
            raise ValueError(f"the header of {os.fspath(path)!r} is damaged: it describes no two stages, {header}")
        if model is None:
            model = cls(TreeVAE.from_header(first, path), LeafConditionedDDPM.from_header(second, path))
        else:
            model.ddpm.check_tree(second, path)
        load_into(model, path)
        return model


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

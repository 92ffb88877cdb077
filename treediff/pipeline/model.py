"""Pipeline of both stages: a TreeVAE gives a condition, and a diffusion model generates images under this condition.

`z_0 ~ N(0, I)` is propagated down the tree to a leaf, and the leaf's decoder makes a blurry image of the latents. The
diffusion model turns noise into a sharp image under that condition (Diffuse-TreeVAE, arXiv 2407.06124; TreeDiffusion,
arXiv 2410.16910). One path is drawn and one decoder runs per image.

The second stage is trained on conditions of the posterior and generates from conditions of the prior. Three methods
reduce the difference: latents from a `LeafDensity`, noise on the condition, and prior paths in training.

What the tree observes and what is drawn need not be the same. With a feature map the tree learns, clusters and samples
in the space of features, where classes of photographs are apart, and the second stage draws the images.

Letters: `B` images, `K` leaves, `C H W` image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn

from treediff.core import io
from treediff.core.modes import evaluating, lasting
from treediff.core.noise import seed_from
from treediff.diffusion.condition import TreeCondition
from treediff.diffusion.ddpm import LeafConditionedDDPM
from treediff.diffusion.presets import Settings
from treediff.pipeline.conditions import condition_of, condition_of_sample
from treediff.pipeline.density import LeafDensity
from treediff.tree.files import from_header, header_of
from treediff.treevae.model import TreeVAE
from treediff.treevae.prior import TreeSample

__all__ = ["DiffuseTreeVAE", "Refined"]


@dataclass(frozen=True, eq=False)
class Refined:
    """Images of both stages.

    Args:
        images: `(B, C, H, W)` in [0, 1], drawn by the diffusion model.
        coarse: `(B, C, H, W)`, images of the leaf's decoder for the same latents; None if the tree is one of features.
        leaf: `(B,)` node id of each image's leaf.
    """

    images: Tensor
    coarse: Tensor | None
    leaf: Tensor


class Posterior(TypedDict, total=False):
    """Settings of the posterior of images, see `treediff.pipeline.conditions.condition_of`.

    Attributes:
        leaf: 'sample', 'argmax', or leaf ids.
        prior_share: share of the images whose latents below the root come from the prior.
        first_index: index of the first image.
        generator: gives the seed.
    """

    leaf: str | Tensor
    prior_share: float
    first_index: int
    generator: torch.Generator | None


class DiffuseTreeVAE(nn.Module):
    """Pipeline of a TreeVAE and a diffusion model on its tree.

    Args:
        tree_vae: the first stage.
        ddpm: the second stage, for the same tree. Without features it is for the same images. With features it is
            conditioned on nodes or latents, such as `condition='tree_diffusion'`, as there is no image of a leaf.
        density: density of the latents of images; `generate` draws from the density in place of the prior. The
            density can also be set later, as an attribute.
        features: from images to what the tree observes, such as a network that was trained before; frozen, and always
            in evaluation mode. The tree observes the images themselves if not given.

    Raises:
        ValueError: if the parts have different trees, latents or images, or features of another shape than the tree
            observes, or the second stage is conditioned on images that there are not.

    Examples:
        >>> from treediff import TreeTopology
        >>> tree_vae = TreeVAE.for_images(size=8, latent=4, topology=TreeTopology.balanced(1))
        >>> model = DiffuseTreeVAE(tree_vae, LeafConditionedDDPM.for_tree(tree_vae, width=16))
        >>> model.generate(3, node=2, steps=2).images.shape
        torch.Size([3, 1, 8, 8])

        A tree of features, and images that are drawn from its leaves:

        >>> tree_vae = TreeVAE.for_vectors(features=5, latent=4, topology=TreeTopology.balanced(1))
        >>> ddpm = LeafConditionedDDPM.for_tree(tree_vae, size=8, channels=3, width=16)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
        >>> model = DiffuseTreeVAE(tree_vae, ddpm, features=network)
        >>> model.cluster(torch.rand(2, 3, 8, 8)).shape, model.generate(2, leaf=1, steps=2).images.shape
        (torch.Size([2]), torch.Size([2, 3, 8, 8]))
    """

    density: LeafDensity | None

    def __init__(
        self,
        tree_vae: TreeVAE,
        ddpm: LeafConditionedDDPM,
        density: LeafDensity | None = None,
        *,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if tree_vae.topology != ddpm.index.topology:
            raise ValueError(
                f"both stages must have one tree, found {tree_vae.topology} and {ddpm.index.topology}; a tree that "
                "grows or is pruned needs a new second stage"
            )
        images = (ddpm.unet.out_channels, *ddpm.unet.size)
        if features is None and tree_vae.inputs != images:
            raise ValueError(
                f"both stages must have images of one shape, found {tree_vae.inputs} and {images}; a tree of features "
                "needs the map from images to features, features="
            )
        if features is not None and (ddpm.conditioner.channels or ddpm.shift):
            raise ValueError(
                "a tree of features has no images of leaves, which this second stage is conditioned on; build it with "
                "condition='tree_diffusion', and shift=0"
            )
        if density is not None:
            density.check(tree_vae)
        self.tree_vae, self.ddpm, self.density = tree_vae, ddpm, density
        self.features = None if features is None else features.requires_grad_(False)
        if features is not None:
            found = tuple(self.observe(torch.zeros(2, *images, device=ddpm.device, dtype=ddpm.dtype)).shape)
            if found != (2, *tree_vae.inputs):
                raise ValueError(
                    f"features of two images have the shape {found}, the tree observes {(2, *tree_vae.inputs)}"
                )

    @torch.no_grad()
    def observe(self, x: Tensor) -> Tensor:
        """Return what the tree observes of images `(B, C, H, W)`: their features, or the images themselves."""
        if self.features is None:
            return x
        with evaluating(self.features):
            observed: Tensor = self.features(x)
        return observed

    def cluster(self, x: Tensor) -> Tensor:
        """Return the id of each image's most probable leaf, `(B,)`; see `TreeVAE.cluster`."""
        return self.tree_vae.cluster(self.observe(x))

    def loss(self, x: Tensor, *, prior_share: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Return the second stage's loss on images, with leaf and latents from the posterior of the frozen first stage.

        Args:
            x: `(B, C, H, W)` in [0, 1].
            prior_share: share of the images whose latents below the root come from the prior; see `condition_of`.
            generator: source of all randomness.

        Raises:
            TypeError: if `x` is not a floating-point tensor.
            ValueError: if `x` does not fit the model, or the share is out of range.
        """
        condition = self.condition_of(x, prior_share=prior_share, generator=generator)
        return self.ddpm.loss(x, condition, generator=generator)

    def condition_of(self, x: Tensor, **settings: Unpack[Posterior]) -> TreeCondition:
        """Return conditions of images, from the tree's posterior of what it observes; see `condition_of`."""
        return condition_of(self.tree_vae, self.observe(x), decode=self.features is None, **settings)

    def condition_of_sample(self, drawn: TreeSample) -> TreeCondition:
        """Return the conditions of what the tree drew; without its image if the tree is one of features."""
        condition = condition_of_sample(drawn, self.tree_vae.topology)
        return condition if self.features is None else replace(condition, image=None)

    def generate(
        self,
        n: int,
        *,
        node: int | None = None,
        leaf: int | None = None,
        latents: str | None = None,
        temperature: float = 1.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        **sampling: Any,  # noqa: ANN401
    ) -> Refined:
        """Draw images, from the root or through a node.

        Image `i` depends on the generator's seed and on `first_index + i` only.

        Args:
            n: number of images.
            node: id of a node that every path passes; the root by default.
            leaf: as `node`, but must be a leaf.
            latents: distribution of leaf and latents: the 'prior', or the model's 'density'; by default the density if
                there is one.
            temperature: factor on the standard deviation of every latent.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.
            **sampling: settings of `LeafConditionedDDPM.sample`.

        Raises:
            KeyError: if there is no such node, or `leaf` is not a leaf.
            ValueError: if both a node and a leaf are given, there are no such latents, or a setting is out of range.
        """
        if leaf is not None:
            if node is not None:
                raise ValueError(f"give a node or a leaf, found node={node} and leaf={leaf}")
            node = self.tree_vae.topology.node(leaf)
            if node not in self.tree_vae.topology.leaves:
                raise KeyError(f"node {node} is not a leaf; the leaves are {list(self.tree_vae.topology.leaves)}")
        seed = seed_from(generator)
        drawn = self._drawer(latents)(
            n, node=node, temperature=temperature, first_index=first_index, generator=_seeded(seed)
        )
        condition = self.condition_of_sample(drawn)
        images = self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling)
        return Refined(images, condition.image, drawn.leaf)

    def _drawer(self, latents: str | None) -> Callable[..., TreeSample]:
        """Return the function that draws from the tree."""
        if latents is None:
            latents = "prior" if self.density is None else "density"
        if latents not in ("prior", "density"):
            raise ValueError(f"latents must be 'prior' or 'density', found {latents!r}")
        if latents == "prior":
            return self.tree_vae.sample
        if self.density is None:
            raise ValueError(
                "this model has no density to draw latents from; fit one: "
                "model.density = LeafDensity.fit(model.tree_vae, images), with features their features"
            )
        return partial(self.density.sample, self.tree_vae)

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
        """Draw `n` roots from the prior and follow each root to every leaf: the same sample under every cluster.

        Returns images of shape `(n, K, C, H, W)` in the order of the topology's leaves, and leaves `(n, K)`. Column `k`
        holds the images of `generate(n, leaf=topology.leaves[k], latents="prior")` for the same generator state.
        """
        seed = seed_from(generator)
        drawn = self.tree_vae.sample_leaves(
            n, temperature=temperature, first_index=first_index, generator=_seeded(seed)
        )
        columns = []
        leaves = self.tree_vae.topology.leaves
        for k, leaf in enumerate(leaves):
            place = torch.full((n,), leaf, device=drawn.z.device)
            image = drawn.images[:, k] if self.features is None else None
            condition = TreeCondition(place, z=drawn.z[:, k], image=image)
            columns.append(self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling))
        coarse = drawn.images if self.features is None else None
        return Refined(torch.stack(columns, 1), coarse, torch.tensor(leaves, device=drawn.z.device).expand(n, -1))

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
        """Draw images under the conditions of given images.

        Args:
            x: `(B, C, H, W)` in [0, 1].
            leaf: 'sample' for a leaf drawn from `P(leaf | x)`, 'argmax' for the most probable leaf, or `(B,)` leaf ids.
                'all' is for every leaf, with images `(B, K, C, H, W)`, in each column the images of one leaf id.
            first_index: index of the first image.
            generator: gives the seed.
            **sampling: settings of `LeafConditionedDDPM.sample`.

        Raises:
            ValueError: if `leaf` is another word, or `x` does not fit the model.
            KeyError: if an id is not the id of a leaf.
        """
        seed = seed_from(generator)
        if isinstance(leaf, str) and leaf == "all":
            return self._refine_all(x, first_index, seed, sampling)
        return self._refine(x, leaf, first_index, seed, sampling)

    def _refine(self, x: Tensor, leaf: str | Tensor, first_index: int, seed: int, sampling: dict[str, Any]) -> Refined:
        condition = self.condition_of(x, leaf=leaf, first_index=first_index, generator=_seeded(seed))
        images = self.ddpm.sample(condition, first_index=first_index, generator=_seeded(seed), **sampling)
        return Refined(images, condition.image, condition.node)

    def _refine_all(self, x: Tensor, first_index: int, seed: int, sampling: dict[str, Any]) -> Refined:
        columns = []
        for leaf in self.tree_vae.topology.leaves:
            everywhere = torch.full((len(x),), leaf, device=x.device)
            columns.append(self._refine(x, everywhere, first_index, seed, sampling))
        coarse = [column.coarse for column in columns if column.coarse is not None]
        return Refined(
            torch.stack([column.images for column in columns], 1),
            torch.stack(coarse, 1) if coarse else None,
            torch.stack([column.leaf for column in columns], 1),
        )

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: io.Path, *, leave_out: Sequence[str] = ()) -> None:
        """Write both stages, density and feature map, if there are any, to one safetensors file.

        See `treediff.core.io`. Each stage can also be saved alone.

        Args:
            path: the file to write.
            leave_out: names of modules inside the feature map whose weights are not written, such as '0' for the first
                module of a sequence, a large network that a package holds. The file keeps a digest of these weights,
                and `load` takes the same weights only.

        Raises:
            ValueError: if the feature map has no module of that name.
        """
        header: dict[str, Any] = {"tree_vae": header_of(self.tree_vae), "ddpm": self.ddpm.header()}
        if self.density is not None:
            header["density"] = self.density.header()
        if self.features is not None:
            header["features"] = type(self.features).__name__
        inside = {} if self.features is None else dict(self.features.named_modules())
        missing = [name for name in leave_out if not name or name not in inside]
        if missing:
            raise ValueError(f"leave_out names modules of the feature map, {sorted(inside)[1:]}; found {missing}")
        if leave_out:
            header["left_out"] = {name: io.digest_of(inside[name].state_dict()) for name in sorted(leave_out)}
        io.save_model(self, path, header, without=tuple(f"features.{name}." for name in leave_out))

    @classmethod
    @lasting()
    def load(
        cls, path: io.Path, *, model: Self | None = None, features: nn.Module | None = None, **parts: nn.Module
    ) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: for a stage built from custom parts, a model on the same tree to fill. Its density is replaced by the
                file's density, or removed. If the file does not fit, the model is unchanged.
            features: a module of the class of the feature map, whose weights are filled in; needed if there is one.
                Weights that were left out of the file stay as they are here, and must be those of the digest.
            **parts: the modules that were given to the factories of the stages in place of the modules they build.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit, if the given features have
                other weights than those that were left out, or if a stage was built from parts and no model is given.
        """
        header, tensors = io.read_model(path, cls.__name__)
        first, second, third = (header.get(part) for part in ("tree_vae", "ddpm", "density"))
        if not isinstance(first, dict) or not isinstance(second, dict):
            raise ValueError(
                f"the header of {os.fspath(path)!r} is damaged: it describes no two stages, {sorted(header)}"
            )
        density = LeafDensity.from_header(third, path) if "density" in header else None
        features = model.features if model is not None else features
        if ("features" in header) != (features is not None):
            has, found = ("", "none") if "features" in header else ("no ", f"a {type(features).__name__}")
            named = f", a {header['features']}" if "features" in header else ""
            raise ValueError(
                f"the model in {os.fspath(path)!r} has {has}feature map{named}; found {found} as features="
            )
        without = _left_out(header, features, path)
        if model is None:
            drawing = {name: part for name, part in parts.items() if name in Settings.__annotations__}
            learning = {name: part for name, part in parts.items() if name not in drawing}
            stages = (
                from_header(TreeVAE, first, path, learning),
                from_header(LeafConditionedDDPM, second, path, drawing),
            )
            with io.described_by(path):
                model = cls(*stages, density, features=features)
            io.fill(model, tensors, path, without=without)
            return model
        model.ddpm.check_tree(second, path)
        if density is not None:
            density.to(model.tree_vae.device)
        # The stages are shared, so this fills the given model too, unless the file does not fit.
        with io.described_by(path):
            whole = cls(model.tree_vae, model.ddpm, density, features=features)
        io.fill(whole, tensors, path, without=without)
        model.density = density
        return model


def _left_out(header: Mapping[str, Any], features: nn.Module | None, path: io.Path) -> tuple[str, ...]:
    """Return the prefixes of the weights that a file lacks, after a check that the given feature map has them."""
    digests = header.get("left_out", {})
    inside = {} if features is None else dict(features.named_modules())
    if not isinstance(digests, Mapping) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"the header of {os.fspath(path)!r} is damaged: 'left_out' is {digests!r}")
    for name, digest in digests.items():
        if name not in inside or io.digest_of(inside[name].state_dict()) != digest:
            found = "none" if name not in inside else f"a {type(inside[name]).__name__} with other weights"
            raise ValueError(
                f"{os.fspath(path)!r} was saved without the weights of module {name!r} of the feature map, found "
                f"{found}; pass features= with the weights that the map had when it was saved"
            )
    return tuple(f"features.{name}." for name in digests)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

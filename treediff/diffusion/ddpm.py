"""Diffusion model of the second stage, which generates images under a condition on a tree.

Denoising diffusion (Ho et al., arXiv 2006.11239) is conditioned on a leaf, the leaf decoder's image and the path of
latents to the leaf (Diffuse-TreeVAE, arXiv 2407.06124; TreeDiffusion, arXiv 2410.16910), or on any node. The model has
the tree but not the TreeVAE: conditions come as data, see `TreeCondition`.

Letters: `B` batch, `C H W` image, `N` nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, Unpack

import torch
from torch import Tensor, nn

from treediff.core import io
from treediff.core.checks import check_batch, check_noise, check_size
from treediff.core.modes import evaluating, lasting
from treediff.core.noise import NoiseStream, combine_seeds, counter_normal, drawing_from, seed_from
from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.conditioners import Conditioner, Signal
from treediff.diffusion.denoiser import Denoiser, Progress
from treediff.diffusion.grids import GRIDS, Grid
from treediff.diffusion.guidance import ClippedDenoiser, GuidedDenoiser, check_guidance
from treediff.diffusion.parameterization import Prediction, as_x0, check_prediction, target
from treediff.diffusion.presets import DEFAULTS, Settings, image_parts
from treediff.diffusion.samplers import DPMSolverSampler, Sampler
from treediff.diffusion.schedule import NoiseSchedule
from treediff.diffusion.unet import UNet
from treediff.diffusion.weighting import Weighting, simple
from treediff.tree.files import from_header, header_of, require_topology
from treediff.tree.topology import TreeTopology

__all__ = ["LeafConditionedDDPM"]

# Draw numbers of an image: the noise on its condition, the start of its chain, and then one for each step.
_ON_CONDITION, _START, _STEPS = -1, 0, 1


class ImageTree(Protocol):
    """Model of images with a tree of latents, such as a `TreeVAE`: its shapes, device and dtype."""

    inputs: tuple[int, ...]
    latent: tuple[int, ...]

    @property
    def topology(self) -> TreeTopology: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class LeafConditionedDDPM(nn.Module):
    """Diffusion model of images, conditioned on a node of a tree: a U-Net, a conditioner, and a noise schedule.

    `LeafConditionedDDPM.for_tree` and `.for_images` choose good parts. `denoiser` returns the denoiser of a condition,
    for any sampler; `sample` runs a sampler.

    Args:
        unet: the network.
        conditioner: turns conditions into inputs of the network, which must be built for its `channels` and `context`.
        topology: the tree.
        schedule: the noise schedule.
        prediction: what the network predicts: 'epsilon', 'x0' or 'v'.
        weighting: from log-SNRs to the weight of each noise level in the loss.
        coarsen: share of the rows that training conditions on only a node on the path to the leaf, of a depth drawn
            evenly; see `TreeCondition.coarser`. From these rows the model learns the images of clusters at any level,
            and from the rows at the root the unconditional model that guidance needs.
        condition_noise: greatest noise level put on the condition's image in training; 0 for none.
        shift: weight of the condition's image in the input of the network, `x_t + shift image`: 1 is formulation 2 of
            DiffuseVAE (Pandey et al., arXiv 2201.00308), 0 is formulation 1.

    Raises:
        ValueError: if network and conditioner do not fit, a share is out of range, there is no such prediction, or
            the prediction is noise under a schedule that ends with `alpha` 0.

    Attributes:
        config: arguments of the factory that built the model; None for a model that was built from parts.

    Examples:
        >>> from treediff import TreeTopology
        >>> model = LeafConditionedDDPM.for_images(
        ...     size=8, channels=1, latent=(4,), topology=TreeTopology.balanced(1), width=16
        ... )
        >>> condition = TreeCondition.at([1, 2])
        >>> model.loss(torch.rand(2, 1, 8, 8), condition).shape
        torch.Size([])
        >>> model.sample(condition, steps=2).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        unet: UNet,
        conditioner: Conditioner,
        topology: TreeTopology,
        schedule: NoiseSchedule,
        prediction: Prediction = "v",
        weighting: Weighting = simple,
        coarsen: float = 0.2,
        condition_noise: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.prediction = check_prediction(prediction)
        _check_parts(unet, conditioner)
        for name, share in (("coarsen", coarsen), ("condition_noise", condition_noise)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {share}")
        if prediction == "epsilon" and schedule.ends_in_noise:
            raise ValueError(
                "prediction='epsilon' is undefined where nothing of the image is left, and this schedule has "
                "alpha(1) = 0; use 'v' or 'x0', or a schedule with alpha(1) > 0"
            )
        self.unet, self.conditioner, self.index = unet, conditioner, NodeIndex(topology, unet.out.weight.device)
        self.schedule, self.weighting = schedule, weighting
        self.coarsen, self.condition_noise, self.shift = coarsen, condition_noise, shift
        self.config: dict[str, Any] | None = None

    @classmethod
    def for_images(
        cls,
        *,
        size: int | tuple[int, int],
        latent: tuple[int, ...],
        topology: TreeTopology,
        channels: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """Build a model for images in [0, 1].

        Args:
            size: height and width, or one number for both.
            latent: shape of one latent of the tree.
            topology: the tree.
            channels: 1 for grey, 3 for colour.
            generator: gives the seed of the initial weights; the seed 0 if not given.
            device: device of the model.
            dtype: dtype of the weights.
            **settings: see `treediff.diffusion.presets.Settings`. A file of the model names the modules among the
                settings, and `load` expects these modules again.

        Raises:
            TypeError: if there is no such setting.
            ValueError: if a setting is out of range, or there is no schedule, prediction or condition of that name.

        Examples:
            >>> tree = TreeTopology.balanced(1)
            >>> model = LeafConditionedDDPM.for_images(size=8, latent=(4,), topology=tree, width=16)
            >>> model.unet.stem.weight.shape
            torch.Size([16, 2, 3, 3])
        """
        arguments: dict[str, Any] = {
            "size": check_size("size", size),
            "channels": channels,
            "latent": latent,
            **DEFAULTS,
            **settings,
        }
        own: dict[str, object] = {
            name: value for name, value in arguments.items() if isinstance(value, nn.Module | NoiseSchedule)
        }
        own |= {"weighting": settings["weighting"]} if "weighting" in settings else {}
        with drawing_from(generator):  # weights are drawn when layers are built
            model = cls(**image_parts(**arguments, topology=topology, device=device, dtype=dtype))
        arguments = {name: value for name, value in arguments.items() if name not in own}
        model.config = io.record("for_images", arguments, own)
        return model

    @classmethod
    def for_tree(
        cls,
        tree: ImageTree,
        *,
        size: int | tuple[int, int] | None = None,
        channels: int | None = None,
        generator: torch.Generator | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """Build a model for the latents and tree of a TreeVAE; other arguments as for `for_images`.

        Args:
            tree: the TreeVAE.
            size: height and width of the images, if the TreeVAE observes features of the images; then `condition` is
                'tree_diffusion' by default. The images that the TreeVAE observes if not given.
            channels: of the images, if `size` is given; 3 by default.
            generator: gives the seed of the initial weights; the seed 0 if not given.
            **settings: see `treediff.diffusion.presets.Settings`.

        Raises:
            ValueError: if the TreeVAE observes no images and there is no size, there are channels without a size, or
                as for `for_images`.
        """
        if size is not None:
            size, channels = check_size("size", size), 3 if channels is None else channels
            settings = {"condition": "tree_diffusion", **settings}
        elif len(tree.inputs) != 3 or channels is not None:
            raise ValueError(
                f"expected a tree of images (C, H, W), found one of inputs of shape {tree.inputs}; give size= and "
                "channels= of the images whose features a tree observes"
            )
        else:
            channels, size = tree.inputs[0], tree.inputs[1:]
        return cls.for_images(
            size=size,
            channels=channels,
            latent=tree.latent,
            topology=tree.topology,
            device=tree.device,
            dtype=tree.dtype,
            generator=generator,
            **settings,
        )

    @property
    def topology(self) -> TreeTopology:
        """Tree of the conditions."""
        return self.index.topology

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.unet.out.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.unet.out.weight.device

    # --- running -------------------------------------------------------------------------------------------

    def forward(self, x_t: Tensor, t: Tensor, condition: TreeCondition) -> Tensor:
        """Predict noise, image or velocity for `x_t` (from -1 to 1, with noise) at times `(B,)`."""
        return self.predict(x_t, t, condition, self.conditioner(condition))

    def predict(self, x_t: Tensor, t: Tensor, condition: TreeCondition, signal: Signal) -> Tensor:
        """Run the network with a precomputed conditioning signal; otherwise as `forward`."""
        if self.shift and condition.image is not None:
            known = condition.is_known()[:, None, None, None]
            x_t = x_t + self.shift * torch.where(known, 2 * condition.image - 1, 0).to(x_t.dtype)
        if signal.image is not None:
            x_t = torch.cat([x_t, signal.image.to(x_t.dtype)], 1)
        output: Tensor = self.unet(x_t, t, signal.vector, signal.tokens, signal.mask)
        return output

    def check(self, x: Tensor, condition: TreeCondition) -> None:
        """Raise unless images fit the model, and there is a condition for each image; values are read on a CPU only.

        Raises:
            TypeError: if `x` is not a floating-point tensor, or of another dtype than the weights.
            ValueError: if `x` has another shape, is not finite or leaves [0, 1], or has another number of rows.
        """
        shape = (self.unet.out_channels, *self.unet.size)
        check_batch(x, shape, self.unet.out.weight.dtype, (0.0, 1.0), "images")
        if len(condition) != len(x):
            raise ValueError(f"condition must have one row for each of the {len(x)} images, found {len(condition)}")

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: io.Path) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.core.io`."""
        io.save_model(self, path, self.header())

    def header(self) -> dict[str, Any]:
        """Return the header of a file of the model: the arguments of its factory, with the current settings."""
        header = header_of(self)
        if self.config is not None:
            today = {name: getattr(self, name) for name in ("coarsen", "condition_noise", "shift", "prediction")}
            header["config"] = {**self.config, "for_images": {**self.config["for_images"], **today}}
        return header

    @classmethod
    @lasting()
    def load(cls, path: io.Path, *, model: Self | None = None, **parts: Unpack[Settings]) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: for a model built from parts, a model on the same tree to fill. If the file does not fit, this model
                is unchanged.
            **parts: the modules that were given to the factory in place of the modules that it builds.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit, or if parts are missing.
        """
        header, tensors = io.read_model(path, cls.__name__)
        if model is None:
            model = from_header(cls, header, path, parts)
        else:
            model.check_tree(header, path)
        io.fill(model, tensors, path)
        return model

    def check_tree(self, header: Mapping[str, Any], path: io.Path) -> None:
        """Raise ValueError if a header names another tree, whose weights may have the same shapes."""
        found = require_topology(header, path)
        if found != self.topology:
            raise ValueError(
                f"the model in {os.fspath(path)!r} is on another tree, {found}, than the given one, "
                f"{self.topology}; build one on the tree of the file"
            )

    # --- training -----------------------------------------------------------------------------------------

    def loss(
        self,
        x: Tensor,
        condition: TreeCondition,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the mean of `weight(t) (output - target)^2` over images and pixels, a scalar (Ho et al., eq. 14).

        Args:
            x: `(B, C, H, W)` in [0, 1].
            condition: the condition of each image.
            t: `(B,)` times from 0, the data, to 1; by default spread evenly over all noise levels from a random start
                (Kingma et al., arXiv 2107.00630, appendix I.1), whole steps for a discrete schedule.
            noise: standard normal, of the shape and dtype of `x`; drawn if not given.
            generator: source of times, noise, and the rows whose details are hidden; on the images' device.

        Raises:
            TypeError: if `x` is not a floating-point tensor, `t` is not floating point, or noise has another dtype.
            ValueError: if `x` is empty, has another shape, is not finite or leaves [0, 1]. Also if there is not one
                condition and one time for each image, noise has another shape, or (read on a CPU only) a time is NaN
                or outside of [0, 1].
        """
        self.check(x, condition)
        if not len(x):
            raise ValueError("a loss is a mean over images, found an empty batch; leave it out")
        uniform = torch.rand(4, len(x), generator=generator, device=x.device)
        if t is None:
            t = self._times(uniform[0])
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        check_noise(noise, x, "x")
        if self.condition_noise and condition.image is not None:
            image = condition.image
            on_image = torch.randn(image.shape, generator=generator, dtype=image.dtype, device=x.device)
            condition = condition.noised(self.condition_noise * uniform[1], on_image)
        if self.coarsen:
            condition = condition.coarser(self.index, uniform[2] < self.coarsen, uniform[3])
        clean = 2 * x - 1
        alpha, sigma = (f(t).to(x.dtype).view(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        output = self(alpha * clean + sigma * noise, t, condition)
        error = (output - target(self.prediction, clean, noise, alpha, sigma)).square().flatten(1).mean(1)
        weighted: Tensor = self.weighting(self.schedule.log_snr(t)) * error
        return weighted.mean()

    def _times(self, uniform: Tensor) -> Tensor:
        """Return `(B,)` times, each uniformly distributed, but together evenly spread."""
        shares = (uniform[:1] + torch.arange(len(uniform), device=uniform.device) / max(1, len(uniform))) % 1
        if self.schedule.steps is None:
            return self.schedule.first + (1 - self.schedule.first) * shares
        return ((shares * self.schedule.steps).floor() + 1) / self.schedule.steps

    # --- generating ---------------------------------------------------------------------------------------

    def denoiser(
        self,
        condition: TreeCondition,
        *,
        guidance: float | Tensor = 1.0,
        away_from: str = "root",
        rescale: float = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
    ) -> Denoiser:
        """Return the denoiser of images from -1 to 1 under a condition, for any sampler.

        Args:
            condition: the condition of each image.
            guidance: weight of the condition, a number or one number for each image; 1 for no guidance.
            away_from: node that guidance leads away from: the 'root' (any image), the 'parent' of each node, or the
                'sibling' of each node.
            rescale: see `GuidedDenoiser`.
            interval: see `GuidedDenoiser`.
            clip: whether estimates are clipped to [-1, 1].

        Raises:
            ValueError: if `away_from` is none of these, a setting is out of range, or guidance leads away from
                inner nodes under a model with `coarsen` 0.
        """
        places = {"root": self.index.paths[0, 0], "parent": self.index.parent, "sibling": self.index.sibling}
        if away_from not in places:
            raise ValueError(f"away_from must be one of {', '.join(places)}; found {away_from!r}")
        check_guidance(rescale, interval)
        denoiser: Denoiser = _Conditioned(self, condition, self.conditioner(condition))
        if not (isinstance(guidance, float | int) and guidance == 1):
            if not self.coarsen and away_from != "sibling":
                raise ValueError(
                    f"guidance away from the {away_from} needs a model that was trained on inner nodes too, found "
                    "coarsen=0; train one with coarsen above 0, or lead away from the 'sibling'"
                )
            place = places[away_from]
            nodes = place.expand(len(condition)) if place.ndim == 0 else place[self.index.rank_of(condition.node)]
            other = TreeCondition.at(nodes)
            negative = _Conditioned(self, other, self.conditioner(other))
            denoiser = GuidedDenoiser(denoiser, negative, guidance, rescale, interval)
        return ClippedDenoiser(denoiser) if clip else denoiser

    @torch.no_grad()
    def sample(
        self,
        condition: TreeCondition,
        *,
        sampler: Sampler | None = None,
        steps: int = 20,
        grid: str | Grid = "uniform",
        start: Tensor | None = None,
        start_time: float = 1.0,
        condition_noise: float = 0.0,
        first_index: int = 0,
        generator: torch.Generator | None = None,
        callback: Callable[[Progress], object] | None = None,
        **guidance: Any,  # noqa: ANN401
    ) -> Tensor:
        """Draw an image for each condition, `(B, C, H, W)` in [0, 1].

        Image `i` is drawn from noise that depends on the generator's seed and on `first_index + i` only. The model runs
        in evaluation mode, without dropout, whatever its current mode.

        Args:
            condition: the condition of each image.
            sampler: DPM-Solver++(2M) by default.
            steps: number of steps.
            grid: 'uniform', 'trailing', 'quadratic', 'karras', or a function with their arguments.
            start: `(B, C, H, W)` in [0, 1]: images to begin with, to which noise of `start_time` is added.
            start_time: time at which the chain begins, rounded to a step of a discrete schedule; below 1 only with
                `start`.
            condition_noise: level of noise on the condition's image, at most the level of training. A low level hides
                how images of the prior differ from images of training (Ho et al., arXiv 2106.15282, section 4.2).
            first_index: index of the first image, to continue a series.
            generator: gives the seed.
            callback: called with the progress after each step; the images in it are from -1 to 1.
            **guidance: settings of `denoiser`.

        Raises:
            ValueError: if there is no grid of that name, `start_time` is not 1 without `start`, a setting is out of
                range, or `condition_noise` is above 0 on a condition without an image.
        """
        if isinstance(grid, str):
            if grid not in GRIDS:
                raise ValueError(f"grid must be one of {', '.join(GRIDS)}, or a function; found {grid!r}")
            grid = GRIDS[grid]
        if start is None and start_time != 1:
            raise ValueError(f"a chain that begins at t = {start_time} needs images to begin with; pass start=")
        times = grid(self.schedule, steps, start=start_time)
        weight = self.unet.out.weight
        seed = combine_seeds(seed_from(generator), 1)  # independent of the draws of the tree
        index = torch.arange(first_index, first_index + len(condition), device=weight.device)
        shape = (self.unet.out_channels, *self.unet.size)
        x = counter_normal(seed, index, shape, draw=_START, dtype=weight.dtype)
        condition = self._noised(condition, condition_noise, seed, index)
        if start is not None:
            self.check(start, condition)
            x = self.schedule.add_noise(2 * start - 1, x, float(times[0]))
        noise = NoiseStream(seed, index, shape, weight.dtype)
        with evaluating(self):
            x = (sampler or DPMSolverSampler())(
                self.denoiser(condition, **guidance), x, times, noise=lambda i: noise(i + _STEPS), callback=callback
            )
        return ((x + 1) / 2).clamp(0, 1)

    def _noised(self, condition: TreeCondition, level: float, seed: int, index: Tensor) -> TreeCondition:
        """Return the condition with noise of one level on every image."""
        if not 0 <= level <= self.condition_noise:
            raise ValueError(
                f"condition_noise must be between 0 and the greatest level of training, {self.condition_noise}, found "
                f"{level}; for more noise, train a model that was built with a greater condition_noise"
            )
        if not level:
            return condition
        image = condition.require_image()
        noise = counter_normal(seed, index, image.shape[1:], draw=_ON_CONDITION, dtype=image.dtype)
        return condition.noised(torch.full((len(image),), level, device=image.device), noise)


@dataclass(frozen=True, eq=False)
class _Conditioned:
    """Denoiser of one condition; the signal of the condition is computed once for the whole chain."""

    model: LeafConditionedDDPM
    condition: TreeCondition
    signal: Signal

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        schedule, time = self.schedule, torch.tensor(t, dtype=torch.float64)
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        output = self.model.predict(x_t, times, self.condition, self.signal).to(x_t.dtype)
        return as_x0(self.model.prediction, output, x_t, float(schedule.alpha(time)), float(schedule.sigma(time)))


def _check_parts(unet: UNet, conditioner: Conditioner) -> None:
    if unet.in_channels != unet.out_channels + conditioner.channels:
        raise ValueError(
            f"the network must take the {unet.out_channels} channels of the image and the {conditioner.channels} of "
            f"the conditioner, found {unet.in_channels}"
        )
    if unet.context != conditioner.context:
        raise ValueError(
            f"the network reads tokens of width {unet.context}, the conditioner gives tokens of width "
            f"{conditioner.context}; build the network with context={conditioner.context}"
        )

"""The second stage: a diffusion model that draws images which belong to a place in a tree.

Denoising diffusion (Ho et al., arXiv 2006.11239) conditioned on a leaf, the leaf decoder's image and the path of
latents that leads to it (Diffuse-TreeVAE, arXiv 2407.06124; TreeDiffusion, arXiv 2410.16910), or on any node. It knows
the tree but not the TreeVAE: conditions come as data, see `TreeCondition`.

Letters: `B` batch, `C H W` image, `N` nodes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.conditioning import Conditioner, Signal
from treediff.diffusion.grids import GRIDS, Grid
from treediff.diffusion.guidance import ClippedDenoiser, GuidedDenoiser
from treediff.diffusion.parameterization import Prediction, as_x0, check_prediction, target
from treediff.diffusion.presets import PresetParts, preset_parts
from treediff.diffusion.samplers import Denoiser, DPMSolverSampler, Progress, Sampler
from treediff.diffusion.schedule import NoiseSchedule
from treediff.diffusion.unet import UNet
from treediff.diffusion.weighting import Weighting, simple
from treediff.io import load_into, read_header, save_model
from treediff.networks import TreeNetworks, _dtype, check_values
from treediff.noise import NoiseStream, combine_seeds, counter_normal, seed_from
from treediff.topology import TreeTopology

__all__ = ["LeafConditionedDDPM"]

_STEPS = 1  # draws of a chain begin after that of its start


class LeafConditionedDDPM(nn.Module):
    """A denoiser of images that is told where in the tree they belong.

    Args:
        unet: the network.
        conditioner: what the network is told; its `channels` and `context` must be those the network was built for.
        topology: the tree.
        schedule: the noise schedule.
        prediction: what the network predicts: 'epsilon', 'x0' or 'v'.
        weighting: from log-SNRs to the weight of each noise level in the loss.
        coarsen: share of the rows that training tells only a node on the path to the leaf, of a depth drawn evenly; see
            `TreeCondition.coarser`. From these the model learns what a cluster at any level looks like, and from those
            at the root the unconditional one that guidance needs.
        condition_noise: greatest noise level put on the condition's image in training; 0 for none.
        shift: weight of the condition's image in what the network sees, `x_t + shift image`: 1 is formulation 2 of
            DiffuseVAE (Pandey et al., arXiv 2201.00308), 0 is formulation 1.

    Raises:
        ValueError: if network and conditioner do not fit, a share is out of range, there is no such prediction, or
            noise is to be predicted under a schedule at whose end nothing of the image is left.

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
                "at t = 1 this schedule has nothing of the image left, where predicted noise says nothing of it; "
                "predict 'v' or 'x0', or choose a schedule that stops before"
            )
        self.unet, self.conditioner, self.index = unet, conditioner, NodeIndex(topology)
        self.schedule, self.weighting = schedule, weighting
        self.coarsen, self.condition_noise, self.shift = coarsen, condition_noise, shift
        self.config: dict[str, Any] | None = None

    @classmethod
    def for_images(cls, **settings: Any) -> Self:  # noqa: ANN401
        """A model with parts chosen for you; see `treediff.diffusion.presets.PresetParts` for the settings."""
        preset = PresetParts(**settings)
        model = cls(**preset_parts(preset))
        model.config = preset.to_config()
        return model

    @classmethod
    def for_tree(cls, tree: TreeNetworks, **settings: Any) -> Self:  # noqa: ANN401
        """A model for the images, latents and tree of a TreeVAE; settings as for `for_images`.

        Raises:
            ValueError: if the TreeVAE is not one of images.
        """
        if len(tree.inputs) != 3:
            raise ValueError(f"expected a tree of images (C, H, W), found one of inputs of shape {tree.inputs}")
        channels, *size = tree.inputs
        known = {"size": tuple(size), "channels": channels, "latent": tree.latent, "topology": tree.topology}
        return cls.for_images(**known, device=tree.device, dtype=tree.dtype, **settings)

    # --- training -----------------------------------------------------------------------------------------

    def forward(self, x_t: Tensor, t: Tensor, condition: TreeCondition) -> Tensor:
        """What the network says of `x_t` (from -1 to 1, with noise) at times `(B,)`: noise, image or velocity."""
        return self.told(x_t, t, condition, self.conditioner(condition))

    def told(self, x_t: Tensor, t: Tensor, condition: TreeCondition, signal: Signal) -> Tensor:
        """The same with what the conditioner says already at hand."""
        if self.shift and condition.image is not None:
            known = condition.is_known()[:, None, None, None]
            x_t = x_t + self.shift * torch.where(known, 2 * condition.image - 1, 0).to(x_t.dtype)
        if signal.image is not None:
            x_t = torch.cat([x_t, signal.image.to(x_t.dtype)], 1)
        output: Tensor = self.unet(x_t, t, signal.vector, signal.tokens, signal.mask)
        return output

    def loss(
        self,
        x: Tensor,
        condition: TreeCondition,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The mean of `weight(t) (output - target)^2` over images and pixels, a scalar (Ho et al., eq. 14).

        Args:
            x: `(B, C, H, W)` in [0, 1].
            condition: where each image belongs.
            t: `(B,)` times; by default spread evenly over all noise levels from a random start (Kingma et al., arXiv
                2107.00630, appendix I.1), whole steps for a discrete schedule.
            noise: standard normal, shaped like `x`; drawn if not given.
            generator: where times, noise, and what is hidden from the network come from.

        Raises:
            TypeError: if `x` is no floating-point tensor.
            ValueError: if `x` has another shape, is not finite or leaves [0, 1]; or if there is not one place for each
                image.
        """
        self._check(x, condition)
        uniform = torch.rand(4, len(x), generator=generator, device=x.device)
        if t is None:
            t = self._times(uniform[0])
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        if self.condition_noise and condition.image is not None:
            on_image = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
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
        """`(B,)` times, each as likely as any other, but together evenly spread."""
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
        """The denoiser of images from -1 to 1 under a condition, for any sampler.

        Args:
            condition: where the images belong.
            guidance: weight of the condition; 1 for no guidance; a number, or one for each image.
            away_from: what guidance leads away from: the 'root' (anything at all), the 'parent' of each node, or its
                'sibling'.
            rescale: see `GuidedDenoiser`.
            interval: see `GuidedDenoiser`.
            clip: whether estimates are kept from -1 to 1.

        Raises:
            ValueError: if `away_from` is none of these, or a setting is out of range.
        """
        places = {"root": self.index.paths[0, 0], "parent": self.index.parent, "sibling": self.index.sibling}
        if away_from not in places:
            raise ValueError(f"away_from must be one of {', '.join(places)}; found {away_from!r}")
        denoiser: Denoiser = _Conditioned(self, condition, self.conditioner(condition))
        if not (isinstance(guidance, float | int) and guidance == 1):
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
        first_index: int = 0,
        generator: torch.Generator | None = None,
        callback: Callable[[Progress], object] | None = None,
        **guidance: Any,  # noqa: ANN401
    ) -> Tensor:
        """Draw an image for each condition, `(B, C, H, W)` in [0, 1].

        Image `i` is drawn from noise that depends on the generator's seed and on `first_index + i` only.

        Args:
            condition: where each image belongs.
            sampler: DPM-Solver++(2M) by default.
            steps: number of steps.
            grid: 'uniform', 'trailing', 'quadratic', 'karras', or a function like those.
            start: `(B, C, H, W)` in [0, 1]: images to begin with, once noise of `start_time` is on them.
            start_time: where the chain begins; below 1 only with a start.
            first_index: index of the first image, to continue a series.
            generator: gives the seed.
            callback: told of each step; its images are from -1 to 1.
            **guidance: settings of `denoiser`.

        Raises:
            ValueError: if the grid has no such name, a chain begins late without a start, or a setting is out of range.
        """
        if isinstance(grid, str):
            if grid not in GRIDS:
                raise ValueError(f"grid must be one of {', '.join(GRIDS)}, or a function; found {grid!r}")
            grid = GRIDS[grid]
        if start is None and start_time != 1:
            raise ValueError(f"a chain that begins at t = {start_time} needs images to begin with; pass start=")
        times = grid(self.schedule, steps, start=start_time)
        weight = self.unet.out.weight
        seed = combine_seeds(seed_from(generator), 1)  # apart from the draws of the tree
        index = torch.arange(first_index, first_index + len(condition), device=weight.device)
        shape = (self.unet.out_channels, *self.unet.size)
        x = counter_normal(seed, index, shape, dtype=weight.dtype)
        if start is not None:
            self._check(start, condition)
            x = self.schedule.add_noise(2 * start - 1, x, start_time)
        noise = NoiseStream(seed, index, shape, weight.dtype)
        x = (sampler or DPMSolverSampler())(
            self.denoiser(condition, **guidance), x, times, noise=lambda i: noise(i + _STEPS), callback=callback
        )
        return ((x + 1) / 2).clamp(0, 1)

    def _check(self, x: Tensor, condition: TreeCondition) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"expected floating-point images, found {found}; divide 8-bit images by 255")
        wanted = (self.unet.out_channels, *self.unet.size)
        if tuple(x.shape[1:]) != wanted or x.ndim != 4:
            raise ValueError(f"expected images of shape (B, {', '.join(map(str, wanted))}), found {tuple(x.shape)}")
        if len(condition) != len(x):
            raise ValueError(f"expected a place in the tree for each of the {len(x)} images, found {len(condition)}")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_values(x, (0.0, 1.0))

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.io`."""
        save_model(self, path, self.header())

    def header(self) -> dict[str, Any]:
        """What a file says of the model besides its weights."""
        topology, dtype = json.loads(self.index.topology.to_json()), str(self.unet.out.weight.dtype)
        return {"config": self.config, "topology": topology, "dtype": dtype.removeprefix("torch.")}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Self | None = None) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model on the same tree to fill, for one built from parts of your own. It stays as it was if the
                file does not fit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if it was saved from a
                model built from parts and none is given.
        """
        header = read_header(path, cls.__name__)
        if model is None:
            model = cls.from_header(header, path)
        else:
            model.check_tree(header, path)
        load_into(model, path)
        return model

    def check_tree(self, header: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        """Raise ValueError if a header tells of another tree, whose weights may have the same shapes."""
        found = TreeTopology.from_json(json.dumps(header.get("topology")))
        if found != self.index.topology:
            raise ValueError(
                f"the model in {os.fspath(path)!r} is on another tree, {found}, than the given one, "
                f"{self.index.topology}; build one on the tree of the file"
            )

    @classmethod
    def from_header(cls, header: Mapping[str, Any], path: str | os.PathLike[str]) -> Self:
        """The model that a file's header describes, without its weights; the path is for messages.

        Raises:
            ValueError: if it was built from parts, which no header describes, or the header is damaged.
        """
        if header.get("config") is None:
            raise ValueError(
                f"the model in {os.fspath(path)!r} was built from parts, which a file does not hold; build it the "
                "same way and pass it as model="
            )
        topology = TreeTopology.from_json(json.dumps(header.get("topology")))
        preset = replace(
            PresetParts.from_config(header["config"], topology), dtype=_dtype(header.get("dtype", "float32"), path)
        )
        try:
            with torch.random.fork_rng(devices=[]):  # weights are drawn as the network is built, and then replaced
                return cls.for_images(**vars(preset))
        except TypeError as error:
            raise ValueError(f"the configuration {header['config']!r} does not describe a model: {error}") from error


@dataclass(frozen=True)
class _Conditioned:
    """The denoiser of one condition; what the network is told is worked out once for the whole chain."""

    model: LeafConditionedDDPM
    condition: TreeCondition
    signal: Signal

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        schedule, time = self.schedule, torch.tensor(t, dtype=torch.float64)
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        output = self.model.told(x_t, times, self.condition, self.signal).to(x_t.dtype)
        return as_x0(self.model.prediction, output, x_t, float(schedule.alpha(time)), float(schedule.sigma(time)))


def _check_parts(unet: UNet, conditioner: Conditioner) -> None:
    if unet.in_channels != unet.out_channels + conditioner.channels:
        raise ValueError(
            f"the network must take the {unet.out_channels} channels of the image and the {conditioner.channels} of "
            f"the conditioner, found {unet.in_channels}"
        )
    if unet.context != conditioner.context:
        raise ValueError(
            f"the network reads tokens of width {unet.context}, the conditioner gives some of width "
            f"{conditioner.context}; build the network with context={conditioner.context}"
        )

"""The second stage: a diffusion model that draws images which belong to a place in a tree.

Denoising diffusion (Ho et al., arXiv 2006.11239) conditioned on a leaf, the leaf decoder's image and the path of
latents that leads to it (Diffuse-TreeVAE, arXiv 2407.06124; TreeDiffusion, arXiv 2410.16910), or on any node. It knows
the tree but not the TreeVAE: conditions come as data, see `TreeCondition`.

Letters: `B` batch, `C H W` image, `N` nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treediff.core.checks import check_noise
from treediff.core.modes import evaluating
from treediff.core.noise import NoiseStream, combine_seeds, counter_normal, seed_from
from treediff.diffusion.condition import TreeCondition
from treediff.diffusion.conditioners import Signal
from treediff.diffusion.ddpm_networks import DDPMNetworks
from treediff.diffusion.denoiser import Denoiser, Progress
from treediff.diffusion.grids import GRIDS, Grid
from treediff.diffusion.guidance import ClippedDenoiser, GuidedDenoiser, check_guidance
from treediff.diffusion.parameterization import as_x0, target
from treediff.diffusion.samplers import DPMSolverSampler, Sampler
from treediff.diffusion.schedule import NoiseSchedule

__all__ = ["LeafConditionedDDPM"]

# Draws of an image: the noise on its condition, the start of its chain, and from then on one for each step.
_ON_CONDITION, _START, _STEPS = -1, 0, 1


class LeafConditionedDDPM(DDPMNetworks):
    """A denoiser of images that is told where in the tree they belong.

    `LeafConditionedDDPM.for_tree` and `.for_images` choose good parts; for parts of your own see `DDPMNetworks`.

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
        """The mean of `weight(t) (output - target)^2` over images and pixels, a scalar (Ho et al., eq. 14).

        Args:
            x: `(B, C, H, W)` in [0, 1].
            condition: where each image belongs.
            t: `(B,)` times from 0, the data, to 1; by default spread evenly over all noise levels from a random start
                (Kingma et al., arXiv 2107.00630, appendix I.1), whole steps for a discrete schedule.
            noise: standard normal, of the shape and dtype of `x`; drawn if not given.
            generator: where times, noise, and what is hidden from the network come from; on the images' device.

        Raises:
            TypeError: if `x` is no floating-point tensor, `t` is not floating point, or noise has another dtype.
            ValueError: if `x` is empty, has another shape, is not finite or leaves [0, 1]; if there is not one place
                and one time for each image, or noise has another shape; or (looked at on a CPU only) if a time is NaN
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
            ValueError: if `away_from` is none of these, a setting is out of range, or the model has no idea of what
                guidance is to lead away from, because its `coarsen` is 0.
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

        Image `i` is drawn from noise that depends on the generator's seed and on `first_index + i` only. Whatever mode
        the model is in, it draws in that of evaluation, without dropout.

        Args:
            condition: where each image belongs.
            sampler: DPM-Solver++(2M) by default.
            steps: number of steps.
            grid: 'uniform', 'trailing', 'quadratic', 'karras', or a function like those.
            start: `(B, C, H, W)` in [0, 1]: images to begin with, once noise of `start_time` is on them.
            start_time: where the chain begins, rounded to a step where the schedule has steps; below 1 only with a
                start.
            condition_noise: level of noise on the condition's image, at most that of training. A little of it hides how
                an image of the prior differs from those of training (Ho et al., arXiv 2106.15282, section 4.2).
            first_index: index of the first image, to continue a series.
            generator: gives the seed.
            callback: told of each step; its images are from -1 to 1.
            **guidance: settings of `denoiser`.

        Raises:
            ValueError: if the grid has no such name, a chain begins late without a start, a setting is out of range, or
                noise is to go on a condition without an image.
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
        """The condition with noise of one level on every image."""
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

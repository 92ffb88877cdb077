"""Steps run one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from treediff.augment._checks import check_images
from treediff.augment.resampling import warp
from treediff.augment.steps import ColorStep, GeometricStep

__all__ = ["Augment"]


class Augment:
    """Steps run one after the other on a batch of images.

    Neighbouring geometric steps are fused: their matrices are multiplied and the pixels interpolated once.

    Args:
        steps: in the order in which they happen.

    Raises:
        TypeError: if a step is neither a `GeometricStep` nor a `ColorStep`.

    Examples:
        >>> from treediff.augment import RandomFlip, RandomGray, RandomResizedCrop
        >>> augment = Augment(RandomResizedCrop(scale=(0.5, 1.0)), RandomFlip(), RandomGray(p=0.2))
        >>> images = torch.rand(4, 3, 8, 8)
        >>> augment(images, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, *steps: GeometricStep | ColorStep) -> None:
        for step in steps:
            if not isinstance(step, GeometricStep | ColorStep):
                raise TypeError(
                    "expected steps such as RandomFlip(p=0.5), each a GeometricStep or a ColorStep; found "
                    f"{step!r} of type {type(step).__name__}"
                )
        self.steps = steps

    @property
    def draws(self) -> int:
        """How many uniform numbers an image needs for all steps together."""
        return sum(step.draws for step in self.steps)

    def __call__(
        self, images: Tensor, *, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Change every image in its own way.

        Args:
            images: `(B, C, H, W)` in [0, 1], floating point. Half precision is computed in float32.
            generator: where the numbers come from, on any device; None for torch's default generator. Drawn
                on a CPU, the numbers of image `i` do not depend on how many images follow it.
            noise: `(B, draws)` numbers in [0, 1) to use instead, for `torch.compile(fullgraph=True)` or for
                numbers tied to the image rather than to its place in the batch.

        Returns:
            Images in [0, 1] of the same shape, dtype and device.

        Raises:
            ValueError: if the images do not have four axes, the noise has the wrong shape or comes together
                with a generator, or a colour step meets a number of channels other than 1 and 3.
            TypeError: if the images or the noise are not floating point.
        """
        check_images(images)
        uniform = self._uniform(images, generator, noise)
        # Autocast would round the matrices to bfloat16, and with them every pixel's position.
        with torch.autocast(images.device.type, enabled=False):
            half = images.dtype in (torch.float16, torch.bfloat16)
            return self._run(images.float() if half else images, uniform).to(images.dtype)

    def __repr__(self) -> str:
        return f"Augment({', '.join(map(repr, self.steps))})"

    def _uniform(self, images: Tensor, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
        """One row of numbers per image, drawn where the generator lives."""
        shape = (len(images), self.draws)
        if noise is None:
            device = images.device if generator is None else generator.device
            # Always float32, so that one seed means one set of parameters whatever the images' dtype.
            noise = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
            return noise.to(images.device)
        if generator is not None:
            raise ValueError("expected either generator or noise, found both; noise leaves nothing to draw")
        if noise.shape != shape:
            raise ValueError(
                f"expected noise of shape {shape}, one row per image and one column per draw; found "
                f"{tuple(noise.shape)}; make it with torch.rand(len(images), augment.draws)"
            )
        if not noise.is_floating_point():
            raise TypeError(
                f"expected noise of numbers in [0, 1), found {noise.dtype}; make it with torch.rand(len(images), "
                "augment.draws)"
            )
        return noise

    def _run(self, images: Tensor, uniform: Tensor) -> Tensor:
        height, width = images.shape[2:]
        pending: Tensor | None = None
        columns = torch.split_with_sizes(uniform.to(images.dtype), [step.draws for step in self.steps], 1)
        for step, numbers in zip(self.steps, columns, strict=True):
            if isinstance(step, GeometricStep):
                matrices = step.matrices(numbers, height, width)
                # A matrix leads from output back to input, so the later step is applied to a position first.
                pending = matrices if pending is None else pending @ matrices
                continue
            if pending is not None:
                images, pending = warp(images, pending), None
            images = step.recolor(images, numbers)
        return images if pending is None else warp(images, pending)

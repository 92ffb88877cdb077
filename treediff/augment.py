"""Random changes to whole batches of images, every image with parameters of its own.

A *step* is a frozen description (`RandomFlip(p=0.5)`); `Augment` runs steps in order. All randomness of a
call is one table of uniform numbers, a row per image, drawn from `generator` or given as `noise`. Steps that
move pixels give one matrix per image, and neighbouring ones are multiplied, so that a picture is resampled
once, not once per step. Colour steps work on all pixels at once. There is no loop over images and nothing
waits for the device.

Images are `(B, C, H, W)` in [0, 1]; that they are in range is trusted, since checking would wait for the
device. Grey images (`C = 1`) are welcome everywhere: saturation, hue and `RandomGray` leave them as they are,
which is what they would do to a colour image with three equal channels.

Letters: `B` images, `C` channels, `H W` height and width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Augment",
    "ColorJitter",
    "ColorStep",
    "GeometricStep",
    "RandomAffine",
    "RandomFlip",
    "RandomGray",
    "RandomResizedCrop",
    "adjust_brightness",
    "adjust_contrast",
    "adjust_hue",
    "adjust_saturation",
    "celeba_augment",
    "cifar_augment",
    "contrastive_views",
    "gray",
    "hsv_to_rgb",
    "omniglot_augment",
    "rgb_to_hsv",
    "warp",
]

# --- what a step is -----------------------------------------------------------------------------------------


class GeometricStep(ABC):
    """A step that moves pixels: it turns uniform numbers into one matrix per image, for `warp`."""

    draws: ClassVar[int]
    """How many uniform numbers an image needs."""

    @abstractmethod
    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """`(B, draws)` numbers in [0, 1) to `(B, 3, 3)` matrices from output to input positions."""


class ColorStep(ABC):
    """A step that changes colours and leaves pixels where they are."""

    draws: ClassVar[int]
    """How many uniform numbers an image needs."""

    @abstractmethod
    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """`(B, C, H, W)` images and `(B, draws)` numbers in [0, 1) to images of the same shape."""


class Augment:
    """Steps run one after the other on a batch of images.

    Neighbouring geometric steps are fused: their matrices are multiplied and the pixels interpolated once.

    Args:
        steps: in the order in which they happen.

    Raises:
        TypeError: if a step is neither a `GeometricStep` nor a `ColorStep`.

    Examples:
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
            TypeError: if the images are not floating point.
        """
        _check_images(images)
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


# --- geometry -----------------------------------------------------------------------------------------------


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample every image through an affine map, bilinearly.

    `output(p) = input(M p)`, with positions `p = (x, y, 1)` running from -1 to 1 between the image's outer
    edges. Positions outside of the image are black; within half a pixel of its edge the edge pixels are
    continued. Nothing is blurred beforehand, so shrinking by much aliases.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        matrices: `(B, 3, 3)` with last row `(0, 0, 1)`.

    Returns:
        `(B, C, H, W)` in [0, 1].

    Examples:
        >>> mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))[None]
        >>> warp(torch.tensor([[[[0.0, 0.25, 1.0]]]]), mirror)
        tensor([[[[1.0000, 0.2500, 0.0000]]]])
    """
    if images.numel() == 0:
        return images  # affine_grid refuses empty batches
    grid = F.affine_grid(matrices[:, :2], list(images.shape), align_corners=False)
    pixels = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Padding with zeros inside of grid_sample would also darken the rim of a crop that touches the edge.
    inside = (grid.abs() <= 1).all(-1).unsqueeze(1)
    return (pixels * inside).clamp(0, 1)  # the four bilinear weights may add up to a rounding above 1


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(GeometricStep):
    """Cut out a random rectangle and stretch it over the whole image.

    The rectangle's share of the area is uniform in `scale`. Its aspect ratio is log-uniform in the part of
    `ratio` at which a rectangle of that area fits into the image (the fitting ratio next to it, if none
    does), so nothing is drawn in vain and the area is always the one drawn. Its place is uniform, not tied to
    whole pixels.

    Args:
        scale: smallest and largest share of the area, above 0 and at most 1.
        ratio: smallest and largest width / height in pixels, above 0.

    Raises:
        ValueError: if a range is empty or out of bounds.

    Source: Inception-style crops (arXiv 1409.4842), as SimCLR (arXiv 2002.05709), appendix A, uses them.

    Examples:
        >>> quarter = RandomResizedCrop(scale=(0.25, 0.25), ratio=(1.0, 1.0))
        >>> quarter.matrices(torch.ones(1, 4), 8, 8)[0]  # the largest x and y: the lower right corner
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 1.0000]])
    """

    draws: ClassVar[int] = 4
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _check_range("scale", self.scale, above=0.0, most=1.0)
        _check_range("ratio", self.ratio, above=0.0)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """The map from the whole image to each image's rectangle, `(B, 3, 3)`."""
        area = _between(uniform[:, 0], *self.scale)
        # Sides are shares of the image's own, w and h: w h = area, and w / h = ratio * height / width. Both
        # stay within the image while |log(w / h)| <= -log(area).
        room = -area.log()
        low, high = (math.log(ratio * height / width) for ratio in self.ratio)
        log_low, log_high = (torch.clamp(torch.full_like(room, x), -room, room) for x in (low, high))
        half_log = 0.5 * (log_low + (log_high - log_low) * uniform[:, 1])
        w, h = area.sqrt() * half_log.exp(), area.sqrt() * (-half_log).exp()
        x, y = ((1 - side) * (2 * at - 1) for side, at in ((w, uniform[:, 2]), (h, uniform[:, 3])))
        return _affine_matrices(w, 0.0, x, 0.0, h, y)


@dataclass(frozen=True, kw_only=True)
class RandomFlip(GeometricStep):
    """Mirror left and right with probability `p`.

    Args:
        p: from 0 to 1.

    Raises:
        ValueError: if `p` is not a probability.

    Examples:
        >>> Augment(RandomFlip(p=1.0))(torch.tensor([[[[0.0, 0.25, 1.0]]]]))
        tensor([[[[1.0000, 0.2500, 0.0000]]]])
    """

    draws: ClassVar[int] = 1
    p: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.p)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """-1 or 1 in front of x, `(B, 3, 3)`."""
        sign = 1 - 2 * (uniform[:, 0] < self.p).to(uniform.dtype)
        return _affine_matrices(sign, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class RandomAffine(GeometricStep):
    """Shear, turn, scale and shift the picture, in this order, about its middle; what is uncovered is black.

    A pixel at `p`, counted from the middle with y pointing down, goes to
    `s R(angle) [[1, tan shear], [0, 1]] p + shift`; a positive angle turns clockwise. All parameters are
    uniform. Angles are true on images that are not square, too.

    Args:
        degrees: largest angle of rotation, to either side.
        translate: largest shift to either side, as a share of the width and of the height.
        scale: smallest and largest enlargement; 1 keeps the size.
        shear: largest horizontal shear to either side, **in degrees**, as in torchvision.

    Raises:
        ValueError: if a number is out of bounds or a range is empty.

    Examples:
        >>> RandomAffine(degrees=10, translate=1 / 28).draws
        5
    """

    draws: ClassVar[int] = 5
    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0

    def __post_init__(self) -> None:
        _check_number("degrees", self.degrees, most=180.0)
        _check_number("translate", self.translate, most=1.0)
        _check_range("scale", self.scale, above=0.0)
        _check_number("shear", self.shear, most=89.0)

    def matrices(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """The inverse of the map above, in positions from -1 to 1, `(B, 3, 3)`."""
        angle, shift_x, shift_y, size, lean = uniform.unbind(1)
        turn = math.radians(self.degrees) * (2 * angle - 1)
        tangent = (math.radians(self.shear) * (2 * lean - 1)).tan()
        # A share t of the width is 2 t in positions from -1 to 1.
        x, y = (2 * self.translate * (2 * shift - 1) for shift in (shift_x, shift_y))
        zoom = _between(size, *self.scale)
        cos, sin = turn.cos() / zoom, turn.sin() / zoom
        # Rotation is a matter of pixels, so x and y trade places at the exchange rate height : width.
        a, b = cos + tangent * sin, (sin - tangent * cos) * (height / width)
        c, d = -sin * (width / height), cos
        return _affine_matrices(a, b, -(a * x + b * y), c, d, -(c * x + d * y))


def _affine_matrices(*entries: Tensor | float) -> Tensor:
    """The first two rows of `(B, 3, 3)` matrices, entry by entry, each `(B,)` or one number for all."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    columns = [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in (*entries, 0.0, 0.0, 1.0)]
    return torch.stack(columns, dim=1).view(-1, 3, 3)


# --- colour -------------------------------------------------------------------------------------------------


def gray(images: Tensor) -> Tensor:
    """Luma `0.299 R + 0.587 G + 0.114 B` (ITU-R BT.601): `(B, 3, H, W)` to `(B, 1, H, W)`; grey images stay.

    Raises:
        ValueError: if there are neither 1 nor 3 channels.

    Examples:
        >>> gray(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).item()
        0.29899999499320984
    """
    _check_channels(images)
    if images.shape[1] == 1:
        return images
    red, green, blue = images.chunk(3, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(factor * images)` to [0, 1], with one factor, at least 0, per image: `(B, C, H, W)` and `(B,)`.

    Examples:
        >>> adjust_brightness(torch.full((1, 1, 1, 2), 0.25), torch.tensor([2.0]))
        tensor([[[[0.5000, 0.5000]]]])
    """
    return (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(mean + factor * (images - mean))` to [0, 1], where `mean` is the mean of the grey picture.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        factor: `(B,)`, at least 0; 0 gives an even grey, 1 the picture itself.

    Examples:
        >>> adjust_contrast(torch.tensor([[[[0.25, 0.75]]]]), torch.tensor([2.0]))
        tensor([[[[0., 1.]]]])
    """
    return _blend(gray(images).mean((1, 2, 3), keepdim=True), images, factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """`clamp(luma + factor * (images - luma))` to [0, 1], pixel by pixel; grey images stay.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        factor: `(B,)`, at least 0; 0 gives the grey picture, 1 the picture itself.

    Examples:
        >>> adjust_saturation(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.zeros(1)).flatten()
        tensor([0.2990, 0.2990, 0.2990])
    """
    return _blend(gray(images), images, factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` of a full circle, in HSV; grey images stay.

    Args:
        images: `(B, C, H, W)` with 1 or 3 channels.
        shift: `(B,)` in turns; 1/3 makes red green, green blue and blue red.

    Examples:
        >>> adjust_hue(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.5])).flatten()
        tensor([0., 1., 1.])
    """
    _check_channels(images)
    if images.shape[1] == 1:
        return images
    hsv = rgb_to_hsv(images)
    turned = hsv[:, :1] + shift.view(-1, 1, 1, 1)
    return hsv_to_rgb(torch.cat([turned, hsv[:, 1:]], dim=1))


def rgb_to_hsv(images: Tensor) -> Tensor:
    """Red, green, blue to hue (in turns, from 0 up to 1), saturation, value: `(B, 3, H, W)` to the same.

    With `V = max`, `c = V - min`: `S = c / V`, and the hue is `(G - B) / 6c`, `1/3 + (B - R) / 6c` or
    `2/3 + (R - G) / 6c`, after the largest channel. Greys have hue 0, black has saturation 0.

    Examples:
        >>> rgb_to_hsv(torch.tensor([0.0, 0.5, 0.5]).view(1, 3, 1, 1)).flatten()
        tensor([0.5000, 1.0000, 0.5000])
    """
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    sixth = 6 * torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        red == value,
        (green - blue) / sixth,
        torch.where(green == value, 1 / 3 + (blue - red) / sixth, 2 / 3 + (red - green) / sixth),
    )
    return torch.stack([hue.remainder(1), chroma / torch.where(value > 0, value, 1), value], dim=1)


def hsv_to_rgb(images: Tensor) -> Tensor:
    """Hue (in turns, any number), saturation, value to red, green, blue: `(B, 3, H, W)` to the same.

    Each channel is `V - V S clamp(min(k, 4 - k))` to [0, 1], with `k = (n + 6 H) mod 6` and `n` = 5, 3, 1.

    Examples:
        >>> hsv_to_rgb(torch.tensor([0.5, 1.0, 0.5]).view(1, 3, 1, 1)).flatten()
        tensor([0.0000, 0.5000, 0.5000])
    """
    hue, saturation, value = images.chunk(3, dim=1)
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    k = (offsets + 6 * hue).remainder(6)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class ColorJitter(ColorStep):
    """Change brightness, contrast, saturation and hue, in this order, of a share `p` of the images.

    Factors are uniform in `[max(0, 1 - strength), 1 + strength]`, the hue's shift in `[-hue, hue]`; a
    strength of 0 skips its part. Results are clamped to [0, 1] after each.

    Args:
        brightness: strength, at least 0; see `adjust_brightness`.
        contrast: strength, at least 0; see `adjust_contrast`.
        saturation: strength, at least 0; see `adjust_saturation`. Without effect on grey images.
        hue: largest shift in turns, at most 0.5; see `adjust_hue`. Without effect on grey images.
        p: probability that an image is changed at all.

    Raises:
        ValueError: if a number is out of bounds.

    Source: SimCLR (arXiv 2002.05709), appendix A, with the four parts in a fixed order.

    Examples:
        >>> picture = torch.rand(1, 3, 4, 4)
        >>> torch.equal(Augment(ColorJitter())(picture), picture)  # all strengths are 0
        True
    """

    draws: ClassVar[int] = 5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check_number(name, getattr(self, name))
        _check_number("hue", self.hue, most=0.5)
        _check_probability(self.p)

    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Jittered copies where the first number falls below `p`, the images themselves elsewhere."""
        _check_channels(images)
        chosen, *numbers = uniform.unbind(1)
        jittered = images
        parts = (
            (adjust_brightness, self.brightness),
            (adjust_contrast, self.contrast),
            (adjust_saturation, self.saturation),
        )
        for (adjust, strength), number in zip(parts, numbers[:3], strict=True):
            if strength > 0:
                jittered = adjust(jittered, _between(number, max(0.0, 1 - strength), 1 + strength))
        if self.hue > 0:
            jittered = adjust_hue(jittered, _between(numbers[3], -self.hue, self.hue))
        return torch.where((chosen < self.p).view(-1, 1, 1, 1), jittered, images)


@dataclass(frozen=True, kw_only=True)
class RandomGray(ColorStep):
    """Take the colour away with probability `p`: all three channels become `gray`. Grey images stay.

    Args:
        p: from 0 to 1.

    Raises:
        ValueError: if `p` is not a probability.

    Examples:
        >>> Augment(RandomGray(p=1.0))(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)).flatten()
        tensor([0.1140, 0.1140, 0.1140])
    """

    draws: ClassVar[int] = 1
    p: float = 0.1

    def __post_init__(self) -> None:
        _check_probability(self.p)

    def recolor(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Grey where the number falls below `p`."""
        return torch.where((uniform[:, 0] < self.p).view(-1, 1, 1, 1), gray(images), images)


# --- presets ------------------------------------------------------------------------------------------------


def cifar_augment() -> Augment:
    """The contrastive augmentation of TreeVAE for CIFAR and CUBICC, that of SimCLR without its blur.

    Crop of 0.2 to 1 of the area, mirror, jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, grey with 0.2.

    Source: TreeVAE (arXiv 2306.08984), reference implementation, after SimCLR (arXiv 2002.05709), appendix A.
    """
    return Augment(
        RandomResizedCrop(scale=(0.2, 1.0)),
        RandomFlip(),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        RandomGray(p=0.2),
    )


def celeba_augment() -> Augment:
    """The milder augmentation of TreeVAE for faces: most of the picture stays, hue and colour are kept.

    Crop of 3/4 to 1 of the area at ratios 4/5 to 5/4, mirror, jitter (0.2, 0.2, 0.2) with probability 0.8.
    The fixed cut to the face (148 x 148 pixels, then 64 x 64) is a matter of reading the data, not of chance.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    return Augment(
        RandomResizedCrop(scale=(3 / 4, 1.0), ratio=(4 / 5, 5 / 4)),
        RandomFlip(),
        ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, p=0.8),
    )


def omniglot_augment() -> Augment:
    """The simple augmentation of TreeVAE for Omniglot: light strokes on black, moved a little, not mirrored.

    Up to 10 degrees, 1/28 of a side, 0.9 to 1.1 in size, and 0.01 degrees of shear, which is next to nothing.

    Source: TreeVAE (arXiv 2306.08984), reference implementation.
    """
    return Augment(RandomAffine(degrees=10.0, translate=1 / 28, scale=(0.9, 1.1), shear=0.01))


def contrastive_views(
    images: Tensor, augment: Augment | None = None, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Two independent views of every image, for `treediff.layers.contrastive`.

    Args:
        images: `(B, C, H, W)` in [0, 1].
        augment: how a view is made; None for `cifar_augment()`.
        generator: where the numbers come from; None for torch's default generator.

    Returns:
        First and second views, each like `images`. TreeVAE trains on `torch.cat` of the two.

    Raises:
        ValueError: as `Augment`.
        TypeError: as `Augment`.

    Examples:
        >>> first, second = contrastive_views(torch.rand(2, 3, 8, 8))
        >>> first.shape == second.shape == (2, 3, 8, 8)
        True
    """
    augment = cifar_augment() if augment is None else augment
    return augment(images, generator=generator), augment(images, generator=generator)


# --- small helpers ------------------------------------------------------------------------------------------


def _between(uniform: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * uniform


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`base` at factor 0, `images` at factor 1, beyond them above 1."""
    return torch.lerp(base, images, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(
            f"expected images of shape (batch, channels, height, width); found {tuple(images.shape)}; "
            "give a single image a batch axis with image[None]"
        )
    if not images.is_floating_point():
        raise TypeError(f"expected float images in [0, 1]; found {images.dtype}; divide bytes by 255")


def _check_channels(images: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(
            f"colour steps need 3 channels (red, green, blue) or 1 (grey); found {images.shape[1]} in images "
            f"of shape {tuple(images.shape)}; leave colour steps out for other data"
        )


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is a probability from 0 to 1; found {p}")


def _check_number(name: str, value: float, most: float = math.inf) -> None:
    if not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name} must be from 0 to {most}, found {value}")


def _check_range(name: str, values: tuple[float, float], *, above: float, most: float = math.inf) -> None:
    low, high = values
    if not (above < low <= high <= most and math.isfinite(high)):
        raise ValueError(
            f"{name} is a pair (smallest, largest), above {above:g} and at most {most:g}; found {values}"
        )

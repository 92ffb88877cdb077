"""Parts of the U-Net with weights away from where they start, and what to call them with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treediff.diffusion.unet import UNet, UNetLayer
from treediff.diffusion.unet_blocks import (
    AdaGroupNorm,
    CrossAttention2d,
    Downsample2d,
    SelfAttention2d,
    TimestepEmbedding,
    UNetBlock,
    Upsample2d,
)

MASK = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [False, True, False]])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def perturb(module: nn.Module, seed: int = 0) -> nn.Module:
    """Move all parameters away from the special values that they start with."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(normal(*parameter.shape, seed=seed + i).to(parameter), alpha=0.1)
    return module


@dataclass
class Case:
    """A module, the shapes of one row of its inputs and of its output, and what else it is called with."""

    build: Callable[..., Any]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    extra: Callable[[int], tuple[Any, ...]] = lambda batch: ()

    def make(self, seed: int = 0, **factory: Any) -> Any:  # noqa: ANN401
        return perturb(self.build(**factory), seed)

    def rows(self, batch: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Normal numbers, but for times, the only inputs that are one number a row."""
        drawn = [normal(batch, *shape, seed=i, dtype=dtype) for i, shape in enumerate(self.inputs)]
        return [rows if rows.ndim > 1 else rows.sigmoid() for rows in drawn]

    def call(self, module: nn.Module, rows: list[Tensor]) -> Tensor:
        y: Tensor = module(*rows, *self.extra(len(rows[0])))
        return y


def layer(**factory: Any) -> UNetLayer:  # noqa: ANN401
    return UNetLayer(
        block=UNetBlock(8, 32, 6, **factory),
        attention=SelfAttention2d(32, **factory),
        cross_attention=CrossAttention2d(32, 6, **factory),
    )


def unet(**factory: Any) -> UNet:  # noqa: ANN401
    options = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (7,), "context": 6}
    return UNet(2, 3, size=(7, 6), **options, **factory)  # type: ignore[arg-type]


CASES = {
    "TimestepEmbedding": Case(lambda **f: TimestepEmbedding(6, 4, **f), ((),), (6,)),
    "AdaGroupNorm": Case(lambda **f: AdaGroupNorm(32, 6, **f), ((32, 5, 4), (6,)), (32, 5, 4)),
    "UNetBlock": Case(lambda **f: UNetBlock(32, 32, 6, **f), ((32, 5, 4), (6,)), (32, 5, 4)),
    "UNetBlock to more channels": Case(lambda **f: UNetBlock(8, 32, 6, **f), ((8, 5, 4), (6,)), (32, 5, 4)),
    "SelfAttention2d": Case(lambda **f: SelfAttention2d(32, **f), ((32, 5, 4),), (32, 5, 4)),
    "CrossAttention2d": Case(
        lambda **f: CrossAttention2d(32, 6, **f),
        ((32, 5, 4), (3, 6)),
        (32, 5, 4),
        lambda batch: (MASK[:batch],),
    ),
    "Downsample2d": Case(lambda **f: Downsample2d(8, **f), ((8, 5, 4),), (8, 3, 2)),
    "Upsample2d": Case(lambda **f: Upsample2d(8, **f), ((8, 3, 2),), (8, 5, 4), lambda _: ((5, 4),)),
    "UNetLayer": Case(layer, ((8, 5, 4), (6,), (3, 6)), (32, 5, 4), lambda batch: (MASK[:batch],)),
    "UNet": Case(unet, ((2, 7, 6), (), (64,), (3, 6)), (3, 7, 6), lambda batch: (MASK[:batch],)),
}

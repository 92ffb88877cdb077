"""Layers with weights per group, and the plain loop over rows that their results are held against."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from treediff.layers import Groups, ResidualBlock

Weights = dict[str, Tensor]


class Doubled(nn.Linear):
    """Runs something else than its parent, so it must not be taken for one."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gated(nn.Module):
    """A module that no rule knows, with a parameter of its own and one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(3))
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate) * self.inner(x)


def with_one_activation_twice() -> nn.Module:
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(3, 2), act, nn.Linear(2, 3), act)


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]  # a template, and the shape of one row
KNOWN: dict[str, Case] = {
    "linear 1-1": (lambda: nn.Linear(1, 1), (1,)),
    "linear 3-5": (lambda: nn.Linear(3, 5), (3,)),
    "linear 5-3 no bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear 8-4": (lambda: nn.Linear(8, 4), (8,)),
    "linear on a sequence": (lambda: nn.Linear(3, 5), (2, 3)),
    "layer norm": (lambda: nn.LayerNorm(3), (3,)),
    "layer norm no bias": (lambda: nn.LayerNorm(3, bias=False), (3,)),
    "layer norm of two axes": (lambda: nn.LayerNorm((2, 3)), (2, 3)),
    "layer norm on a sequence": (lambda: nn.LayerNorm(3), (4, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "group norm on a vector": (lambda: nn.GroupNorm(2, 6), (6,)),
    "conv 1x1": (lambda: nn.Conv2d(3, 2, 1), (3, 2, 3)),
    "conv 1x1 of one pixel": (lambda: nn.Conv2d(3, 5, 1), (3, 1, 1)),
    "conv 3x3 small map": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 3)),
    "conv 3x3 largest small map": (lambda: nn.Conv2d(1, 2, 3), (1, 6, 3)),
    "conv 3x3": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 7)),
    "conv 3x3 no bias": (lambda: nn.Conv2d(1, 4, 3, bias=False), (1, 6, 4)),
    "conv 3x3 dilated": (lambda: nn.Conv2d(2, 1, 3, padding=2, dilation=2), (2, 7, 5)),
    "conv 3x3 dilated small map": (lambda: nn.Conv2d(2, 1, 3, padding=2, dilation=2), (2, 3, 4)),
    "conv 5x5 strided": (lambda: nn.Conv2d(1, 2, 5, padding=2, stride=2), (1, 9, 6)),
    "conv 5x5 strided small map": (lambda: nn.Conv2d(1, 2, 5, padding=2, stride=2), (1, 5, 4)),
    "conv not square": (lambda: nn.Conv2d(2, 3, (3, 1), padding=(1, 0), stride=(2, 3)), (2, 7, 5)),
    "transposed side by side": (lambda: nn.ConvTranspose2d(3, 2, 2, stride=2), (3, 2, 3)),
    "transposed not square": (lambda: nn.ConvTranspose2d(3, 1, (2, 3), stride=(2, 3)), (3, 3, 2)),
    "transposed overlapping": (lambda: nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1), (2, 3, 2)),
    "transposed with output padding": (
        lambda: nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=1),
        (2, 2, 3),
    ),
    "transposed side by side, padded": (
        lambda: nn.ConvTranspose2d(2, 1, 2, stride=2, padding=1),
        (2, 3, 2),
    ),
    "transposed dilated no bias": (lambda: nn.ConvTranspose2d(1, 2, 2, dilation=2, bias=False), (1, 3, 2)),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Flatten(1), nn.Linear(6, 4), nn.LayerNorm(4), nn.SiLU()),
            nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3, affine=False)),
        ),
        (1, 2, 3),
    ),
    "one activation twice": (with_one_activation_twice, (3,)),
}
LOOPED: dict[str, Case] = {
    "with a layer inside that only the loop knows": (lambda: nn.Sequential(Doubled(3, 2), nn.Linear(2, 3)), (3,)),
    "custom": (Gated, (3,)),
    "subclass": (lambda: Doubled(3, 2), (3,)),
    "parametrised": (lambda: weight_norm(nn.Linear(3, 2)), (3,)),
    "conv of two groups": (lambda: nn.Conv2d(4, 2, 3, groups=2), (4, 4, 3)),
    "conv padded in a circle": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), (1, 4, 5)),
    "conv padded by a word": (lambda: nn.Conv2d(1, 2, 3, padding="same"), (1, 4, 5)),
    "transposed of two groups": (lambda: nn.ConvTranspose2d(4, 2, 2, stride=2, groups=2), (4, 2, 2)),
    "transposed far beyond its patches": (
        lambda: nn.ConvTranspose2d(1, 2, 2, dilation=2, output_padding=1),
        (1, 2, 3),
    ),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 4)),
    "residual block": (lambda: ResidualBlock(8, 16), (8, 2, 3)),
    "residual block down": (lambda: ResidualBlock(8, 8, resample="down"), (8, 3, 3)),
    "residual block up": (lambda: ResidualBlock(8, 4, resample="up"), (8, 1, 2)),
}
CASES = KNOWN | LOOPED
each_case = pytest.mark.parametrize("name", CASES)
each_known = pytest.mark.parametrize("name", KNOWN)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(
    name: str, sizes: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Weights, Tensor, Groups]:
    """A template in `dtype`, weights for every group, rows, and the groups of the rows."""
    build, shape = CASES[name]
    template = build().to(dtype)
    weights = {
        key: normal(len(sizes), *p.shape, seed=seed + i, dtype=dtype).requires_grad_()
        for i, (key, p) in enumerate(template.named_parameters())
    }
    x = normal(sum(sizes), *shape, seed=seed + 100, dtype=dtype).requires_grad_()
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return template, weights, x, Groups(index, len(sizes))


def one_by_one(template: nn.Module, weights: Weights, x: Tensor, groups: Groups) -> Tensor:
    """The definition: every row alone, through the template with the weights of its group."""

    def call(g: int, rows: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(template, {key: w[g] for key, w in weights.items()}, (rows,))
        return result

    if not len(x):
        return call(0, x)
    return torch.cat([call(g, row[None]) for g, row in zip(groups.index.tolist(), x, strict=True)])


def gradients(y: Tensor, weights: Weights, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(y, [x, *weights.values()], upstream, materialize_grads=True, retain_graph=True)
    return dict(zip(["x", *weights], found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:  # noqa: ANN401
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)

"""The parts of the U-Net against slow references, how they start, and what they refuse."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor, nn
from torch.nn import functional as F
from unet_cases import CASES, MASK, normal, perturb

from treediff.diffusion import unet_blocks as blocks
from treediff.diffusion.unet import UNetLayer
from treediff.diffusion.unet_blocks import (
    AdaGroupNorm,
    CrossAttention2d,
    Downsample2d,
    SelfAttention2d,
    TimestepEmbedding,
    UNetBlock,
    Upsample2d,
    ZeroConv2d,
    ZeroLinear,
)
from treediff.layers import initialize

# --- what each computes -------------------------------------------------------------------------------------


def test_time_becomes_sinusoids_then_a_small_network() -> None:
    module = perturb(TimestepEmbedding(5, 3).double())
    times = [0.0, 0.001, 0.3, 1.0]
    waves = [[f(1000 * t / 10000 ** (i / 3)) for f in (math.cos, math.sin) for i in range(3)] for t in times]
    hidden = F.silu(F.linear(torch.tensor(waves, dtype=torch.float64), module.hidden.weight, module.hidden.bias))
    expected = F.linear(hidden, module.out.weight, module.out.bias)
    torch.testing.assert_close(module(torch.tensor(times, dtype=torch.float64)), expected)


def test_half_precision_does_not_blur_the_time() -> None:
    module = perturb(TimestepEmbedding(5, 32))
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    expected, found = module(t), module.bfloat16()(t)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.03


@quick
@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_adaptive_norm_is_a_norm_scaled_and_shifted(channels: int, height: int, width: int, batch: int) -> None:
    module = perturb(AdaGroupNorm(channels, 6).double())
    x, embedding = normal(batch, channels, height, width), normal(batch, 6, seed=1)
    rows = []
    for image, e in zip(x, embedding, strict=True):
        normed = F.group_norm(image[None], module.norm.num_groups)[0]
        told = module.project.weight @ e + module.project.bias
        rows += [torch.stack([normed[c] * (1 + told[c]) + told[channels + c] for c in range(channels)])]
    torch.testing.assert_close(module(x, embedding), torch.stack(rows) if rows else x)


@given(st.integers(1, 2000))
def test_a_group_has_sixteen_channels_or_more(channels: int) -> None:
    groups = blocks.groups_of(channels)
    assert channels % groups == 0
    assert channels // groups >= min(channels, 16)
    assert channels % 16 or channels // groups == 16


@pytest.mark.parametrize("inputs", [5, 32])
def test_block_written_out(inputs: int) -> None:
    module = perturb(UNetBlock(inputs, 32, 6).double())
    x, embedding = normal(2, inputs, 5, 4), normal(2, 6, seed=1)
    h = F.silu(F.group_norm(x, blocks.groups_of(inputs), module.norm1.weight, module.norm1.bias))
    h = F.conv2d(h, module.conv1.weight, module.conv1.bias, padding=1)
    scale, shift = F.linear(embedding, module.norm2.project.weight, module.norm2.project.bias).chunk(2, 1)
    h = F.group_norm(h, 2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    h = F.conv2d(F.silu(h), module.conv2.weight, module.conv2.bias, padding=1)
    skip = x if inputs == 32 else F.conv2d(x, module.skip.weight, module.skip.bias)
    torch.testing.assert_close(module(x, embedding), skip + h)


def positions_of(x: Tensor) -> Tensor:
    """`(B, C, h, w)` to `(B, h * w, C)`, row by row."""
    height, width = x.shape[2:]
    return torch.stack([x[:, :, i, j] for i in range(height) for j in range(width)], dim=1)


def test_attention_reads_positions() -> None:
    module = perturb(SelfAttention2d(32, heads=2).double())
    x = normal(2, 32, 3, 4)
    normed = F.group_norm(x, 2, module.norm.weight, module.norm.bias)
    expected = positions_of(x) + module.attention(positions_of(normed))
    torch.testing.assert_close(positions_of(module(x)), expected)


def test_cross_attention_reads_tokens() -> None:
    module = perturb(CrossAttention2d(32, 6, heads=2).double())
    x, tokens = normal(4, 32, 3, 5), normal(4, 3, 6, seed=1)
    normed = F.group_norm(x, 2, module.norm.weight, module.norm.bias)
    expected = positions_of(x) + module.attention(positions_of(normed), tokens, MASK)
    torch.testing.assert_close(positions_of(module(x, tokens, MASK)), expected)
    assert not torch.allclose(module(x, tokens), module(x, tokens, MASK))


def test_attention_copies_no_channels_last_map() -> None:
    module, made = SelfAttention2d(32), {}
    module.norm.register_forward_hook(lambda _, __, y: made.update(normed=y))
    module.attention.register_forward_pre_hook(lambda _, args: made.update(tokens=args[0]))
    module(normal(2, 32, 3, 4).float().contiguous(memory_format=torch.channels_last))
    assert made["tokens"].data_ptr() == made["normed"].data_ptr()


def test_layer_is_block_then_attention_then_cross_attention() -> None:
    module = CASES["UNetLayer"].make().double()
    x, embedding, tokens = CASES["UNetLayer"].rows(4, torch.float64)
    y = module.block(x, embedding)
    bare = UNetLayer(block=module.block)
    assert torch.equal(bare(x, embedding), y)
    y = module.cross_attention(module.attention(y), tokens, MASK)
    assert torch.equal(module(x, embedding, tokens, MASK), y)


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(1, 2), st.integers(1, 3))
def test_upsampling_is_doubling_then_convolution(
    height: int, width: int, odd_height: bool, odd_width: bool, batch: int, channels: int
) -> None:
    module = perturb(Upsample2d(channels).double())
    size = 2 * height - odd_height, 2 * width - odd_width
    x = normal(batch, channels, height, width).requires_grad_()
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = module.conv(doubled)[:, :, : size[0], : size[1]]
    found = module(x, size)
    torch.testing.assert_close(found, expected)
    upstream, inputs = normal(*expected.shape, seed=1), [x, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


@quick
@given(st.integers(1, 9), st.integers(1, 9))
def test_downsampling_takes_every_other_position(height: int, width: int) -> None:
    module = perturb(Downsample2d(3).double())
    x = normal(2, 3, height, width)
    everywhere = F.conv2d(x, module.conv.weight, module.conv.bias, padding=1)
    torch.testing.assert_close(module(x), everywhere[:, :, ::2, ::2])
    assert module(x).shape[2:] == (math.ceil(height / 2), math.ceil(width / 2))


# --- how each starts ----------------------------------------------------------------------------------------


def test_blocks_start_as_their_skip() -> None:
    x, embedding, tokens = normal(2, 32, 5, 4), normal(2, 6), normal(2, 3, 6)
    assert torch.equal(UNetBlock(32, 32, 6).double()(x, embedding), x)
    changing = UNetBlock(32, 8, 6).double()
    assert torch.equal(changing(x, embedding), changing.skip(x))
    assert torch.equal(SelfAttention2d(32).double()(x), x)
    assert torch.equal(CrossAttention2d(32, 6).double()(x, tokens), x)
    torch.testing.assert_close(AdaGroupNorm(32, 6).double()(x, embedding), F.group_norm(x, 2))


@pytest.mark.parametrize("module", [ZeroLinear(3, 2), ZeroConv2d(3, 2, 3)], ids=["linear", "convolution"])
def test_zero_is_kept_when_weights_are_drawn_again(module: nn.Module) -> None:
    assert not any(p.any() for p in module.parameters())
    initialize(perturb(module), generator=torch.Generator().manual_seed(0))
    assert len(list(module.parameters())) == 2 and not any(p.any() for p in module.parameters())


def test_repr_shows_the_architecture() -> None:
    lines = [line.strip() for line in repr(UNetBlock(8, 16, 6, dropout=0.1)).splitlines()]
    starts = [
        "UNetBlock(",
        "(norm1): GroupNorm(1, 8,",
        "(conv1): Conv2d(8, 16, kernel_size=(3, 3),",
        "(norm2): AdaGroupNorm(",
        "(norm): GroupNorm(1, 16,",
        "(project): ZeroLinear(in_features=6, out_features=32,",
        ")",
        "(dropout): Dropout(p=0.1,",
        "(conv2): ZeroConv2d(16, 16, kernel_size=(3, 3),",
        "(skip): Conv2d(8, 16, kernel_size=(1, 1),",
        ")",
    ]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert "frequencies=4" in repr(TimestepEmbedding(6, 4))


# --- what they say and refuse -------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    module = perturb(UNetBlock(8, 32, 6, dropout=0.5))
    x, embedding = normal(2, 8, 5, 4).float(), normal(2, 6).float()
    torch.manual_seed(0)
    assert not torch.equal(module(x, embedding), module(x, embedding))
    assert torch.equal(module.eval()(x, embedding), module(x, embedding))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TimestepEmbedding(0), ValueError, "embedding must be at least 1, found 0"),
        (lambda: TimestepEmbedding(4, 0), ValueError, "frequencies must be at least 1, found 0"),
        (lambda: AdaGroupNorm(0, 4), ValueError, "channels must be at least 1, found 0"),
        (lambda: AdaGroupNorm(4, 0), ValueError, "embedding must be at least 1, found 0"),
        (lambda: UNetBlock(0, 4, 4), ValueError, "inputs must be at least 1, found 0"),
        (lambda: UNetBlock(4, 1.5, 4), TypeError, "outputs must be a whole number, found 1.5"),
        (lambda: UNetBlock(4, 4, 4, dropout=1.5), ValueError, "dropout must be at least 0 and below 1, found 1.5"),
        (lambda: SelfAttention2d(6), ValueError, "heads must divide the width 6, found 4"),
        (lambda: CrossAttention2d(8, 0), ValueError, "context must be at least 1, found 0"),
        (lambda: Downsample2d(0), ValueError, "channels must be at least 1, found 0"),
        (lambda: Upsample2d(0), ValueError, "channels must be at least 1, found 0"),
    ],
)
def test_what_cannot_be_built(build: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_times_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected times of shape \(B,\), one for each image, found \("):
        TimestepEmbedding(4)(torch.zeros(shape))


@pytest.mark.parametrize("size", [(7, 4), (4, 4), (6, 2), (6, 5)])
def test_upsampling_to_a_size_out_of_reach(size: tuple[int, int]) -> None:
    message = f"3x2 is doubled to 6x4 and may lose one row and one column; found the size {size[0]}x{size[1]}"
    with pytest.raises(ValueError, match=message):
        Upsample2d(4)(torch.zeros(1, 4, 3, 2), size)

"""The U-Net as a whole: how its layers are joined, any size, checkpoints, and what it refuses."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor, nn
from torch.nn import functional as F
from unet_cases import normal, perturb

from treediff.diffusion.unet import UNet
from treediff.diffusion.unet_blocks import CrossAttention2d, SelfAttention2d
from treediff.layers import initialize


def small(**options: Any) -> UNet:  # noqa: ANN401
    defaults = {"size": (7, 5), "width": 16, "multipliers": (1, 2), "blocks": 1}
    return perturb(UNet(2, 3, **{**defaults, **options}))


def inputs(network: UNet, batch: int = 2, tokens: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    told = [normal(batch, network.embedding, seed=1, dtype=dtype)]
    if network.context is not None:
        told.append(normal(batch, tokens, network.context, seed=2, dtype=dtype))
    t = torch.linspace(0.1, 0.9, batch, dtype=dtype)
    return [normal(batch, network.in_channels, *network.size, dtype=dtype), t, *told]


# --- how the layers are joined ------------------------------------------------------------------------------


def test_two_levels_written_out() -> None:
    network = small(context=6, dropout=0.5).eval()
    x, t, vector, tokens = inputs(network)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    e = F.silu(network.time(t) + vector)
    told = (e, tokens, mask)
    fine = [network.stem(x)]
    fine.append(network.down[0](fine[0], *told))
    coarse = [network.down[1](fine[1])]
    coarse.append(network.down[2](coarse[0], *told))
    y = network.middle[1](network.middle[0](coarse[1], *told), *told)
    y = network.up[0](torch.cat((y, coarse[1]), dim=1), *told)
    y = network.up[1](torch.cat((y, coarse[0]), dim=1), *told)
    y = network.up[2](y, (7, 5))
    y = network.up[3](torch.cat((y, fine[1]), dim=1), *told)
    y = network.up[4](torch.cat((y, fine[0]), dim=1), *told)
    y = F.conv2d(F.silu(network.norm(y)), network.out.weight, network.out.bias, padding=1)
    torch.testing.assert_close(network(x, t, vector, tokens, mask), y)
    assert len(network.down) == 3 and len(network.middle) == 2 and len(network.up) == 5


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_every_map_of_the_way_down_is_read_once_on_the_way_up_last_one_first(blocks: int) -> None:
    network = small(size=(9, 6), multipliers=(1, 2, 3), blocks=blocks)
    made, read = [], []
    for layer in (network.stem, *network.down):
        layer.register_forward_hook(lambda _, __, y: made.append(y))
    for layer in network.up:
        if hasattr(layer, "block"):
            layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    network(*inputs(network))
    assert len(made) == len(read) == 3 * (blocks + 1)
    for down, up in zip(reversed(made), read, strict=True):
        assert torch.equal(up[:, -down.shape[1] :], down)


def test_a_vector_of_zeros_is_no_vector() -> None:
    network = small()
    x, t, vector = inputs(network)
    assert torch.equal(network(x, t, torch.zeros_like(vector)), network(x, t))
    assert not torch.allclose(network(x, t, vector), network(x, t))
    assert not torch.allclose(network(x, 1 - t), network(x, t))


def test_tokens_that_may_not_be_read_do_not_matter() -> None:
    network = small(context=6)
    x, t, vector, tokens = inputs(network)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    expected = network(x, t, vector, tokens, mask)
    torch.testing.assert_close(network(x, t, vector, tokens.masked_fill(~mask[:, :, None], 7.0), mask), expected)
    assert not torch.allclose(network(x, t, vector, tokens), expected)
    nothing = network(x, t, vector, tokens, torch.zeros_like(mask))
    torch.testing.assert_close(network(x, t, vector, tokens[:, :0]), nothing)


@pytest.mark.parametrize(
    ("attention", "levels"),
    [((), []), ((7,), [2]), ((27, 14), [0, 1]), ((4, 27), [0, 3]), ((27, 14, 7, 4), [0, 1, 2, 3])],
)
def test_attention_stands_at_the_resolutions_that_were_asked_for(attention: tuple[int, ...], levels: list[int]) -> None:
    network = small(size=(20, 27), width=4, multipliers=(1, 1, 2, 2), attention=attention, context=6)
    assert network.sizes == [(20, 27), (10, 14), (5, 7), (3, 4)]
    seen: list[tuple[type, tuple[int, int]]] = []
    for part in network.modules():
        if isinstance(part, SelfAttention2d | CrossAttention2d):
            part.register_forward_hook(lambda module, args, _: seen.append((type(module), tuple(args[0].shape[2:]))))
    network(*inputs(network))
    down = [network.sizes[level] for level in levels]
    up = [size for size in reversed(down) for _ in range(2)]
    assert seen == [(kind, size) for size in (*down, (3, 4), *up) for kind in (SelfAttention2d, CrossAttention2d)]


def test_network_without_context_has_no_cross_attention() -> None:
    network = small(attention=(7, 4))
    assert network.context is None
    assert not any(isinstance(part, CrossAttention2d) for part in network.modules())


def test_attributes() -> None:
    network = UNet(2, 3, size=28, width=16, multipliers=(1, 2, 1), embedding=10, context=5, device="meta")
    assert (network.in_channels, network.out_channels, network.size) == (2, 3, (28, 28))
    assert (network.embedding, network.context) == (10, 5)
    assert UNet(1, 1, size=8, width=16, device="meta").embedding == 64
    channels = [layer.block.conv2.out_channels for layer in network.down if hasattr(layer, "block")]
    assert channels == [16, 16, 32, 32, 16, 16]


# --- any size, and the start --------------------------------------------------------------------------------


@quick
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    multipliers = data.draw(st.sampled_from([(1,), (1, 2), (2, 1), (1, 2, 1), (1, 1, 2, 2)]))
    sides = [math.ceil(max(size) / 2**i) for i in range(len(multipliers))]
    network = UNet(
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        size=size,
        width=data.draw(st.sampled_from([2, 4, 6])),
        multipliers=multipliers,
        blocks=data.draw(st.integers(1, 2)),
        attention=data.draw(st.lists(st.sampled_from(sides))),
        context=data.draw(st.sampled_from([None, 3])),
        heads=data.draw(st.integers(1, 2)),
    )
    batch = data.draw(st.integers(0, 3))
    told = inputs(network, batch, tokens=data.draw(st.integers(0, 2)))
    expected = (batch, network.out_channels, *size)
    with torch.no_grad():
        assert torch.equal(network(*told), torch.zeros(expected))
        y = perturb(network)(*told)
    assert y.shape == expected and y.isfinite().all()
    assert batch == 0 or y.any()
    assert all(-(-a // 2) == b for fine, coarse in pairwise(network.sizes) for a, b in zip(fine, coarse, strict=True))


def test_the_start_is_zero_also_after_weights_are_drawn_again() -> None:
    network = UNet(1, 2, size=5, width=8, multipliers=(1, 2), context=3)
    told = inputs(network)
    assert torch.equal(network(*told), torch.zeros(2, 2, 5, 5))
    initialize(perturb(network), generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(*told), torch.zeros(2, 2, 5, 5))


def test_the_same_weights_serve_another_size() -> None:
    network, larger = small(), small(size=(8, 10))
    larger.load_state_dict(network.state_dict())
    assert larger(*inputs(larger)).shape == (2, 3, 8, 10)


def test_patches_are_a_network_of_their_pixels_side_by_side() -> None:
    """Written with reshapes: pixel (i, j) of a patch is a channel, of the input and of the output."""
    network, plain = (
        small(size=(6, 9), patch=3),
        perturb(UNet(18, 27, size=(2, 3), width=16, multipliers=(1, 2), blocks=1)),
    )
    plain.load_state_dict(network.state_dict())
    x, t, vector = inputs(network)
    apart = x.reshape(2, 2, 2, 3, 3, 3).permute(0, 1, 3, 5, 2, 4).reshape(2, 18, 2, 3)
    y = plain(apart, t, vector).reshape(2, 3, 3, 3, 2, 3).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 6, 9)
    torch.testing.assert_close(network(x, t, vector), y)
    assert network.sizes == [(2, 3), (1, 2)] and network.size == (6, 9)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"attention": (7,), "context": 6}, {"dropout": 0.5}])
def test_checkpoints_change_neither_values_nor_gradients(options: dict[str, Any]) -> None:
    results = []
    for checkpoint in (False, True):
        network = small(**options, checkpoint=checkpoint)
        if results:
            network.load_state_dict(results[0][2])
        told = [value.requires_grad_() for value in inputs(network)]
        torch.manual_seed(0)
        y = network(*told)
        gradients = torch.autograd.grad(y.square().sum(), [*told, *network.parameters()])
        results.append((y, gradients, network.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_checkpoints_keep_less_for_the_backward_pass() -> None:
    kept = {}
    for checkpoint in (False, True):
        network, storages = small(size=16, checkpoint=checkpoint), {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = network(*inputs(network))
        assert y.requires_grad
        kept[checkpoint] = sum(size for pointer, size in storages.items() if pointer not in weights)
    assert kept[True] < 0.6 * kept[False]


def test_checkpoints_compile_in_one_graph() -> None:
    torch.compiler.reset()
    network = small(checkpoint=True)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(network)), network(*inputs(network)))


def test_dropout_acts_in_training_only() -> None:
    network = small(dropout=0.5)
    told = inputs(network)
    torch.manual_seed(0)
    assert not torch.equal(network(*told), network(*told))
    assert torch.equal(network.eval()(*told), network(*told))


def test_a_few_steps_learn_a_picture() -> None:
    torch.manual_seed(0)
    network = UNet(1, 1, size=(6, 5), width=16, multipliers=(1, 2), blocks=1)
    x, t = normal(8, 1, 6, 5, dtype=torch.float32), torch.linspace(0, 1, 8)
    target = x.flip(3) * t[:, None, None, None]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = (network(x, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


# --- what it says and refuses -------------------------------------------------------------------------------


def test_repr_shows_the_architecture() -> None:
    text = repr(UNet(1, 1, size=(28, 20), width=16, context=6, checkpoint=True, device="meta"))
    assert text.startswith("UNet(\n  size=(28, 20), patch=1, embedding=64, context=6, checkpoint=True\n")
    for part in ("(time): TimestepEmbedding(", "(down): ModuleList(", "(middle): ModuleList(", "(up): ModuleList("):
        assert part in text
    for part in ("UNetBlock(", "SelfAttention2d(", "CrossAttention2d(", "Downsample2d(", "Upsample2d("):
        assert part in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, found 0"),
        ({"out_channels": 0}, ValueError, "out_channels must be at least 1, found 0"),
        ({"width": 0}, ValueError, "width must be at least 1, found 0"),
        ({"width": 1.5}, TypeError, "width must be a whole number, found 1.5"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1, found 0"),
        ({"embedding": 0}, ValueError, "embedding must be at least 1, found 0"),
        ({"context": 0}, ValueError, "context must be at least 1, found 0"),
        ({"multipliers": ()}, ValueError, r"multipliers must hold numbers of at least 1, found \(\)"),
        ({"multipliers": 2}, TypeError, r"multipliers must be a tuple of numbers, found 2; write \(2,\) for one"),
        ({"size": 0}, ValueError, r"size must hold numbers of at least 1, found \(0, 0\)"),
        ({"size": (3, 4, 5)}, ValueError, r"size must be \(height, width\), found \(3, 4, 5\)"),
        ({"size": 2.5}, TypeError, "size must be a tuple of whole numbers, found 2.5"),
        ({"attention": 14}, TypeError, r"attention must be a tuple of numbers, found 14; write \(14,\) for one"),
        ({"heads": 3}, ValueError, r"heads must divide the width 32, found 3; choose one of \[1, 2, 4, 8, 16, 32\]"),
        ({"dropout": 1}, ValueError, "dropout must be at least 0 and below 1, found 1"),
        ({"patch": 0}, ValueError, "patch must be at least 1, found 0"),
        ({"patch": 8}, ValueError, r"patch must divide height and width, found patch=8 and size=\(28, 20\)"),
        (
            {"attention": (14, 16, 8)},
            ValueError,
            r"attention names resolutions, .*: expected some of \[28, 14, 7\], found \[8, 16\]",
        ),
    ],
)
def test_what_cannot_be_built(options: dict[str, Any], error: type[Exception], message: str) -> None:
    defaults = {"in_channels": 1, "out_channels": 1, "size": (28, 20), "width": 16}
    with pytest.raises(error, match=message):
        UNet(**{**defaults, **options})


def test_inputs_that_do_not_fit() -> None:
    plain, reads = small(), small(context=6)
    x, t, vector, tokens = inputs(reads)
    for wrong in (x[:, :1], x[:, :, 1:], x[:, :, :, 1:], x[0]):
        with pytest.raises(ValueError, match=r"expected images of shape \(B, 2, 7, 5\), found .* another size build"):
            plain(wrong, t)
    for wrong in (t[:1], t[0], t[:, None]):
        with pytest.raises(ValueError, match=r"one time for each image, shape \(2,\), found .* with t.expand\(2\)"):
            plain(x, wrong)
    for wrong in (vector[:1], vector[0], vector[:, :3]):
        with pytest.raises(ValueError, match=r"expected a vector of shape \(2, 64\), found"):
            plain(x, t, wrong)
    with pytest.raises(ValueError, match=r"reads tokens of shape \(2, S, 6\), found none; .* tokens with S = 0"):
        reads(x, t, vector)
    for unwanted in ((tokens, None), (None, torch.ones(2, 3, dtype=torch.bool))):
        with pytest.raises(
            ValueError, match="reads no tokens, found tokens or a mask; build the network with context="
        ):
            plain(x, t, vector, *unwanted)
    with pytest.raises(ValueError, match=r"expected a context of shape \(2, T, 6\), found \(2, 3, 5\)"):
        reads(x, t, vector, tokens[:, :, :5])
    with pytest.raises(TypeError, match="expected a boolean mask"):
        reads(x, t, vector, tokens, torch.ones(2, 3))


def test_the_state_is_the_whole_network() -> None:
    """Nothing hides outside the state: a network filled from another one's state is that network."""
    network, other = small(attention=(7,), context=6), small(attention=(7,), context=6)
    perturb(other, seed=5)
    told = inputs(network)
    assert not torch.allclose(other(*told), network(*told))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(*told), network(*told))
    assert not list(network.buffers())
    assert all(isinstance(p, nn.Parameter) for p in network.parameters())

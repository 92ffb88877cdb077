"""What every layer promises, whatever it computes: one contract, tried on each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from gradients import assert_gradient_everywhere
from torch import Tensor, nn

from treediff import layers


def apply(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def score(likelihood: nn.Module, x: Tensor) -> Tensor:
    """Observations that depend on the output row by row, and lie in [0, 1]."""
    result: Tensor = likelihood.log_prob(x, x.detach().cos().square())  # type: ignore[operator]
    return result


def at_one_node(bank: nn.Module, x: Tensor) -> Tensor:
    groups = layers.Groups(torch.zeros(len(x), dtype=torch.int64, device=x.device), 1)
    result: Tensor = bank(x, groups, [3])
    return result


def bank(**factory: Any) -> nn.Module:  # noqa: ANN401
    with torch.device("meta"):  # a template needs no weights, and draws none from the global generator
        template = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 2))
    made = layers.NodeBank(template, **factory)
    made.add(3)
    return made


@dataclass
class Layer:
    """One layer: how to build it, the shapes of one row, and how to call it."""

    build: Callable[..., nn.Module]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Tensor] = apply
    takes_factory: bool = True

    def make(self, seed: int = 0, **factory: Any) -> nn.Module:  # noqa: ANN401
        module = self.build(**factory if self.takes_factory else {})
        if not any(p.is_meta for p in module.parameters()):
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    # Away from the special values that weights start with: biases of 0, scales of 1.
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter), alpha=0.1)
        return module

    def rows(self, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *self.inputs, generator=generator, dtype=torch.float64).to(dtype)


LAYERS = {
    "Router": Layer(lambda **f: layers.Router((6,), (5,), **f), (6,), ()),
    "Router on maps": Layer(lambda **f: layers.Router((2, 3, 1), (), **f), (2, 3, 1), ()),
    "GaussianHead": Layer(lambda **f: layers.GaussianHead((6,), 4, **f), (6,), (8,)),
    "GaussianHead on maps": Layer(lambda **f: layers.GaussianHead((6, 3, 2), 4, (8,), **f), (6, 3, 2), (8, 3, 2)),
    "LatentTransition": Layer(lambda **f: layers.LatentTransition((3,), (8,), **f), (3,), (6,)),
    "LatentTransition on maps": Layer(lambda **f: layers.LatentTransition((3, 2, 2), (8,), **f), (3, 2, 2), (6, 2, 2)),
    "BottomUpBlock": Layer(lambda **f: layers.BottomUpBlock((6,), 2, **f), (6,), (6,)),
    "BottomUpBlock on maps": Layer(lambda **f: layers.BottomUpBlock((8, 2, 3), **f), (8, 2, 3), (8, 2, 3)),
    "MLPEncoder": Layer(lambda **f: layers.MLPEncoder((1, 3, 2), (4,), (8,), **f), (1, 3, 2), (4,)),
    "ConvEncoder": Layer(lambda **f: layers.ConvEncoder(2, (17, 9), (6,), 8, **f), (2, 17, 9), (6,)),
    "ConvEncoder to maps": Layer(
        lambda **f: layers.ConvEncoder(1, (16, 16), (8, 2, 2), 4, **f), (1, 16, 16), (8, 2, 2)
    ),
    "ResidualBlock": Layer(lambda **f: layers.ResidualBlock(8, 8, **f), (8, 2, 3), (8, 2, 3)),
    "ResidualBlock down": Layer(lambda **f: layers.ResidualBlock(8, 16, resample="down", **f), (8, 5, 4), (16, 3, 2)),
    "ResidualBlock up": Layer(lambda **f: layers.ResidualBlock(16, 8, resample="up", **f), (16, 1, 2), (8, 2, 4)),
    "ResidualEncoder": Layer(lambda **f: layers.ResidualEncoder(3, (9, 7), (6,), 8, 16, **f), (3, 9, 7), (6,)),
    "MLPDecoder": Layer(lambda **f: layers.MLPDecoder((4,), (2, 3, 1), (8,), **f), (4,), (2, 3, 1)),
    "PatchDecoder": Layer(lambda **f: layers.PatchDecoder((4,), 2, (9, 13), 6, 3, 5, 4, **f), (4,), (2, 9, 13)),
    "ConvDecoder": Layer(lambda **f: layers.ConvDecoder((4,), 2, (9, 13), 8, 4, **f), (4,), (2, 9, 13)),
    "ConvDecoder from maps": Layer(
        lambda **f: layers.ConvDecoder((4, 3, 3), 1, (6, 6), 8, 3, **f), (4, 3, 3), (1, 6, 6)
    ),
    "ResidualDecoder": Layer(lambda **f: layers.ResidualDecoder((4,), 3, (7, 5), 8, **f), (4,), (3, 7, 5)),
    "BernoulliLikelihood": Layer(lambda: layers.BernoulliLikelihood(), (2, 3), (), score, takes_factory=False),
    "GaussianLikelihood": Layer(lambda **f: layers.GaussianLikelihood(learned=True, **f), (2, 3), (), score),
    "NodeBank": Layer(bank, (6,), (2,), at_one_node),
    "PrincipalComponents": Layer(lambda **f: layers.PrincipalComponents(5, 3, **f), (5,), (3,)),
    "UnitLength": Layer(lambda: layers.UnitLength(), (5,), (5,), takes_factory=False),
    "Deskew": Layer(lambda: layers.Deskew(), (2, 7, 6), (2, 7, 6), takes_factory=False),
    "GradientHistograms": Layer(lambda: layers.GradientHistograms(2, 3), (2, 6, 4), (18,), takes_factory=False),
    "ResNetEncoder": Layer(
        lambda **f: layers.ResNetEncoder(2, width=4, stages=2, norm=partial(nn.GroupNorm, 2), **f), (2, 8, 6), (8,)
    ),
    "ProjectionHead": Layer(
        lambda **f: layers.ProjectionHead(in_features=6, hidden=5, out_features=4, **f), (2, 3), (4,)
    ),
}
each = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
each_with_weights = pytest.mark.parametrize(
    "layer",
    [layer for layer in LAYERS.values() if layer.takes_factory],
    ids=lambda layer: layer.make().__class__.__name__,
)


def test_no_layer_is_left_out() -> None:
    exported = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    modules = {name for name in exported if issubclass(getattr(layers, name), nn.Module)} - {"Likelihood"}
    assert modules == {name.partition(" ")[0] for name in LAYERS}
    for name, layer in LAYERS.items():
        assert type(layer.make()).__name__ == name.partition(" ")[0]


@each
def test_shape_is_as_documented(layer: Layer) -> None:
    assert layer.call(layer.make(), layer.rows(3)).shape == (3, *layer.outputs)


@each
def test_gradient_reaches_every_parameter_and_every_input(layer: Layer) -> None:
    module, x = layer.make(), layer.rows(4, torch.float64).requires_grad_()
    y = layer.call(module.double(), x)
    (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).square().sum().backward()
    assert_gradient_everywhere(module, above=1e-8, x=x)
    assert x.grad is not None and (x.grad.flatten(1).abs().amax(1) > 1e-8).all()  # of every row


@each
def test_the_same_twice(layer: Layer) -> None:
    module, x = layer.make().eval(), layer.rows()
    with torch.no_grad():
        first = layer.call(module, x)
        assert torch.equal(layer.call(module, x), first)
    assert torch.equal(layer.call(module, x), first)  # with gradients too
    assert torch.equal(layer.call(module.train(), x), first)


@each
def test_rows_do_not_know_of_each_other(layer: Layer) -> None:
    module, x = layer.make().double(), layer.rows(4, torch.float64)
    together = layer.call(module, x)
    alone = torch.cat([layer.call(module, row[None]) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)
    assert (together[0] != together[1]).any()  # or the sentence above would say little


@each
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(layer: Layer, training: bool) -> None:
    module, x = layer.make().train(training), layer.rows(0).requires_grad_()
    y = layer.call(module, x)
    assert y.shape == (0, *layer.outputs)
    y.sum().backward()
    assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@each
def test_float64_is_float32_made_precise(layer: Layer) -> None:
    module, x = layer.make(), layer.rows(3, torch.float64)
    rough = layer.call(module, x.float())
    precise = layer.call(module.double(), x)
    assert rough.dtype == torch.float32 and precise.dtype == torch.float64
    torch.testing.assert_close(rough.double(), precise, rtol=1e-4, atol=1e-4)


@each_with_weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_that_of_every_tensor(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make(dtype=dtype)
    assert {t.dtype for t in module.state_dict().values()} == {dtype}
    assert layer.call(module, layer.rows(2, dtype)).isfinite().all()


@each
def test_state_dict_round_trip(layer: Layer) -> None:
    module, other, x = layer.make(1), layer.make(2), layer.rows()
    expected = layer.call(module, x)
    assert not list(module.parameters()) or not torch.equal(layer.call(other, x), expected)
    other.load_state_dict(module.state_dict())
    assert torch.equal(layer.call(other, x), expected)


@each
def test_is_readable(layer: Layer) -> None:
    module = layer.make()
    text = repr(module)
    assert text.startswith(f"{type(module).__name__}(")
    assert "object at 0x" not in text and len(text) < 3000


@each
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(layer: Layer, training: bool) -> None:
    torch.compiler.reset()
    module, x = layer.make().train(training), layer.rows()
    compiled = torch.compile(lambda x: layer.call(module, x), fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        y, expected = compiled(x), layer.call(module, x)
    torch.testing.assert_close(y, expected)
    if training and list(module.parameters()):
        found, wanted = (torch.autograd.grad(out.sum(), list(module.parameters())) for out in (y, expected))
        torch.testing.assert_close(found, wanted)


@each
def test_bfloat16_autocast(layer: Layer) -> None:
    module, x = layer.make(), layer.rows().requires_grad_()
    expected = layer.call(module, x)
    for incoming in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer.call(module, incoming)
        assert y.isfinite().all()
        assert (y - expected).abs().max() <= 0.1 * (1 + expected.abs().max())
        module.zero_grad()
        y.float().square().sum().backward()
        assert_gradient_everywhere(module)


@each_with_weights
def test_is_built_on_the_meta_device(layer: Layer) -> None:
    before = torch.get_rng_state()
    module = layer.make(device="meta")
    assert torch.equal(torch.get_rng_state(), before)
    real = layer.make()
    assert all(t.is_meta for t in module.state_dict().values())
    shapes, expected = ({name: t.shape for name, t in m.state_dict().items()} for m in (module, real))
    assert shapes == expected
    assert repr(module).startswith(type(module).__name__)
    with torch.device("meta"):
        assert all(t.is_meta for t in layer.build().state_dict().values())
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(layer.call(module, layer.rows()), layer.call(real, layer.rows()))


def test_a_residual_block_resamples_in_three_ways() -> None:
    with pytest.raises(ValueError, match="resample must be 'keep', 'down' or 'up', found 'sideways'"):
        layers.ResidualBlock(4, 4, resample="sideways")

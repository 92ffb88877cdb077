"""Layers with weights per group in other precisions, and in the modes of PyTorch."""

import pytest
import torch
from layer_cases import assert_same, each_case, gradients, normal, one_by_one, problem
from torch import Tensor

from treediff.layers import Groups, grouped_call
from treediff.layers.grouped import _conv as convolutions

# --- precision ----------------------------------------------------------------------------------------------


@each_case
def test_bfloat16_is_near_float64(name: str) -> None:
    template, weights, x, groups = problem(name, [2, 0, 3], dtype=torch.bfloat16)
    y = grouped_call(template, weights, x, groups)
    assert y.dtype == torch.bfloat16
    x64, weights64 = x.detach().double().requires_grad_(), {key: w.detach().double() for key, w in weights.items()}
    for w in weights64.values():
        w.requires_grad_()
    expected = one_by_one(template.double(), weights64, x64, groups)
    assert (y - expected).abs().max() <= 0.03 * (1 + expected.abs().max())
    upstream = normal(*y.shape, seed=7, dtype=torch.bfloat16)
    found, wanted = gradients(y, weights, x, upstream), gradients(expected, weights64, x64, upstream.double())
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= 0.06 * (1 + value.abs().max()), key


@each_case
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
def test_autocast(name: str, incoming: torch.dtype) -> None:
    template, weights, x, groups = problem(name, [2, 0, 3], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_call(template, weights, x.to(incoming), groups)
    expected = one_by_one(template, weights, x, groups)
    assert (y - expected).abs().max() <= 0.05 * (1 + expected.abs().max())
    y.float().sum().backward()
    for p in (x, *weights.values()):
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()


def test_autocast_makes_products_low_and_leaves_float64_alone() -> None:
    for dtype, expected in ((torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
        template, weights, x, groups = problem("linear 3-5", [2, 1], dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert grouped_call(template, weights, x, groups).dtype == expected


# --- modes of PyTorch ---------------------------------------------------------------------------------------


def test_inference_mode_leaves_nothing_behind_that_could_not_be_trained_with() -> None:
    name = "conv 3x3 small map"
    template, weights, x, groups = problem(name, [2, 1])
    convolutions._kept_touches.cache_clear()
    with torch.inference_mode():
        first = grouped_call(template, weights, x, Groups(groups.index, groups.count))
    second = grouped_call(template, weights, x, groups)
    second.sum().backward()
    assert torch.equal(first, second)


def test_a_default_device_leaves_nothing_behind() -> None:
    name = "conv 3x3 small map"
    template, weights, x, groups = problem(name, [2, 1])
    convolutions._kept_touches.cache_clear()
    with torch.device("meta"):
        y = grouped_call(template, weights, x, Groups(groups.index, groups.count))
    assert torch.equal(y, grouped_call(template, weights, x, groups))


@pytest.fixture
def fresh_compiler() -> None:
    """The compiler counts how often it sees one function, over all tests."""
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["linear 3-5", "conv 3x3 small map", "conv 3x3", "transposed overlapping", "nested"])
def test_compiles_in_one_graph(name: str, dtype: torch.dtype) -> None:
    template, weights, x, groups = problem(name, [2, 0, 3], dtype=dtype)

    def call(x: Tensor, weights: dict[str, Tensor], index: Tensor) -> Tensor:
        return grouped_call(template, weights, x, Groups(index, groups.count))

    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
    y, expected = compiled(x, weights, groups.index), call(x, weights, groups.index)
    assert torch.equal(y, expected)
    ones = torch.ones_like(y)
    assert_same(gradients(y, weights, x, ones), gradients(expected, weights, x, ones), rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(compiled(x, weights, groups.index), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_backward_pass_can_be_traced_too() -> None:
    template, weights, x, groups = problem("linear 3-5", [2, 0, 3], dtype=torch.float32)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        return grouped_call(template, {"weight": weight, "bias": bias}, x, Groups(index, 3)).square().sum()

    arguments = x, weights["weight"], weights["bias"], groups.index
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    one = torch.ones(())
    expected = gradients(loss(*arguments), weights, x, one)
    assert_same(gradients(compiled(*arguments), weights, x, one), expected)

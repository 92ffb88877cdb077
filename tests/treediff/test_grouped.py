"""Grouped layers against one call per row, in values and in gradients."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from treediff.layers import Groups, ResidualBlock, convolutions, grouped, grouped_call, grouped_linear, products

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


# --- equal to the loops -------------------------------------------------------------------------------------


@each_case
@settings(max_examples=6)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 10**6))
def test_equals_one_call_per_row(name: str, sizes: list[int], seed: int) -> None:
    template, weights, x, groups = problem(name, sizes, seed=seed)
    y, expected = grouped_call(template, weights, x, groups), one_by_one(template, weights, x, groups)
    tight = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y, expected, **tight)
    upstream = normal(*y.shape, seed=seed + 200)
    assert_same(gradients(y, weights, x, upstream), gradients(expected, weights, x, upstream), **tight)


@each_case
@pytest.mark.parametrize("sizes", [[2, 0, 3, 1], [1], [0, 0], [0, 4, 0]], ids=str)
def test_equals_the_loops_in_float32(name: str, sizes: list[int]) -> None:
    template, weights, x, groups = problem(name, sizes, dtype=torch.float32)
    y = grouped_call(template, weights, x, groups)
    upstream = normal(*y.shape, seed=7, dtype=torch.float32)
    found = gradients(y, weights, x, upstream)
    for loop in (one_by_one, grouped._each_group):
        expected = loop(template, weights, x, groups)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert_same(found, gradients(expected, weights, x, upstream), rtol=1e-4, atol=1e-4)
    for g, rows in enumerate(sizes):
        if not rows:
            assert all(not found[key][g].any() for key in weights), "a group without rows has a gradient"


@each_case
def test_expanded_and_strided_gradients_from_above(name: str) -> None:
    template, weights, x, groups = problem(name, [2, 0, 3], dtype=torch.float32)
    y, expected = grouped_call(template, weights, x, groups), one_by_one(template, weights, x, groups)
    backwards = list(range(y.ndim))[::-1]
    strided = normal(*[y.shape[axis] for axis in backwards], dtype=torch.float32).permute(backwards)
    for upstream in (torch.ones(()).expand_as(y), strided):
        assert not upstream.is_contiguous() or y[0].numel() == 1
        found, wanted = (gradients(out, weights, x, upstream) for out in (y, expected))
        assert_same(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["linear 3-5", "layer norm", "group norm", "conv 3x3", "conv 3x3 small map", "transposed overlapping", "nested"],
)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    template, weights, x, groups = problem(name, [2, 0, 1])

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return grouped_call(template, dict(zip(weights, values, strict=True)), x, groups)

    assert torch.autograd.gradcheck(call, (x, *weights.values()), fast_mode=True)


def test_rules_are_used_where_they_should_be() -> None:
    """Equality alone would not notice that everything had become slow."""

    def looped(module: nn.Module) -> bool:
        return any(part.names and not part.links for part in grouped.parts_of(module))

    assert {name for name, (build, _) in CASES.items() if looped(build())} == LOOPED.keys()


def test_without_parameters_all_rows_run_at_once() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return x.exp()

    x = normal(5, 3)
    groups = Groups(torch.tensor([0, 0, 1, 3, 3]), 4)
    assert torch.equal(grouped_call(Counted(), {}, x, groups), x.exp())
    assert calls == [5]


def test_rows_in_the_middle_of_other_memory() -> None:
    """Grouped products want aligned rows; a view may start anywhere."""
    x = normal(13, dtype=torch.float32)[1:].view(3, 4)
    weight = normal(2, 4, 4, dtype=torch.float32)
    y = grouped_linear(x, weight, None, Groups(torch.tensor([0, 1, 1]), 2))
    torch.testing.assert_close(y, torch.stack([weight[g] @ row for g, row in zip([0, 1, 1], x, strict=True)]))


# --- only what is needed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_weights_cost_no_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    template, weights, x, groups = problem("linear 8-4", [2, 3], dtype=dtype)
    expected = gradients(one_by_one(template, weights, x, groups).sum(), weights, x, torch.ones((), dtype=dtype))["x"]
    monkeypatch.setattr(products, "_outer", pytest.fail)
    frozen = {key: w.detach() for key, w in weights.items()}
    grouped_call(template, frozen, x, groups).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_costs_no_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    template, weights, x, groups = problem("linear 8-4", [2, 3], dtype=dtype)
    expected = gradients(one_by_one(template, weights, x, groups).sum(), weights, x, torch.ones((), dtype=dtype))
    y = grouped_call(template, weights, x.detach(), groups)
    monkeypatch.setattr(products, "_multiply", pytest.fail)
    y.sum().backward()
    for key, w in weights.items():
        torch.testing.assert_close(w.grad, expected[key])


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

    def call(x: Tensor, weights: Weights, index: Tensor) -> Tensor:
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


# --- groups -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_groups(sizes: list[int]) -> None:
    groups = Groups(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), len(sizes))
    assert groups.sizes == sizes
    assert groups.ends.tolist() == list(accumulate(sizes)) and groups.ends.dtype == torch.int32


def test_groups_are_told_apart_by_identity() -> None:
    first, second = (Groups(torch.tensor([0, 1]), 2) for _ in range(2))
    assert first != second and len({first, second}) == 2  # comparing tensors would raise, or not be hashable
    assert "index=tensor([0, 1]), count=2" in repr(first)


# --- errors -------------------------------------------------------------------------------------------------


def test_refuses_rows_without_a_group() -> None:
    template, weights, x, _ = problem("linear 3-5", [2, 1])
    with pytest.raises(ValueError, match=r"a group for each row .* 3 rows with 2 entries .* 2 sets .* 2 groups"):
        grouped_call(template, weights, x, Groups(torch.tensor([0, 1]), 2))
    with pytest.raises(ValueError, match=r"found 3 rows with 3 entries in groups\.index, and 2 sets of weights for 3"):
        grouped_linear(x, weights["weight"], None, Groups(torch.tensor([0, 1, 2]), 3))
    template, weights, x, _ = problem("layer norm", [2, 1])
    with pytest.raises(ValueError, match="3 rows with 2 entries"):
        grouped_call(template, weights, x, Groups(torch.tensor([0, 1]), 2))


def test_refuses_rows_of_another_width() -> None:
    template, weights, x, groups = problem("linear 3-5", [2, 1])
    with pytest.raises(ValueError, match=r"rows \(T, \.\.\., in_features\) .* found \(3, 2\) and \(2, 5, 3\)"):
        grouped_call(template, weights, x[:, :2], groups)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 2, 2), (2, 5), (2, 5, 7, 2)], ids=str)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_refuses_other_maps(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    template = kind(2, 3, 3) if kind is nn.Conv2d else kind(2, 3, 3, padding=3)
    weights = {key: p[None] for key, p in template.named_parameters()}
    with pytest.raises(ValueError, match=r"rows of shape \(2, height, width\), no smaller than the kernel, for Conv.*"):
        grouped_call(template, weights, torch.zeros(1, *shape), Groups(torch.tensor([0]), 1))


def test_refuses_missing_weights() -> None:
    layer = nn.Linear(2, 2)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    weights = {key: p[None] for key, p in twice.named_parameters()}
    with pytest.raises(ValueError, match=r"no weights for Linear\(.*a layer must not stand in a network twice"):
        grouped_call(twice, weights, torch.zeros(1, 2), Groups(torch.tensor([0]), 1))

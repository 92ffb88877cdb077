"""Grouped layers against one call per row, in values and in gradients."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import CASES, LOOPED, assert_same, each_case, gradients, normal, one_by_one, problem
from torch import Tensor, nn

from treediff.layers import Groups, grouped_call, grouped_linear
from treediff.layers.grouped import _products as products
from treediff.layers.grouped import call as grouped

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
        return any(layer.names and layer.step is None for layer in grouped.layers_of(module))

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
    monkeypatch.setattr(products, "outer", pytest.fail)
    frozen = {key: w.detach() for key, w in weights.items()}
    grouped_call(template, frozen, x, groups).sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_costs_no_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    template, weights, x, groups = problem("linear 8-4", [2, 3], dtype=dtype)
    expected = gradients(one_by_one(template, weights, x, groups).sum(), weights, x, torch.ones((), dtype=dtype))
    y = grouped_call(template, weights, x.detach(), groups)
    monkeypatch.setattr(products, "multiply", pytest.fail)
    y.sum().backward()
    for key, w in weights.items():
        torch.testing.assert_close(w.grad, expected[key])


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
    with pytest.raises(ValueError, match=r"no weights for Linear\(.*a layer must not occur in a network twice"):
        grouped_call(twice, weights, torch.zeros(1, 2), Groups(torch.tensor([0]), 1))

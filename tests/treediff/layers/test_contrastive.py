"""Contrastive losses against slow loops, hand-computed cases and the cross-entropy they are."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import assert_gradient_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.layers.contrastive import ProjectionHead, decision_nt_xent, nt_xent


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_nt_xent(first: Tensor, second: Tensor, temperature: float, item_weights: list[float]) -> float:
    """The definition, item by item and pair by pair."""
    items = [row.tolist() for row in (*first, *second)]
    pairs = len(first)

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(items[i], items[j], strict=True))
        return float(dot / (math.hypot(*items[i]) * math.hypot(*items[j])) / temperature)

    total = 0.0
    for i, weight in enumerate(item_weights):
        others = sum(math.exp(similarity(i, j)) for j in range(2 * pairs) if j != i)
        total += weight * (math.log(others) - similarity(i, (i + pairs) % (2 * pairs)))
    return float(total / sum(item_weights))


# --- nt_xent ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 2.0), st.integers(0, 2), st.integers(0, 10**6))
def test_equals_the_double_loop(pairs: int, width: int, temperature: float, weighting: int, seed: int) -> None:
    first, second = normal(2, pairs, width, seed=seed)
    drawn = uniform(2, pairs, seed=seed) + 0.01
    weights = (None, drawn[0], drawn)[weighting]
    per_item = (torch.ones(2, pairs), drawn[0].expand(2, pairs), drawn)[weighting].flatten().tolist()
    found = nt_xent(first, second, temperature=temperature, weights=weights)
    assert found.item() == pytest.approx(slow_nt_xent(first, second, temperature, per_item), abs=1e-9)


def test_equals_cross_entropy_over_the_other_items() -> None:
    first, second = normal(2, 7, 5)
    items = F.normalize(torch.cat([first, second]), dim=1)
    logits = (items @ items.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(14).roll(7))
    torch.testing.assert_close(nt_xent(first, second), expected)


def test_hand_computed() -> None:
    views = torch.eye(2)
    assert nt_xent(views, views, temperature=1.0).item() == pytest.approx(math.log(math.e + 2) - 1)
    opposite = nt_xent(views[:1], -views[:1], temperature=1.0)  # a single pair: nobody else to be told from
    assert opposite.item() == pytest.approx(0.0, abs=1e-6)
    same = torch.ones(6, 3)
    assert nt_xent(same, same).item() == pytest.approx(math.log(11))


def test_only_directions_count_and_sides_are_alike() -> None:
    first, second = normal(2, 6, 3)
    lengths = uniform(6, 1) + 0.1
    loss = nt_xent(first, second)
    torch.testing.assert_close(nt_xent(first * lengths, second / lengths), loss)
    torch.testing.assert_close(nt_xent(second, first), loss)


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_equal_weights_are_no_weights(shape: tuple[int, ...], weight: float) -> None:
    first, second = normal(2, 6, 3)
    weights = torch.full(shape, weight, dtype=torch.float64)
    torch.testing.assert_close(nt_xent(first, second, weights=weights), nt_xent(first, second))


def test_weight_zero_leaves_the_mean_but_not_the_denominators() -> None:
    first, second = normal(2, 5, 3).requires_grad_()
    loss = nt_xent(first, second, weights=torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))
    expected = slow_nt_xent(first, second, 0.5, [0.0, 1.0, 1.0, 1.0, 1.0] * 2)
    assert loss.item() == pytest.approx(expected)
    assert abs(loss.item() - nt_xent(first[1:], second[1:]).item()) > 0.01  # more than dropping the pair
    (gradient,) = torch.autograd.grad(loss, first)
    assert gradient[0].abs().sum() > 0


def test_one_view_of_a_pair_can_be_weighted_out() -> None:
    first, second = normal(2, 3, 2)
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])
    expected = slow_nt_xent(first, second, 0.5, weights.flatten().tolist())
    assert nt_xent(first, second, weights=weights).item() == pytest.approx(expected)


def test_no_weight_at_all_is_a_loss_of_zero_with_gradient_zero() -> None:
    first, second = normal(2, 4, 3).requires_grad_()
    loss = nt_xent(first, second, weights=torch.zeros(4))
    (gradient,) = torch.autograd.grad(loss, first)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))


def test_a_row_of_zeros_is_orthogonal_to_all() -> None:
    first, second = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    stand_in = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    loss = nt_xent(first.requires_grad_(), second)
    torch.testing.assert_close(loss, nt_xent(stand_in, F.pad(second, (0, 1))))
    (gradient,) = torch.autograd.grad(loss, first)
    assert gradient.abs().max() < 1  # one dead row must not blow up a whole network


def test_descending_pulls_views_together() -> None:
    first, second = normal(2, 8, 4).requires_grad_()
    before = nt_xent(first, second)
    (gradient,) = torch.autograd.grad(before, first)
    assert nt_xent(first - 0.1 * gradient, second) < before


def test_gradients_are_those_of_finite_differences() -> None:
    first, second = normal(4, 3).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    weights = (uniform(2, 4) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, w: nt_xent(a, b, weights=w), (first, second, weights))


# --- decision_nt_xent ---------------------------------------------------------------------------------------


def slow_decisions(first: Tensor, second: Tensor, temperature: float, weights: Tensor) -> float:
    """Router by router, with the posterior's two probabilities as they stand; weights `(2, B, I)`."""
    total = 0.0
    for i in range(first.shape[1]):
        a, b = (torch.stack([torch.sigmoid(x[:, i]), 1 - torch.sigmoid(x[:, i])], 1) for x in (first, second))
        total += slow_nt_xent(a, b, temperature, weights[..., i].flatten().tolist())
    return total


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.2, 2.0), st.integers(0, 2), st.integers(0, 10**6))
def test_decisions_equal_the_loop(pairs: int, routers: int, temperature: float, weighting: int, seed: int) -> None:
    first, second = 3 * normal(2, pairs, routers, seed=seed)
    drawn = uniform(2, pairs, routers, seed=seed) + 0.01
    weights = (None, drawn[0], drawn)[weighting]
    per_item = (torch.ones_like(drawn), drawn[0].expand_as(drawn), drawn)[weighting]
    found = decision_nt_xent(first, second, weights=weights, temperature=temperature)
    assert found.item() == pytest.approx(slow_decisions(first, second, temperature, per_item), abs=1e-9)


def test_one_router_is_a_column() -> None:
    (first, second), weights = normal(2, 5), uniform(5)
    expected = decision_nt_xent(first[:, None], second[:, None], weights=weights[:, None])
    torch.testing.assert_close(decision_nt_xent(first, second, weights=weights), expected)
    both = torch.stack([weights, weights])
    torch.testing.assert_close(decision_nt_xent(first, second, weights=both), expected)


def test_decisions_by_hand() -> None:
    # Sure and balanced: as two orthogonal directions, two items each.
    sure = torch.tensor([1e4, -1e4])
    assert decision_nt_xent(sure, sure).item() == pytest.approx(math.log(math.e + 2) - 1)
    # All the same turn: nothing tells anyone apart, at each of four routers.
    assert decision_nt_xent(torch.ones(3, 4), torch.ones(3, 4)).item() == pytest.approx(4 * math.log(5))


def test_a_router_nobody_reaches_adds_nothing() -> None:
    first, second = normal(2, 4, 2).requires_grad_()
    weights = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    loss = decision_nt_xent(first, second, weights=weights)
    torch.testing.assert_close(loss, decision_nt_xent(first[:, 1], second[:, 1]))
    (gradient,) = torch.autograd.grad(loss, first)
    assert torch.equal(gradient[:, 0], torch.zeros(4, dtype=torch.float64)) and gradient[:, 1].abs().min() > 0


def test_a_tree_without_routers_has_loss_zero() -> None:
    assert decision_nt_xent(torch.zeros(3, 0), torch.zeros(3, 0)).item() == 0


def test_no_gradient_flows_into_the_reach() -> None:
    first, second = normal(2, 4, 2).requires_grad_()
    reach = uniform(4, 2).requires_grad_()
    loss = decision_nt_xent(first, second, weights=reach)
    assert torch.autograd.grad(loss, [first, reach], allow_unused=True)[1] is None


def test_decision_gradients_are_those_of_finite_differences() -> None:
    first, second = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    weights = uniform(3, 2)
    assert torch.autograd.gradcheck(lambda a, b: decision_nt_xent(a, b, weights=weights), (first, second))


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_sure_routers_keep_finite_gradients(size: float) -> None:
    first = (size * torch.tensor([1.0, -1.0, 1.0])).requires_grad_()
    loss = decision_nt_xent(first, torch.tensor([-size, 0.0, size]))
    (gradient,) = torch.autograd.grad(loss, first)
    assert loss.isfinite() and gradient.isfinite().all()


# --- both: precision and compilation ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [nt_xent, decision_nt_xent])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    first, second = (100 * normal(2, 8, 4)).to(dtype)
    found = loss(first, second)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(first.float(), second.float()))


@pytest.mark.parametrize("loss", [nt_xent, decision_nt_xent])
def test_autocast_changes_nothing(loss: Callable[..., Tensor]) -> None:
    first, second = normal(2, 8, 4, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(first, second)
    assert torch.equal(found, loss(first, second)) and torch.autograd.grad(found, first)[0].isfinite().all()


def test_compiles_in_one_graph() -> None:
    def total(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
        return nt_xent(first, second) + decision_nt_xent(first, second, weights=weights)

    first, second = normal(2, 4, 3)
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(first, second, uniform(4, 3)), total(first, second, uniform(4, 3)))


# --- both: errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), [((3, 2), (4, 2)), ((3,), (3,)), ((0, 2), (0, 2)), ((2, 3, 4), (2, 3, 4))]
)
def test_nt_xent_refuses_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"same shape \(B, D\) with at least one pair; found \("):
        nt_xent(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize(("first", "second"), [((3,), (4,)), ((0,), (0,)), ((2, 3, 4), (2, 3, 4))])
def test_decisions_refuse_shapes(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"same shape \(B,\) or \(B, I\) with at least one pair; found \("):
        decision_nt_xent(torch.zeros(first), torch.zeros(second))


def test_refuses_weights_of_another_shape() -> None:
    views = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"shape \(3,\), one per pair, or \(2, 3\), one per item; found \(6,\)"):
        nt_xent(views, views, weights=torch.ones(6))
    with pytest.raises(ValueError, match=r"\(3, 2\), one per pair, or \(2, 3, 2\), one per item; found \(3,\)"):
        decision_nt_xent(views, views, weights=torch.ones(3))


def test_refuses_whole_numbers() -> None:
    views = torch.ones(3, 2, dtype=torch.int64)
    for loss in (nt_xent, decision_nt_xent):
        with pytest.raises(TypeError, match=r"float views; found torch.int64 and torch.int64; call .float\(\)"):
            loss(views, views)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_refuses_temperatures(temperature: float) -> None:
    for loss in (nt_xent, decision_nt_xent):
        with pytest.raises(ValueError, match=f"temperature must be above 0, found {temperature}"):
            loss(torch.ones(2, 2), torch.ones(2, 2), temperature=temperature)


# --- ProjectionHead -----------------------------------------------------------------------------------------


def test_head_is_the_network_it_says() -> None:
    head = ProjectionHead(in_features=12, hidden=6, out_features=4, dtype=torch.float64)
    maps = normal(5, 3, 2, 2)
    first, norm, _, last = head.network
    assert isinstance(first, nn.Linear) and isinstance(norm, nn.LayerNorm) and isinstance(last, nn.Linear)
    hidden = maps.reshape(5, 12) @ first.weight.T + first.bias
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    expected = hidden * hidden.sigmoid() @ last.weight.T + last.bias
    torch.testing.assert_close(head(maps), expected)
    torch.testing.assert_close(head(maps.flatten(1)), expected)


def test_head_treats_rows_alone_unless_asked_otherwise() -> None:
    rows = normal(6, 5)
    layer = ProjectionHead(in_features=5, hidden=8, out_features=3, dtype=torch.float64)
    batch = ProjectionHead(in_features=5, hidden=8, out_features=3, norm=nn.BatchNorm1d, dtype=torch.float64)
    torch.testing.assert_close(layer(rows)[:2], layer(rows[:2]))
    assert not torch.allclose(batch(rows)[:2], batch(rows[:2]))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_head_threads_device_and_dtype(norm: type[nn.Module]) -> None:
    head = ProjectionHead(in_features=4, norm=norm, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}
    assert [tuple(p.shape) for p in head.network[0].parameters()] == [(512, 4), (512,)]
    assert head(torch.empty(2, 4, device="meta", dtype=torch.bfloat16)).shape == (2, 64)


def test_head_trains_under_autocast_with_every_parameter_in_use() -> None:
    head = ProjectionHead(in_features=4, hidden=8, out_features=3)
    first, second = normal(2, 6, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(head(first), head(second))
    torch.autograd.backward(loss)
    assert_gradient_everywhere(head)


def test_head_compiles_in_one_graph() -> None:
    head = ProjectionHead(in_features=4, hidden=8, out_features=3)
    rows = normal(2, 4, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="eager")(rows), head(rows))


def test_head_shows_its_widths() -> None:
    head = ProjectionHead(in_features=4, hidden=8, out_features=3)
    assert "in_features=4, hidden=8, out_features=3" in repr(head).splitlines()[1]


def test_head_refuses_other_widths() -> None:
    head = ProjectionHead(in_features=4, hidden=8, out_features=3)
    with pytest.raises(ValueError, match=r"expected 4 .* found 12 in an input of shape \(2, 3, 2, 2\); build the"):
        head(torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize("name", ["in_features", "hidden", "out_features"])
def test_head_refuses_empty_layers(name: str) -> None:
    widths: dict[str, Any] = {"in_features": 4, "hidden": 4, "out_features": 4, name: 0}
    with pytest.raises(ValueError, match=f"widths of at least 1; found .*{name}=0"):
        ProjectionHead(**widths)

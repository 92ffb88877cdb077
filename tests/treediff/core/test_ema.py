"""Averaged weights against a loop over plain numbers, and that the model always gets its own back."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, build, observations
from safetensors.torch import load_file, save_file
from strategies import quick
from torch import Tensor, nn
from worlds import seeded

from treediff import EMA


def module(seed: int = 0) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    move(net, seed)
    return net


def move(net: nn.Module, seed: int) -> None:
    """A step of some optimiser."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))


def numbers(net: nn.Module) -> list[float]:
    return [value for p in net.parameters() for value in p.detach().flatten().tolist()]


def bits(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def slow(history: list[list[float]], decay: float, warm_up: bool) -> list[float]:
    """The average of all numbers, one at a time."""
    average = list(history[0])
    for step, now in enumerate(history[1:], start=1):
        kept = min(decay, (1 + step) / (10 + step)) if warm_up else decay
        average = [kept * a + (1 - kept) * w for a, w in zip(average, now, strict=True)]
    return average


@quick
@given(st.floats(0, 0.9999), st.booleans(), st.integers(0, 12), st.integers(0, 2**20))
def test_equals_the_loop(decay: float, warm_up: bool, steps: int, seed: int) -> None:
    net = module(seed)
    ema, history = EMA(net, decay, warm_up=warm_up), [numbers(net)]
    for step in range(steps):
        move(net, seed + step + 1)
        ema.update()
        history.append(numbers(net))
    with ema.average():
        assert numbers(net) == pytest.approx(slow(history, decay, warm_up), abs=1e-9)
    assert numbers(net) == history[-1] and ema.steps == steps


def test_warm_up_soon_forgets_the_first_weights_and_ends_at_the_decay() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 1.0)
    ema, without = EMA(net, 0.9), EMA(net, 0.9, warm_up=False)
    nn.init.constant_(net.weight, 0.0)
    shares = []
    for _ in range(100):
        before = float(ema.weights["weight"])
        ema.update()
        without.update()
        shares.append(float(ema.weights["weight"]) / before)
    assert shares[:3] == pytest.approx([2 / 11, 3 / 12, 4 / 13])
    assert shares[79:] == pytest.approx([0.9] * 21)
    assert float(without.weights["weight"]) == pytest.approx(0.9**100)


def test_decay_0_is_the_model_itself() -> None:
    net = module()
    ema = EMA(net, 0.0)
    move(net, 1)
    ema.update()
    before = numbers(net)
    with ema.average():
        assert numbers(net) == before


# --- the context --------------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, EMA]:
    net = module()
    ema = EMA(net, 0.5)
    for seed in (1, 2):
        move(net, seed)
        ema.update()
    return net, ema


def test_the_models_own_weights_come_back_bit_by_bit() -> None:
    net, ema = trained()
    before, averages = bits(net), {name: w.clone() for name, w in ema.weights.items()}
    places = [p.data_ptr() for p in net.parameters()]
    with ema.average():
        assert all(torch.equal(p, averages[name]) for name, p in net.named_parameters())
        assert not torch.equal(net[0].weight, before["0.weight"])  # type: ignore[index]
    assert same(bits(net), before) and same(ema.weights, averages)
    assert [p.data_ptr() for p in net.parameters()] == places  # an optimiser still holds them


def test_they_come_back_whatever_happens() -> None:
    net, ema = trained()
    before, averages = bits(net), {name: w.clone() for name, w in ema.weights.items()}
    with pytest.raises(RuntimeError, match="on purpose"), ema.average():
        raise RuntimeError("on purpose")
    assert same(bits(net), before) and same(ema.weights, averages)


def test_what_happens_inside_does_not_reach_the_averages() -> None:
    net, ema = trained()
    before, averages = bits(net), {name: w.clone() for name, w in ema.weights.items()}
    with ema.average():
        move(net, 9)
        with ema.average():
            assert torch.equal(net[0].weight, averages["0.weight"])  # type: ignore[index]
    assert same(bits(net), before) and same(ema.weights, averages)


def test_gradients_and_graphs_are_left_alone() -> None:
    net, ema = trained()
    net(torch.ones(4, 2).double()).sum().backward()
    grads = [p.grad for p in net.parameters()]
    ema.update()
    with ema.average():
        assert all(p.requires_grad for p in net.parameters())
    assert all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
    assert not any(w.requires_grad for w in ema.weights.values())


def test_buffers_stay_the_models_own() -> None:
    net, ema = trained()
    net(torch.randn(8, 2, generator=seeded(), dtype=torch.float64))
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    ema.update()
    with ema.average():
        assert same(dict(net.named_buffers()), buffers)
    assert same(dict(net.named_buffers()), buffers) and not any("running" in name for name in ema.state_dict())


def test_shared_and_frozen_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)).double()
    net[1].weight = net[0].weight
    net[2].weight.requires_grad_(False)
    ema, frozen, first = EMA(net, 0.5, warm_up=False), net[2].weight.clone(), net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.fill_(3.0)
    ema.update()
    with ema.average():
        assert net[1].weight is net[0].weight
        torch.testing.assert_close(net[0].weight.detach(), 0.5 * first + 1.5)
        assert torch.equal(net[2].weight, frozen) and not net[2].weight.requires_grad
    assert (net[1].weight == 3).all() and torch.equal(net[2].weight, frozen)


def test_a_tree_notices_the_change() -> None:
    """A bank of nodes keeps stacked weights in eval mode; averages must not be missed."""
    model = build(GROWN).eval()
    ema, x = EMA(model, 0.5, warm_up=False), observations(model, 4)
    with torch.no_grad():
        first = model.leaf_log_probs(x)
        for p in model.parameters():
            p.mul_(3)
        ema.update()
        last = model.leaf_log_probs(x)
        with ema.average():
            average = model.leaf_log_probs(x)
        assert torch.equal(model.leaf_log_probs(x), last)
        for p in model.parameters():
            p.mul_(2 / 3)
        torch.testing.assert_close(model.leaf_log_probs(x), average)
    assert not torch.isclose(first, average).any()


# --- states -------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_state(tmp_path: Path) -> None:
    net, ema = trained()
    save_file(ema.state_dict(), tmp_path / "ema")
    other = EMA(module(7), 0.5)
    held = other.weights["0.weight"]
    other.load_state_dict(load_file(tmp_path / "ema"))
    assert other.steps == 2 and same(other.weights, ema.weights) and other.weights["0.weight"] is held
    other.model.load_state_dict(net.state_dict())
    for seed in (3, 4):
        for one in (ema, other):
            move(one.model, seed)
            one.update()
    assert same(ema.state_dict(), other.state_dict()) and ema.state_dict()["steps"] == 4


def test_a_state_must_fit_and_nothing_changes_otherwise() -> None:
    _, ema = trained()
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    bad = {
        "missing": {k: v for k, v in before.items() if k != "weights.0.weight"},
        "unknown": {**before, "weights.9.weight": torch.zeros(2)},
        "shape": {**before, "weights.2.weight": torch.zeros(3, 1)},
        "steps": {**before, "steps": torch.zeros(2)},
    }
    messages = {
        "missing": "at 'weights.0.weight': expected (3, 2), found no such tensor",
        "unknown": "at 'weights.9.weight': expected no such tensor, found (2,)",
        "shape": "at 'weights.2.weight': expected (1, 3), found (3, 1)",
        "steps": "at 'steps': expected (), found (2,)",
    }
    for name, state in bad.items():
        message = f"the state does not fit the model {messages[name]}"
        with pytest.raises(ValueError, match=re.escape(message)):
            ema.load_state_dict({**state, "weights.0.bias": torch.ones(3).double()})
        assert same(ema.state_dict(), before), name


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_the_decay_is_a_share(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay must be at least 0 and below 1, found {decay}"):
        EMA(nn.Linear(1, 1), decay)


def test_a_model_that_changed_needs_a_new_average() -> None:
    model = build(GROWN)
    ema = EMA(model)
    model.prune(5)
    message = re.escape(
        "the model has no parameter 'banks.decoders.5' any more; make a new EMA of a model that changed"
    )
    with pytest.raises(KeyError, match=message):
        ema.update()
    with pytest.raises(KeyError, match=message), ema.average():
        pass
    grown = build(GROWN)
    ema = EMA(grown, 0.5)
    grown.banks.decoders.add(99, generator=seeded())  # is not followed
    ema.update()
    assert not any("99" in name for name in ema.weights)


def test_averages_of_half_precision_move_in_small_steps() -> None:
    """In bfloat16 a step of a thousandth is lost, and the average would stay at 1 for ever."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1)
        ema = EMA(net, decay=0.999, warm_up=False)
        net.weight.fill_(2)
    for _ in range(700):
        ema.update()
    assert ema.weights["weight"].item() == pytest.approx(2 - 0.999**700, abs=1e-4)
    with ema.average():
        assert net.weight.dtype == torch.bfloat16 and net.weight.item() == pytest.approx(1.5036, abs=0.005)
    assert net.weight.item() == 2


# --- inference mode -----------------------------------------------------------------------------------------


def test_in_inference_mode_everything_is_as_ever() -> None:
    net, plain = module(), EMA(module(), 0.5)
    state = EMA(module(3), 0.5).state_dict()
    with torch.inference_mode():
        ema = EMA(net, 0.5)
        move(net, 1)
        ema.update()
        with ema.average():
            assert ema.own is not None and not any(weight.is_inference() for weight in ema.own.values())
        ema.load_state_dict(ema.state_dict())
    move(plain.model, 1)
    plain.update()
    assert same(ema.weights, plain.weights)
    for each in (*ema.weights.values(), *net.parameters()):
        assert not each.is_inference()
        each.detach().add_(0)  # in place, which a tensor of inference mode would refuse
    net(torch.ones(4, 2).double()).sum().backward()
    ema.update()
    with torch.inference_mode():
        ema.load_state_dict(state)
    ema.update()


def test_a_context_entered_in_inference_mode_can_be_left_outside() -> None:
    net, ema = trained()
    before, context = bits(net), ema.average()
    with torch.inference_mode():
        context.__enter__()
    context.__exit__(None, None, None)
    assert same(bits(net), before)


def test_the_average_of_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 1)
        ema = EMA(net)
        ema.update()
        with ema.average():
            net(torch.zeros(1, 2))
    assert not any(weight.is_inference() for weight in ema.weights.values())


# --- those who are asked before a state is loaded -----------------------------------------------------------


def test_who_is_asked_before_a_load_can_refuse_it() -> None:
    _, ema = trained()
    state, asked = {name: value.clone() for name, value in ema.state_dict().items()}, []

    def refuse() -> None:
        asked.append(ema.steps)
        raise ValueError("rows of the state were erased")

    ema.update()
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    ema.before_load.append(refuse)
    with pytest.raises(ValueError, match="rows of the state were erased"):
        ema.load_state_dict(state)
    assert asked == [3] and same(ema.state_dict(), before)
    with pytest.raises(ValueError, match="the state does not fit the model"):
        ema.load_state_dict({})
    assert asked == [3], "a state that does not fit is nobody's business"
    ema.before_load[:] = [lambda: asked.append(-1), lambda: asked.append(-2)]
    ema.load_state_dict(state)
    assert asked == [3, -1, -2] and same(ema.state_dict(), state)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_has_nobody_to_ask(duplicate: Callable[[EMA], EMA]) -> None:
    _, ema = trained()
    ema.before_load.append(ema.update)
    other = duplicate(ema)
    assert other.before_load == [] and ema.before_load == [ema.update]
    assert same(other.weights, ema.weights) and other.steps == ema.steps

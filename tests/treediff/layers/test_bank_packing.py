"""Weights packed in eval mode: the next call sees every change of a weight."""

import copy
from collections.abc import Callable

import pytest
import torch
from banks import bank_of, call, normal, one_by_one, seeded
from torch import nn

from treediff.core.modes import evaluating
from treediff.layers import Groups, NodeBank


def test_weights_are_packed_once_in_eval_mode() -> None:
    bank = bank_of(0, 2).eval()
    with torch.no_grad():
        first = bank.packed([0, 2])
        assert bank.packed([0, 2]) is first
        assert bank.packed([2, 0]) is not first
    with torch.inference_mode():
        assert bank.packed([2, 0]) is bank.packed([2, 0])


def test_packed_weights_are_never_kept_where_they_may_train() -> None:
    bank = bank_of(0, 2).eval()
    with torch.no_grad():
        kept = bank.packed([0, 2])
    assert bank.packed([0, 2]) is not kept and bank.packed([0, 2]).requires_grad
    bank.train()
    with torch.no_grad():
        assert bank.packed([0, 2]) is not bank.packed([0, 2])


def step(make: Callable[..., torch.optim.Optimizer]) -> Callable[[NodeBank], None]:
    def change(bank: NodeBank) -> None:
        for parameter in bank.parameters():
            parameter.grad = torch.ones_like(parameter)
        make(bank.parameters(), lr=0.1).step()

    return change


def assign(bank: NodeBank) -> None:
    bank.assign(2, bank.module(0))


def write_through_views(bank: NodeBank) -> None:
    with torch.no_grad():
        bank.named_weights(2)["0.weight"].mul_(2)


def swap_data(bank: NodeBank) -> None:
    for parameter in bank.parameters():
        parameter.data = parameter.data + 1


def replace(bank: NodeBank) -> None:
    bank.remove(2)
    bank.add(2, generator=seeded(99))


def double(bank: NodeBank) -> None:
    bank.double()


def half(bank: NodeBank) -> None:
    bank.half()


def to_bfloat16(bank: NodeBank) -> None:
    bank.to(torch.bfloat16)


def load(bank: NodeBank) -> None:
    bank.load_state_dict({name: p + 1 for name, p in bank.state_dict().items()})


def load_and_assign(bank: NodeBank) -> None:
    bank.load_state_dict({name: p + 1 for name, p in bank.state_dict().items()}, assign=True)


def write_into_data_and_say_so(bank: NodeBank) -> None:
    for parameter in bank.parameters():
        parameter.data.add_(1)
    bank.eval()


def step_fused_and_say_so(bank: NodeBank) -> None:
    step(lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True))(bank)
    bank.eval()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(step(torch.optim.SGD), id="sgd"),
        pytest.param(step(torch.optim.Adam), id="adam"),
        pytest.param(step(lambda p, lr: torch.optim.Adam(p, lr=lr, foreach=True)), id="adam for each"),
        load,
        load_and_assign,
        assign,
        write_through_views,
        swap_data,
        replace,
        double,
        half,
        to_bfloat16,
        write_into_data_and_say_so,
        step_fused_and_say_so,
    ],
)
def test_a_change_is_seen_by_the_next_call(change: Callable[[NodeBank], None]) -> None:
    bank, nodes = bank_of(0, 2).eval(), [0, 2]
    with torch.no_grad():
        before = call(bank, normal(2, 3), nodes)
        change(bank)
        x = normal(2, 3, dtype=bank.weights_of(0).dtype)
        after = call(bank, x, nodes)
        expected = one_by_one(bank, x, nodes)
    rough = {"rtol": 2e-2, "atol": 2e-2} if x.dtype in (torch.float16, torch.bfloat16) else {}
    torch.testing.assert_close(after, expected, **rough)
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_functional_call_is_seen() -> None:
    """How moving averages are often evaluated."""
    bank, x, groups = bank_of(0, 2).eval(), normal(2, 3), Groups(torch.tensor([0, 1]), 2)
    average = {name: p.detach() + 1 for name, p in bank.named_parameters()}
    other = copy.deepcopy(bank)
    other.load_state_dict(average)
    with torch.no_grad():
        own = bank(x, groups, [0, 2])
        averaged = torch.func.functional_call(bank, average, (x, groups, [0, 2]))
        assert torch.equal(averaged, other(x, groups, [0, 2]))
        assert torch.equal(bank(x, groups, [0, 2]), own)


def test_a_pass_in_inference_mode_can_be_followed_by_training() -> None:
    bank, x = bank_of(0, 2, template=nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))).eval(), normal(2, 1, 2, 2)
    with torch.inference_mode():
        first = call(bank, x, [0, 2])
    with torch.no_grad():
        assert torch.equal(call(bank, x, [0, 2]), first)
    y = call(bank, x, [0, 2])
    y.sum().backward()
    assert torch.equal(y, first)


def test_a_bank_made_in_inference_mode() -> None:
    with torch.inference_mode():
        bank = bank_of(0, 2).eval()
        x = normal(2, 3)
        first = call(bank, x, [0, 2])
        bank.weights_of(0).add_(1)  # leaves no version behind
        second = call(bank, x, [0, 2])
    assert torch.equal(first[1], second[1]) and not torch.equal(first[0], second[0])


def test_a_template_is_in_the_mode_it_was_in_after_a_look() -> None:
    bank = bank_of(0, 2, template=nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))
    for training in (True, False):
        bank.train(training)
        with evaluating(bank):
            assert not bank.training and not bank.template[1].training
        assert bank.training == bank.template[1].training == training

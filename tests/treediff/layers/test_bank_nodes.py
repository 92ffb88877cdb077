"""Nodes come to a NodeBank and go, and no other node is touched."""

import copy

import torch
from banks import bank_of, call, normal, seeded, small
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from treediff.layers import NodeBank, initialize


def test_fresh_weights_are_those_of_the_initialised_template() -> None:
    bank, template = bank_of(4), small()
    initialize(template, generator=seeded(4))
    found = bank.named_weights(4)
    assert found.keys() == dict(template.named_parameters()).keys()
    for name, parameter in template.named_parameters():
        assert torch.equal(found[name], parameter)


def test_adding_moves_no_other_parameter() -> None:
    bank = bank_of(0, 2)
    before = dict(bank.named_parameters())
    bits = {name: (p.data_ptr(), p.clone()) for name, p in before.items()}
    bank.add(1, generator=seeded())
    bank.add(9, like=2)
    bank.remove(1)
    for name, parameter in before.items():
        assert bank.weights_of(int(name)) is parameter
        assert parameter.data_ptr() == bits[name][0] and torch.equal(parameter, bits[name][1])


def test_names_are_node_ids() -> None:
    bank = bank_of(3, 0, 11)
    assert bank.nodes == (3, 0, 11)
    assert list(bank.state_dict()) == ["3", "0", "11"]
    assert list(dict(bank.named_parameters())) == ["3", "0", "11"]
    bank.remove(0)
    assert bank.nodes == (3, 11) and list(bank.state_dict()) == ["3", "11"]


def test_like_copies_bits_and_nothing_else() -> None:
    bank = bank_of(0)
    bank.weights_of(0).requires_grad_(False)
    bank.add(1, like=0)
    assert torch.equal(bank.weights_of(1), bank.weights_of(0)) and bank.weights_of(1).requires_grad
    with torch.no_grad():
        bank.weights_of(1).zero_()
    assert bank.weights_of(0).any()


def test_a_generator_is_all_the_randomness() -> None:
    first, second, other = bank_of(5), bank_of(5), bank_of(6)
    before = torch.get_rng_state()
    first.add(0, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weights_of(5), second.weights_of(5))
    assert not torch.equal(first.weights_of(5), other.weights_of(6))


def test_named_weights_write_through() -> None:
    bank = bank_of(0, 2)
    with torch.no_grad():
        for name, weight in bank.named_weights(2).items():
            weight.fill_(len(name))
    for name, parameter in bank.module(2).named_parameters():
        assert (parameter == len(name)).all()
    assert not torch.equal(bank.weights_of(0), bank.weights_of(2))


def test_module_is_a_copy_and_assign_writes_it_back() -> None:
    bank = bank_of(0, 2)
    before = bank.weights_of(2).clone()
    module = bank.module(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(bank.weights_of(2), before)
    bank.assign(2, module)
    for name, parameter in module.named_parameters():
        assert torch.equal(bank.named_weights(2)[name], parameter)
    x = normal(1, 3)
    torch.testing.assert_close(call(bank, x, [2]), module(x))
    bank.assign(0, bank.module(2))
    assert torch.equal(bank.weights_of(0), bank.weights_of(2))


class Growing(RuleBasedStateMachine):
    """Any history of a bank, beside a dictionary of ordinary modules that goes through the same."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = NodeBank(nn.Linear(3, 2))
        self.modules: dict[int, nn.Module] = {}
        self.steps = 0

    def pick(self, number: int) -> int:
        return sorted(self.modules)[number % len(self.modules)]

    @rule(node=st.integers(0, 5))
    def add(self, node: int) -> None:
        if node not in self.modules:
            self.bank.add(node, generator=seeded(node))
            self.modules[node] = nn.Linear(3, 2)
            initialize(self.modules[node], generator=seeded(node))

    @precondition(lambda self: self.modules)
    @rule(node=st.integers(0, 5), number=st.integers(0, 5))
    def add_like(self, node: int, number: int) -> None:
        if node not in self.modules:
            other = self.pick(number)
            self.bank.add(node, like=other)
            self.modules[node] = copy.deepcopy(self.modules[other])

    @precondition(lambda self: self.modules)
    @rule(number=st.integers(0, 5))
    def remove(self, number: int) -> None:
        node = self.pick(number)
        self.bank.remove(node)
        del self.modules[node]

    @precondition(lambda self: self.modules)
    @rule(number=st.integers(0, 5))
    def write(self, number: int) -> None:
        node = self.pick(number)
        with torch.no_grad():
            self.bank.named_weights(node)["bias"].add_(1)
            self.modules[node].bias.add_(1)  # type: ignore[union-attr, operator]

    @rule()
    def copy(self) -> None:
        self.bank = copy.deepcopy(self.bank)

    @rule(training=st.booleans())
    def switch(self, training: bool) -> None:
        self.bank.train(training)

    @invariant()
    def computes_the_same(self) -> None:
        assert set(self.bank.nodes) == self.modules.keys()
        nodes = sorted(self.modules)
        if nodes:
            x = normal(len(nodes), 3)
            expected = torch.cat([self.modules[node](row[None]) for node, row in zip(nodes, x, strict=True)])
            with torch.no_grad():
                torch.testing.assert_close(call(self.bank, x, nodes), expected)


TestGrowing = Growing.TestCase
TestGrowing.settings = settings(max_examples=30, stateful_step_count=20)

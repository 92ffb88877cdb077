"""NodeBank against a dictionary of ordinary modules, one per node."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from banks import bank_of, call, normal, one_by_one, seeded, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from treediff.layers import Groups, NodeBank, ResidualBlock
from treediff.layers.grouped.bank import blocks_of

# --- computing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [[0], [7, 2], [2, 0, 7], [7, 7]], ids=str)
def test_equals_a_module_per_node(nodes: list[int]) -> None:
    bank, x = bank_of(0, 2, 7), normal(len(nodes), 3)
    torch.testing.assert_close(call(bank, x, nodes), one_by_one(bank, x, nodes))


def test_any_module_will_do() -> None:
    bank, x = bank_of(1, 2, template=ResidualBlock(8, 8)), normal(2, 8, 2, 2)
    torch.testing.assert_close(call(bank, x, [2, 1]), one_by_one(bank, x, [2, 1]))


def test_a_template_without_weights() -> None:
    bank, x = bank_of(1, 2, template=nn.Tanh()), normal(2, 3)
    assert torch.equal(call(bank, x, [2, 1]), x.tanh())


def test_gradient_goes_to_the_nodes_that_were_asked() -> None:
    bank, x = bank_of(0, 2, 7), normal(2, 3)
    call(bank, x, [7, 0]).sum().backward()
    for row, node in zip(x, [7, 0], strict=True):
        module = bank.module(node)
        module(row[None]).sum().backward()
        gradient = bank.weights_of(node).grad
        assert gradient is not None
        found = bank._views(gradient[None])
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[name][0], parameter.grad)
    assert bank.weights_of(2).grad is None


def test_a_frozen_node_stays_bit_equal() -> None:
    bank, x = bank_of(0, 2), normal(2, 3)
    bank.weights_of(0).requires_grad_(False)
    before = bank.weights_of(0).clone()
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
    call(bank, x, [0, 2]).sum().backward()
    moved = bank.weights_of(2).clone()
    optimizer.step()
    assert torch.equal(bank.weights_of(0), before)
    assert not torch.equal(bank.weights_of(2), moved)


# --- copies and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_a_copy_lives_on_its_own(duplicate: Callable[[NodeBank], NodeBank]) -> None:
    bank, x = bank_of(0, 2).eval(), normal(2, 3)
    with torch.no_grad():
        before = call(bank, x, [0, 2])
        twin = duplicate(bank)
        assert not twin.training
        assert torch.equal(call(twin, x, [0, 2]), before)
        for parameter in twin.parameters():
            parameter.add_(1)
        assert not torch.equal(call(twin, x, [0, 2]), before)
        assert torch.equal(call(bank, x, [0, 2]), before)
    twin.add(1, generator=seeded())
    assert bank.nodes == (0, 2)


def test_state_dict_round_trip() -> None:
    bank, twin, x = bank_of(0, 2), bank_of(2, 0), normal(2, 3)
    twin.load_state_dict({name: p + 1 for name, p in twin.state_dict().items()})
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(twin, x, [0, 2]), call(bank, x, [0, 2]))
    with pytest.raises(RuntimeError, match=r'Missing key.*"5"'):
        bank_of(0, 2, 5).load_state_dict(bank.state_dict())


# --- where and as what weights are stored -------------------------------------------------------------------


def test_the_template_is_left_alone() -> None:
    template = small().eval()
    before = {name: p.clone() for name, p in template.named_parameters()}
    bank = NodeBank(template)
    bank.add(0, generator=seeded())
    assert template is not bank.template and not template.training
    for name, parameter in template.named_parameters():
        assert torch.equal(parameter, before[name])
    assert all(p.is_meta for p in bank.template.parameters()) and not list(NodeBank(template).parameters())


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_template_on_the_meta_device(device: str | None) -> None:
    with torch.device("meta"):
        template = small().double()
    bank = NodeBank(template, device=device)
    bank.add(0, generator=seeded())
    assert bank.weights_of(0).device.type == "cpu" and bank.weights_of(0).dtype == torch.float64
    assert torch.equal(bank.weights_of(0), bank_of(0, template=small().double()).weights_of(0))


def test_device_and_dtype_are_the_users() -> None:
    bank = NodeBank(small(), device="meta", dtype=torch.float64)
    bank.add(0)
    assert bank.weights_of(0).is_meta and bank.weights_of(0).dtype == torch.float64
    assert bank.module(0)[0].weight.is_meta  # type: ignore[index]
    bank.to_empty(device="cpu")
    bank.add(1, generator=seeded())
    assert not bank.weights_of(0).is_meta and not bank.weights_of(1).is_meta


@pytest.mark.parametrize("nodes", [(), (0,)])
def test_later_nodes_follow_a_conversion(nodes: tuple[int, ...]) -> None:
    bank = bank_of(*nodes).double()
    bank.add(5, generator=seeded(5))
    assert bank.weights_of(5).dtype == torch.float64
    module = bank.module(5)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    with torch.no_grad():
        bank.weights_of(5).add_(1e-12)
    bank.add(6, generator=seeded(6))
    bank.assign(6, bank.module(5))
    for name, weight in bank.named_weights(5).items():
        assert torch.equal(bank.named_weights(6)[name], weight)


def test_a_dropout_in_the_template_knows_the_mode() -> None:
    bank = bank_of(0, template=nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)))
    x = torch.ones(1, 3)
    dropped = (call(bank, x, [0]) == 0).float().mean()
    assert 0.2 < dropped < 0.8
    bank.eval()
    assert (call(bank, x, [0]) == 0).sum() == 0
    assert (call(copy.deepcopy(bank), x, [0]) == 0).sum() == 0
    bank.train()
    assert (call(bank, x, [0]) == 0).any()


# --- compiled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training: bool) -> None:
    torch.compiler.reset()
    template = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(1), nn.Linear(8, 3))
    bank, x, index = bank_of(0, 2, 3, template=template).train(training), normal(5, 4), torch.tensor([0, 0, 1, 2, 2])

    def run(x: Tensor, index: Tensor) -> Tensor:
        return bank(x, Groups(index, 3), [3, 0, 2])

    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=False)
    with torch.set_grad_enabled(training):
        assert torch.equal(compiled(x, index), run(x, index))
        with torch.no_grad():
            bank.weights_of(3).add_(1)
        y, expected = compiled(x, index), run(x, index)
    assert torch.equal(y, expected)
    if training:
        found, wanted = (torch.autograd.grad(out.sum(), list(bank.parameters())) for out in (y, expected))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


# --- what it says -------------------------------------------------------------------------------------------


def test_shows_its_structure() -> None:
    text = repr(bank_of(0, 12, template=nn.Sequential(nn.Linear(3, 5), nn.Tanh())))
    assert "nodes=[0, 12], parameters_per_node=20" in text  # without what fills up the alignment
    assert "(0): Linear(in_features=3, out_features=5, bias=True)" in text and "(1): Tanh()" in text


def test_refuses_buffers() -> None:
    with pytest.raises(ValueError, match=r"must not keep buffers, found \['1.running_mean', .*use LayerNorm"):
        NodeBank(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_refuses_shared_weights() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"one weight in two places, found \['2.bias', '2.weight'\] used before"):
        NodeBank(nn.Sequential(layer, nn.Tanh(), layer))


def test_refuses_a_node_twice() -> None:
    with pytest.raises(ValueError, match="node 3 has weights already; remove it first"):
        bank_of(3).add(3)


def test_refuses_unknown_nodes() -> None:
    bank = bank_of(0, 2)
    bank_calls: list[Callable[[], object]] = [
        lambda: bank.weights_of(1),
        lambda: bank.named_weights(1),
        lambda: bank.module(1),
        lambda: bank.assign(1, small()),
        lambda: bank.remove(1),
        lambda: bank.add(5, like=1),
        lambda: call(bank, normal(2, 3), [0, 1]),
    ]
    for refused in bank_calls:
        with pytest.raises(KeyError, match=r"node 1 has no weights here; the nodes with weights are \[0, 2\]"):
            refused()
    assert bank.nodes == (0, 2)


def test_refuses_other_modules() -> None:
    bank = bank_of(0)
    before = bank.weights_of(0).clone()
    wider, shorter = small(), nn.Sequential(nn.Linear(3, 5))
    wider[3] = nn.Linear(5, 2)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"not built like the template: '3.bias' should have shape \(1,\), found \(2,"):
        bank.assign(0, wider)
    with pytest.raises(ValueError, match=r"'1.bias' should have shape \(5,\), found None"):
        bank.assign(0, shorter)
    assert torch.equal(bank.weights_of(0), before)


def test_refuses_rows_that_do_not_fit_the_nodes() -> None:
    bank, x = bank_of(0, 2), normal(2, 3)
    with pytest.raises(ValueError, match="expected at least one node"):
        bank(x[:0], Groups(torch.zeros(0, dtype=torch.int64), 0), [])
    with pytest.raises(ValueError, match="2 sets of weights for 1 groups"):
        bank(x, Groups(torch.tensor([0, 0]), 1), [0, 2])


def test_refuses_layers_that_cannot_be_drawn() -> None:
    with pytest.raises(TypeError, match="PReLU owns the parameters"):
        NodeBank(nn.PReLU()).add(0)


# --- blocks of rows -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_blocks_of_rows_give_what_all_rows_give(sizes: list[int]) -> None:
    whole, blocks = bank_of(*range(len(sizes))), NodeBank(small(), block=3)
    for node in whole.nodes:
        blocks.add(node, generator=seeded(node))
    groups = Groups(torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)), len(sizes))
    x, results = normal(sum(sizes), 3), []
    for bank in (whole, blocks):
        leaf = x.clone().requires_grad_()
        y = bank(leaf, groups, bank.nodes)
        (y * torch.arange(len(y))[:, None]).sum().backward()
        results.append([y, leaf.grad, *(torch.zeros(1) if p.grad is None else p.grad for p in bank.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_a_block_is_of_whole_groups() -> None:
    assert blocks_of([2, 1, 4, 0, 9, 1], 3) == [(3, 2), (4, 1), (0, 1), (9, 1), (1, 1)]

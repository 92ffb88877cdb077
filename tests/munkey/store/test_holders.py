"""Training between adding and forgetting: optimisers and averages follow the rows, and nothing of what went is left.

The oracle is a table with a row for every id there will ever be, whose rows stay where they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from stores import WIDTHS, Holder, keys_of, seeded, store
from torch import Tensor, nn

from munkey import KeyStore
from treediff import EMA

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW with amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1),
}
EVER = 60
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def pull(values: Tensor, targets: Tensor) -> Tensor:
    return ((values - targets) ** 2 * torch.arange(1.0, 3.0)).sum()


@each_optimizer
def test_training_equals_that_of_a_table_whose_rows_stay(name: str) -> None:
    sparse = name == "SparseAdam"
    found = store()
    model = Holder(found)
    targets = torch.randn(EVER, WIDTHS[1], generator=seeded(1))
    table = nn.Parameter(torch.zeros(EVER, WIDTHS[1]))
    plain = nn.ParameterList([table])
    there: list[int] = []
    pair: list[torch.optim.Optimizer] = []
    averages: list[EMA] = []

    def add(ids: list[int]) -> None:
        found.add(ids, keys_of(ids))
        there.extend(ids)
        with torch.no_grad():
            table[ids] = found.get(ids).values
            for ema in averages[1:]:
                ema.weights["0"][ids] = averages[0].weights["rows.values"][found.rows_of(ids)]

    def forget(ids: list[int]) -> None:
        found.forget(ids)
        for instance in ids:
            there.remove(instance)

    def train(steps: int) -> None:
        for k in range(steps):
            batch = [i for i in there if (i + k) % 3]
            for optimizer in pair:
                optimizer.zero_grad()
            pull(found.read(found.rows_of(batch), sparse=sparse), targets[batch]).backward()
            pull(nn.functional.embedding(torch.tensor(batch), table, sparse=sparse), targets[batch]).backward()
            for optimizer in pair:
                optimizer.step()
            for ema in averages:
                ema.update()

    add(list(range(20)))
    pair += [OPTIMIZERS[name]([found.values]), OPTIMIZERS[name]([table])]
    averages += [EMA(model, 0.9), EMA(plain, 0.9)]
    found.attach(pair[0], averages[0])
    train(3)
    forget([0, 3, 19, 18, 7])
    train(3)
    add(list(range(20, 50)))  # beyond the room there was
    train(3)
    found.compact()
    forget([i for i in there if i % 4 == 1])
    train(2)
    add([50, 51])
    train(2)
    got = found.get(there)
    torch.testing.assert_close(got.values, table.detach()[there])
    torch.testing.assert_close(
        averages[0].weights["rows.values"][found.rows_of(there)], averages[1].weights["0"][there]
    )


def holding(name: str) -> tuple[KeyStore, torch.optim.Optimizer, EMA]:
    found = store()
    found.add(range(10), keys_of(list(range(10))))
    optimizer = OPTIMIZERS[name]([found.values])
    ema = EMA(Holder(found), 0.5)
    found.attach(optimizer, ema)
    for _ in range(2):
        optimizer.zero_grad()
        rows = found.rows_of(list(found))
        found.read(rows, sparse=name == "SparseAdam").pow(2).sum().backward()
        optimizer.step()
        ema.update()
    return found, optimizer, ema


@each_optimizer
def test_everything_of_a_forgotten_row_is_overwritten(name: str) -> None:
    found, optimizer, ema = holding(name)
    gone = found.rows_of([2, 9])
    kept = [state for state in optimizer.state[found.values].values() if isinstance(state, Tensor) and state.ndim]
    kept += [ema.weights["rows.values"], found.keys, found.values.detach()]
    marks = [tensor[gone].clone() for tensor in kept]
    found.nearest(torch.zeros(1, 3), 1)  # makes the codes of keys
    receipt = found.forget([2, 9])
    for tensor, mark in zip(kept, marks, strict=True):
        assert mark.abs().sum() > 0 or tensor.ndim < 2
        for row in mark.tolist():
            assert row not in tensor.tolist()
    grad = found.values.grad
    assert grad is not None
    if grad.is_sparse:
        assert sorted(grad.coalesce().indices()[0].tolist()) == list(range(8))
        grad = grad.to_dense()
    torch.testing.assert_close(grad[:8].sum(), (found.read(torch.arange(8)) * 2).sum(), rtol=1, atol=1)
    screen = 2 * (3 + 1) + 2 * 4 + 3 + 2 * 4
    width = 3 * 8 + 1 + 4 * (3 + 2) + screen + 32  # and the hash of the row
    states = sum(tensor[0].numel() * 4 for tensor in kept[:-3]) + 8
    assert receipt.bytes == 2 * (width + states + (0 if found.values.grad.is_sparse else 8))


def test_a_gradient_follows_its_rows() -> None:
    for sparse in (False, True):
        found = store()
        found.add(range(6), keys_of(list(range(6))))
        found.attach(torch.optim.SGD([found.values], lr=1.0))
        weights = torch.arange(1.0, 7.0)[:, None]
        (found.read(found.rows_of(range(6)), sparse=sparse) * weights).sum().backward()
        found.forget([0, 2])
        found.add(range(6, 40), keys_of(list(range(6, 40))))
        found.compact()
        grad = found.values.grad
        assert grad is not None and grad.shape == found.values.shape
        dense = grad.to_dense() if sparse else grad
        expected = [0.0] * 38
        for instance in (1, 3, 4, 5):
            expected[int(found.rows_of([instance]))] = instance + 1.0
        assert dense[:, 0].tolist() == expected


def test_nothing_changes_while_the_values_are_those_of_an_average() -> None:
    found, _, ema = holding("Adam")
    before = found.digest()
    with ema.average():
        for act in (lambda: found.forget([1]), lambda: found.add([77], keys_of([77])), found.compact):
            with pytest.raises(
                ValueError, match=r"the values are those of an EMA at present; leave `with ema\.average"
            ):
                act()
        assert found.digest() != before
    assert found.digest() == before
    found.forget([1])


def test_an_average_of_a_new_row_begins_as_its_value() -> None:
    found, _, ema = holding("Adam")
    for ids in ([50], list(range(60, 90))):
        found.add(ids, keys_of(ids), values=torch.full((len(ids), 1, 2), 3.0))
        assert (ema.weights["rows.values"][found.rows_of(ids)] == 3).all()


def test_a_sparse_gradient_is_overwritten_wherever_it_is() -> None:
    found = store()
    found.add([1, 2, 3], keys_of([1, 2, 3]))
    found.attach(torch.optim.SGD([found.values], lr=0.1))
    for _ in range(2):
        found.read(found.rows_of([1, 2, 1]), sparse=True).sum().backward()
    grad = found.values.grad
    assert grad is not None and not grad.is_coalesced() and grad._values().any()
    found.forget([1])
    assert not grad._values().any()


def test_a_state_is_loaded_whatever_gradient_there_is() -> None:
    found = store()
    found.add(range(5), keys_of(list(range(5))))
    found.attach(torch.optim.SGD([found.values], lr=0.1))
    found.read(found.rows_of(range(5)), sparse=True).sum().backward()
    found.load_state_dict(found.state_dict())
    assert len(found) == 5 and found.values.grad is None


@each_optimizer
def test_a_digest_follows_every_optimizer(name: str) -> None:
    found, optimizer, _ = holding(name)
    before = found.digest()
    optimizer.zero_grad()
    found.read(found.rows_of([1]), sparse=name == "SparseAdam").pow(2).sum().backward()
    optimizer.step()
    fresh = store()
    rows = found.get(list(found))
    fresh.add(rows.ids, rows.keys, values=rows.values)
    assert before != found.digest() == fresh.digest()


def test_a_digest_of_a_copy_is_its_own() -> None:
    found = store()
    found.add([1], keys_of([1]))
    other = copy.deepcopy(found)
    with torch.no_grad():
        other.values[0, 0] += 1
    assert other.digest() != found.digest()


def test_a_copy_is_followed_by_nobody() -> None:
    found, optimizer, _ = holding("Adam")
    other = copy.deepcopy(found)
    assert not other.optimizers and found.optimizers == [optimizer]
    other.forget([1])
    assert 1 in found and len(optimizer.state[found.values]["exp_avg"]) == len(found.values)

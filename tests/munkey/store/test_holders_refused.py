"""Who may follow the values of a store: what keeps no row, or has not followed so far, is refused."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from stores import Holder, keys_of, store
from torch import Tensor, nn

from treediff import EMA


class Mixing(torch.optim.SGD):
    """Keeps something that is no row."""

    def __init__(self, params: list[nn.Parameter], state: object) -> None:
        super().__init__(params, lr=0.1)
        self.state[params[0]]["memory"] = state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            torch.zeros(2),
            "Mixing keeps 'memory' of shape (2,) for values of shape (16, 2), in which no instance can be found",
        ),
        ([torch.zeros(2)], "Mixing keeps 'memory', a list, in which no instance can be found and erased; train values"),
    ],
)
def test_an_optimizer_that_mixes_rows_is_refused_and_nothing_is_lost(state: object, message: str) -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    found.attach(Mixing([found.values], state))
    before = found.digest()
    for act in (lambda: found.forget([1]), found.compact):
        with pytest.raises(ValueError, match=re.escape(message)):
            act()
    assert found.digest() == before and list(found) == [1, 2]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(16, 16), "keeps 'memory' of shape (16, 16) for values of shape (16, 2)"),
        (
            torch.zeros(16, 2).to_sparse(),
            "keeps 'memory', a sparse tensor, in which no instance can be found",
        ),
    ],
)
def test_other_state_of_which_no_row_can_be_erased(state: Tensor, message: str) -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    if state.is_sparse:
        state = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (16, 2), check_invariants=True)
    found.attach(Mixing([found.values], state))
    with pytest.raises(ValueError, match=re.escape(message)):
        found.forget([1])
    assert 1 in found


def test_an_optimizer_that_keeps_its_history_under_another_weight_is_refused() -> None:
    found, other = store(), nn.Parameter(torch.ones(3))
    found.add([1, 2], keys_of([1, 2]))
    optimizer = torch.optim.LBFGS([other, found.values], max_iter=3)
    found.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = found.read(torch.arange(2)).pow(2).sum() + other.pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LBFGS keeps .*, a list, in which no instance can be found and erased"):
        found.forget([1])
    found.detach(optimizer)
    assert found.forget([1]).rows == 1


def test_who_did_not_follow_so_far_is_not_attached() -> None:
    found = store()
    found.add(range(4), keys_of(list(range(4))))
    optimizer, ema = torch.optim.Adam([found.values]), EMA(Holder(found))
    found.values.pow(2).sum().backward()
    optimizer.step()
    found.forget([0])
    with pytest.raises(ValueError, match="rows have moved since this optimiser's first step, and it did not follow"):
        found.attach(optimizer)
    found.add(range(10, 40), keys_of(list(range(10, 40))))
    with pytest.raises(ValueError, match="the EMA has an average of 16 of 33 rows: the store joined the model"):
        found.attach(ema)
    late = Holder(store())
    other = EMA(nn.ParameterList([nn.Parameter(torch.zeros(1))]))
    other.model.add_module("rows", late.rows)
    with pytest.raises(ValueError, match="the EMA has an average of none of 0 rows"):
        late.rows.attach(other)


def test_state_that_holds_nothing_of_a_row_is_fine() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    for state in (torch.tensor(3.0), None, 4, 0.5, True, torch.zeros(16, 1)):
        found.attach(Mixing([found.values], state))
    assert found.forget([1]).rows == 1


def test_only_what_follows_the_values_is_attached() -> None:
    found, other = store(), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"the optimiser does not train this store's values; pass store\.values to it"):
        found.attach(torch.optim.SGD([other], lr=0.1))
    with pytest.raises(ValueError, match="the EMA does not follow this store's values; make it of a model that holds"):
        found.attach(EMA(nn.ParameterList([other])))
    with pytest.raises(TypeError, match="expected an optimiser of PyTorch or an EMA, found Parameter"):
        found.attach(found.values)  # type: ignore[arg-type]


def test_training_that_the_store_does_not_know_of_warns() -> None:
    found = store()
    found.add([1, 2], keys_of([1, 2]))
    loss = found.read(found.rows_of([1])).sum()
    with pytest.warns(UserWarning, match=r"an optimiser that is not attached; .* store\.attach\(optimizer\)"):
        loss.backward()
    found.attach(torch.optim.SGD([found.values], lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.read(found.rows_of([1])).sum().backward()
        with torch.no_grad():
            store().read(torch.zeros(0, dtype=torch.int64))

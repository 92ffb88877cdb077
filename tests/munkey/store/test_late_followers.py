"""What keeps something of the rows and comes late, leaves and returns, or goes back to an older state."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from stores import WIDTHS, Holder, keys_of, store
from torch import nn

from munkey import KeyStore
from treediff import EMA


def trained(steps: int = 2) -> tuple[KeyStore, torch.optim.Optimizer, EMA]:
    found = store()
    found.add(range(20), keys_of(list(range(20))))
    optimizer, ema = torch.optim.Adam([found.values], lr=0.1), EMA(Holder(found), 0.5)
    found.attach(optimizer)
    for _ in range(steps):
        step(found, optimizer)
        ema.update()
    found.detach(optimizer)
    return found, optimizer, ema


def step(found: KeyStore, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    found.read(torch.arange(found.used)).square().sum().backward()
    optimizer.step()


# The last row goes without another one moving; compacting moves rows, and none goes.
REWRITES: dict[str, Callable[[KeyStore], object]] = {
    "forget": lambda found: found.forget([3]),
    "forget the last": lambda found: found.forget([19]),
    "replace": lambda found: found.replace([3], keys_of([3], salt=1)),
    "compact": lambda found: found.compact(),
}
each_rewrite = pytest.mark.parametrize("name", REWRITES)


@each_rewrite
def test_an_average_that_did_not_follow_is_refused(name: str) -> None:
    found, _, ema = trained()
    REWRITES[name](found)
    if found.values.shape != ema.weights["rows.values"].shape:
        pytest.skip("the shape tells already")
    with pytest.raises(ValueError, match=r"this EMA may not have followed: .* Make the EMA again and attach it before"):
        found.attach(ema)
    found.attach(EMA(Holder(found)))


@each_rewrite
def test_an_optimizer_that_did_not_follow_is_refused(name: str) -> None:
    found, optimizer, _ = trained()
    REWRITES[name](found)
    with pytest.raises(ValueError, match="rows have moved since this optimiser's first step, and it did not follow"):
        found.attach(optimizer)
    found.attach(torch.optim.Adam([found.values]))


def test_who_follows_from_the_start_may_leave_and_return_while_nothing_goes() -> None:
    found, optimizer, ema = trained()
    found.attach(optimizer, ema)
    found.detach(optimizer, ema)
    found.attach(optimizer, ema)
    found.forget([3])
    with pytest.raises(ValueError, match="did not follow"):
        found.detach(optimizer)
        found.attach(optimizer)


@each_rewrite
def test_an_older_state_of_an_optimizer_is_refused(name: str) -> None:
    found, optimizer, _ = trained()
    found.attach(optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    REWRITES[name](found)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"an older state of the optimiser would bring back .* load it before forget"):
        optimizer.load_state_dict(older)
    assert str(optimizer.state_dict()) == str(before)
    found.detach(optimizer)
    optimizer.load_state_dict(older)  # the store has nothing to do with it any more


@each_rewrite
def test_an_older_state_of_an_average_is_refused(name: str) -> None:
    found, _, ema = trained()
    found.attach(ema)
    older = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    REWRITES[name](found)
    if found.values.shape != older["weights.rows.values"].shape:
        pytest.skip("the shape tells already")
    with pytest.raises(ValueError, match=r"older averages would bring back .* load them before forget and compact"):
        ema.load_state_dict(older)


def test_states_are_loaded_right_after_a_store_was() -> None:
    found, optimizer, ema = trained()
    found.attach(optimizer, ema)
    found.forget([3])
    found.compact()
    other = store()
    other.load_state_dict(found.state_dict())
    again, average = torch.optim.Adam([other.values]), EMA(Holder(other))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would share their moments
    average.load_state_dict(ema.state_dict())
    other.attach(again, average)
    for each, own in ((found, optimizer), (other, again)):
        step(each, own)
    assert found.digest() == other.digest()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", [*REWRITES, "add beyond the room"])
def test_a_loss_of_before_has_no_gradient_afterwards(name: str, sparse: bool) -> None:
    found, optimizer, _ = trained()
    found.attach(optimizer)
    rows = found.rows_of([3, 19])
    loss = (found.read(rows, sparse=sparse) * 1000).sum()
    grad = None if found.values.grad is None else found.values.grad.clone()
    if name in REWRITES:
        REWRITES[name](found)
        grad = None if found.values.grad is None else found.values.grad.clone()
    else:
        found.add(range(100, 160), keys_of(list(range(100, 160))))
        grad = None if found.values.grad is None else found.values.grad.clone()
    with pytest.raises(RuntimeError, match=r"rows were deleted, moved or got more room since this loss was computed"):
        loss.backward()
    assert grad is None or (found.values.grad is not None and torch.equal(found.values.grad, grad))


def test_a_loss_of_before_an_addition_within_the_room_is_fine() -> None:
    found, optimizer, _ = trained()
    found.attach(optimizer)
    found.add([100], keys_of([100]))  # makes room for more
    loss = found.read(torch.arange(3)).sum()
    found.add([101], keys_of([101]))
    loss.backward()


def test_the_same_moments_under_two_names_are_erased_once() -> None:
    class Wrapper:
        """As schedulers and gradient scalers do: the state of the optimiser, and a way of its own."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.state, self.param_groups = optimizer, optimizer.state, optimizer.param_groups

    found, optimizer, _ = trained()
    with pytest.raises(TypeError, match="expected an optimiser of PyTorch or an EMA, found Wrapper"):
        found.attach(Wrapper(optimizer))  # type: ignore[arg-type]
    found.attach(optimizer)
    found.attach(optimizer)
    other = torch.optim.Adam([found.values])
    other.state = optimizer.state  # one state, two optimisers
    found.attach(other)
    assert len(found.optimizers) == 1
    moments = optimizer.state[found.values]["exp_avg"][found.rows_of([4])].clone()
    found.forget([3])
    assert torch.equal(optimizer.state[found.values]["exp_avg"][found.rows_of([4])], moments)


def test_who_was_refused_is_not_attached() -> None:
    found, optimizer, _ = trained()
    other = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="does not train this store's values"):
        found.attach(other, optimizer)
    assert found.optimizers == []
    found.attach(optimizer)
    assert found.optimizers == [optimizer]


def test_the_average_of_pytorch_is_refused_with_the_one_that_follows() -> None:
    found = trained()[0]
    average = torch.optim.swa_utils.AveragedModel(Holder(found))
    with pytest.raises(TypeError, match=re.escape("found AveragedModel; use treediff.EMA, which can follow")):
        found.attach(average)  # type: ignore[arg-type]


# --- inference mode -------------------------------------------------------------------------------------------


def test_what_comes_in_inference_mode_is_forgotten_outside_of_it() -> None:
    with torch.inference_mode():
        found = KeyStore(*WIDTHS)
        found.add(range(20), keys_of(list(range(20)), 2))
        found.nearest(keys_of([1])[0], 2)
        found.nearest_to_rows(
            torch.arange(4), 2, lambda s, q, k, *, exclude_ids=None: s.nearest(q, k, exclude_ids=exclude_ids)
        )
        found.digest()
        found.forget([1])
        found.compact()
        copied = copy.deepcopy(found)
    optimizer = torch.optim.SGD([found.values], lr=0.1)
    for each in (found, copied):
        each.forget([3])
        each.add(range(50, 90), keys_of(list(range(50, 90))))
        each.forget([60, 4])
        each.compact()
        assert not any(column.is_inference() for column in (*each.columns, each.values))
    found.attach(optimizer)
    found.read(torch.arange(3)).sum().backward()
    optimizer.step()
    with torch.inference_mode():
        found.forget([5])
        found.load_state_dict(copied.state_dict()) if not found.followed else None
    found.detach(optimizer)
    with torch.inference_mode():
        found.load_state_dict(copied.state_dict())
        found.double()
    found.forget([7])
    found.attach(optimizer)
    found.read(torch.arange(3)).sum().backward()

"""An error between any two lines of a change: the store is before the change, after it, or refuses everything.

`benchmarks/reliability.py` interrupts before every line; here it is every so many lines, others for each change.
"""

from __future__ import annotations

import pytest
import torch
from reliability import CHANGES, interrupted
from stores import SECRET, WIDTHS, Holder, keys_of

from munkey import Classification, KeyStore
from munkey.readout import UnitFeatures
from munkey.readout.linear import LabelledFeatures
from munkey.store import Follower
from munkey.store.change import Change, Step
from munkey.store.erase import Scratch
from munkey.store.follower import Undone
from treediff import EMA


@pytest.fixture(autouse=True)
def several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("munkey.store.sums._HEIGHT", 6)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(("kind", "every"), [("memory", 29), ("file", 223), ("file and log", 229)])
def test_an_interruption_between_two_lines_leaves_before_or_after(kind: str, name: str, every: int) -> None:
    found = interrupted(kind, name, every)
    assert found.total() >= 6
    assert set(found) <= {"before", "after", "refuses"}


# --- followers that fail --------------------------------------------------------------------------------------


class Failing(Follower):
    """A follower that raises an error in one of its methods, or in its step so many times."""

    def __init__(self, where: str, times: int = 1) -> None:
        self.where, self.times = where, times
        self.seen: list[str] = []

    def _at(self, place: str) -> None:
        self.seen.append(place)
        if place == self.where and self.times:
            self.times -= 1
            raise MemoryError(place)

    def check(self, change: Change) -> None:
        self._at("check")

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        self._at("steps")
        return [lambda: self._at("step")]

    def write_ahead(self, change: Change) -> None:
        self._at("write_ahead")

    def undo(self, change: Change) -> Undone:
        self.seen.append("undo")
        return Undone.BACK

    def confirm(self, change: Change) -> None:
        self._at("confirm")


SUMMAND = LabelledFeatures(UnitFeatures(WIDTHS[0]), Classification(20))


def filled() -> tuple[KeyStore, torch.optim.Optimizer, EMA]:
    store = KeyStore(*WIDTHS, secret=SECRET)
    store.add(range(20), keys_of(list(range(20))), torch.arange(20))
    optimizer, ema = torch.optim.Adam([store.values], lr=0.1), EMA(Holder(store))
    store.attach(optimizer, ema)
    for _ in range(2):
        optimizer.zero_grad()
        store.read(torch.arange(20)).square().sum().backward()
        optimizer.step()
        ema.update()
    store.nearest(keys_of([1])[0], 2)
    store.sums(SUMMAND).get()
    store.digest()
    return store, optimizer, ema


def everything(store: KeyStore, optimizer: torch.optim.Optimizer, ema: EMA) -> list[object]:
    """All that is known of each id, and what is in the tails."""
    rows = {one: int(store.rows_of([one])) for one in store}
    grad = store.values.grad
    assert grad is not None
    kept = [store.keys, store.values.detach(), grad, ema.weights["rows.values"]]
    kept += [
        state for state in optimizer.state[store.values].values() if isinstance(state, torch.Tensor) and state.ndim
    ]
    near = store.nearest(keys_of([1])[0], 30).ids.tolist()
    return [
        [(one, *(tensor[row].tolist() for tensor in kept)) for one, row in rows.items()],
        [bool(tensor[store.used :].any()) for tensor in kept],
        near,
        store.sums(SUMMAND).get().tolist(),
        store.digest(),
    ]


CALLS = {
    "forget": lambda store: store.forget([3, 0, 19]),
    "add": lambda store: store.add([50], keys_of([50]), torch.tensor([7])),
    "add beyond the room": lambda store: store.add(range(50, 90), keys_of(list(range(50, 90)))),
    "compact": lambda store: store.compact(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", ["check", "steps", "write_ahead"])
def test_whoever_fails_before_memory_changes_leaves_everything_as_it_was(name: str, where: str) -> None:
    parts = filled()
    before, follower = everything(*parts), Failing(where)
    parts[0].follow(follower)
    with pytest.raises(MemoryError, match=where):
        CALLS[name](parts[0])
    assert everything(*parts) == before
    assert not any(column[parts[0].used :].any() for column in parts[0].columns), "new rows were written already"
    assert "step" not in follower.seen and ("undo" in follower.seen) == (where == "write_ahead")
    CALLS[name](parts[0])


@pytest.mark.parametrize("name", CALLS)
def test_a_step_that_is_interrupted_once_is_run_again(name: str) -> None:
    parts, others = filled(), filled()
    parts[0].follow(Failing("step"))
    with pytest.raises(MemoryError, match="step"):
        CALLS[name](parts[0])
    CALLS[name](others[0])
    if name.startswith("add"):  # the room had been made when the interruption came
        CALLS[name](parts[0])
    assert everything(*parts) == everything(*others)


@pytest.mark.parametrize("name", CALLS)
def test_a_step_that_fails_twice_leaves_a_store_that_refuses_everything_but_being_loaded(name: str) -> None:
    store, optimizer, ema = filled()
    state = store.state_dict()
    store.follow(Failing("step", 2))
    with pytest.raises(MemoryError, match="step"):
        CALLS[name](store)
    for act in (
        lambda: store.forget([1]),
        lambda: store.add([77], keys_of([77])),
        lambda: store.nearest(keys_of([1])[0], 1),
        lambda: store.get([1]),
        lambda: store.read(torch.arange(2)),
        lambda: list(store),
        store.digest,
        store.state_dict,
        store.compact,
        store.double,
    ):
        with pytest.raises(RuntimeError, match=r"interrupted in the midst of a change .* load it again"):
            act()
    store.detach(optimizer, ema)
    store.load_state_dict(state)
    assert list(store) == list(range(20))
    store.forget([1])


def test_an_addition_that_is_not_confirmed_is_taken_back() -> None:
    parts = filled()
    before, follower = everything(*parts), Failing("confirm")
    parts[0].follow(follower)
    with pytest.raises(MemoryError, match="confirm"):
        parts[0].add([50], keys_of([50]))
    assert everything(*parts) == before


def test_a_change_goes_to_every_follower_in_order() -> None:
    store, first, second = filled()[0], Failing("never"), Failing("never")
    store.follow(first)
    store.follow(first)
    store.follow(second)
    store.forget([4])
    assert first.seen == second.seen == ["check", "check", "steps", "write_ahead", "step"]
    store.unfollow(first)
    store.forget([5])
    assert len(first.seen) == 5 and len(second.seen) == 10


def test_a_change_within_a_change_is_refused() -> None:
    parts = filled()

    class Handler(Failing):
        def write_ahead(self, change: Change) -> None:
            parts[0].forget([7])

    before, handler = everything(*parts), Handler("never")
    parts[0].follow(handler)
    with pytest.raises(RuntimeError, match="a change of this store is under way; let it finish"):
        parts[0].forget([3])
    parts[0].unfollow(handler)
    assert everything(*parts) == before

"""Classifiers of the examples that forget by deletion: what they forgot plays no part in what they say or learn."""

from __future__ import annotations

import pytest
import torch
from rivals import Features, NearestNeighbours, Plain, RACDelete, Rival, SemiParametric, fit
from sisa import SISA
from torch import Tensor, nn
from torch.nn import functional as F

from munkey import Projection

SHAPE, CLASSES = (1, 4, 4), 3
IMAGES = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % CLASSES


def plain(seed: int = 0) -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Plain(Features(SHAPE, patch=2, width=8, depth=1, heads=2), CLASSES)


def built(name: str) -> Rival:
    encoder = Projection.random(SHAPE, 5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return {
            "nearest": lambda: NearestNeighbours(encoder, CLASSES, neighbours=5),
            "rac": lambda: RACDelete(plain(), encoder, CLASSES),
            "semi": lambda: SemiParametric(Features(SHAPE, patch=2, width=8, depth=1, heads=2), CLASSES),
        }[name]()


@pytest.mark.parametrize("name", ["nearest", "rac", "semi"])
def test_what_was_deleted_says_nothing(name: str) -> None:
    gone, stay, fresh = (
        torch.tensor([3, 17, 5]),
        torch.tensor([n for n in range(40) if n not in (3, 17, 5)]),
        IMAGES[:9],
    )
    model, other = built(name).eval(), built(name).eval()
    model.remember(torch.arange(40), IMAGES, LABELS)
    before = model(fresh)
    model.forget(gone)
    other.remember(stay, IMAGES[stay], LABELS[stay])
    assert torch.equal(model(fresh), other(fresh)) and not torch.equal(model(fresh), before)


def test_votes_are_shares_of_neighbours() -> None:
    model = built("nearest")
    model.remember(torch.arange(40), IMAGES, LABELS)
    found = model.memory.neighbours(model.encoder(IMAGES[:2]), 5)  # type: ignore[operator, union-attr]
    shares = (found.scores[0] / 0.1).softmax(0)
    expected = [float(shares[LABELS[found.rows[0]] == c].sum()) for c in range(CLASSES)]
    got = model(IMAGES[:2])[0].exp() - 0.01
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_an_instance_is_trained_beside_others_only() -> None:
    """The loss is that of a slow loop, in which each image asks a memory that never held it."""
    everyone, own = torch.arange(40), torch.arange(0, 40, 5)
    model = built("rac").eval()
    model.remember(everyone, IMAGES, LABELS)
    alone = []
    for row in own:
        others, without = built("rac").eval(), everyone[everyone != row]
        others.remember(without, IMAGES[without], LABELS[without])
        alone.append(others(IMAGES[row][None]))
    expected = F.cross_entropy(torch.cat(alone), LABELS[own])
    assert isinstance(model, RACDelete)
    torch.testing.assert_close(model.loss(IMAGES[own], LABELS[own], ids=own), expected)
    itself_included = F.cross_entropy(model(IMAGES[own]), LABELS[own])
    assert (itself_included - expected).abs() > 1e-2, "the two can be told apart"


def test_a_loop_leaves_a_model_ready_to_be_asked() -> None:
    model = built("rac")
    model.remember(torch.arange(40), IMAGES, LABELS)
    fit(model, IMAGES, LABELS, torch.arange(40), epochs=1, batch_size=8)  # type: ignore[arg-type]
    assert not model.training


class Spy:
    """Trains a linear model, and remembers on what."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def __call__(self, model: nn.Module, ids: Tensor, seed: int) -> None:
        self.seen.append(set(ids.tolist()))
        fit(model, IMAGES, LABELS, ids, epochs=1, batch_size=4, seed=seed)  # type: ignore[arg-type]


def sharded(spy: Spy) -> SISA:
    return SISA(plain, spy, torch.arange(40), shards=3, slices=2)


def weights(model: SISA) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.models.parameters()]


def test_shards_hold_everyone_once() -> None:
    spy = Spy()
    model = sharded(spy)
    parts = [part.tolist() for shard in model.slices for part in shard]
    assert sorted(row for part in parts for row in part) == list(range(40)), "those left over by the division as well"
    assert spy.seen == [set(x) for one, two in zip(parts[::2], parts[1::2], strict=True) for x in (one, one + two)]


def test_nobody_comes_back_with_a_later_request() -> None:
    spies = Spy(), Spy()
    one, other = (sharded(spy) for spy in spies)
    first, second = one.slices[0][0][0], one.slices[0][1][0]  # of one shard, so that the second request trains it again
    before = weights(one)
    for spy in spies:
        spy.seen.clear()
    one.forget(first[None])
    untouched = len(before) // 3
    assert all(torch.equal(a, b) for a, b in zip(before[untouched:], weights(one)[untouched:], strict=True))
    assert not torch.equal(before[0], weights(one)[0])
    one.forget(second[None])
    other.forget(torch.stack([second, first]))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert all(int(first) not in seen for seen in spies[0].seen) and int(second) not in spies[0].seen[-1]


def test_a_request_trains_only_from_the_first_slice_it_touches() -> None:
    model = sharded(spy := Spy())
    spy.seen.clear()
    assert model.forget(model.slices[1][1][:1]) == 1 and len(spy.seen) == 1
    assert model.forget(model.slices[2][0][:1]) == 2 and len(spy.seen) == 3


def test_a_whole_slice_may_go() -> None:
    model = sharded(Spy())
    model.forget(model.slices[0][0].clone())
    model.forget(model.slices[0][1].clone())
    assert model(IMAGES[:2]).isfinite().all()
    torch.testing.assert_close(model(IMAGES[:2]).exp().sum(1), torch.ones(2))


def test_an_unknown_id_changes_nothing() -> None:
    model = sharded(Spy())
    before = weights(model)
    with pytest.raises(KeyError, match="ids \\[99\\] are not there, or were forgotten before"):
        model.forget(torch.tensor([3, 99]))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert sum(len(part) for shard in model.slices for part in shard) == 40

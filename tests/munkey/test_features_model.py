"""A classifier of features that learns nothing: it forgets to the bit, takes new classes, and is kept in a file."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from stores import seeded
from torch import Tensor

from munkey import (
    Classification,
    Identity,
    KeyMemoryTransformer,
    KeyStore,
    KeyValueMemory,
    MultiLabel,
    Projection,
    Regression,
    Task,
    pathway_accuracies,
)
from munkey.readout import NeighbourVote

TASKS: list[Task] = [Classification(3), MultiLabel(3), Regression(2)]
each_task = pytest.mark.parametrize("task", TASKS, ids=str)
WIDTH = 5


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=seeded(seed))


def labels(task: Task, x: Tensor) -> Tensor:
    scores = x[:, : task.outputs] + 0.1 * torch.randn(len(x), task.outputs, generator=seeded(9))
    if isinstance(task, Classification):
        return scores.argmax(1)
    return (scores > 0).long() if isinstance(task, MultiLabel) else scores


def model(task: Task, fitted: int = 30, **settings: object) -> KeyMemoryTransformer:
    """With so many permanent instances, to which the mixture is fitted."""
    built = KeyMemoryTransformer.for_features(features=WIDTH, task=task, neighbours=4, **settings)  # type: ignore[arg-type]
    built.memory.store.secret = b"for tests"
    x = inputs(fitted)
    built.remember(range(fitted), x, labels(task, x), permanent=True)
    built.fit_readout(x, labels(task, x), ids=range(fitted))
    return built


@each_task
def test_a_model_that_forgot_is_one_that_never_had_it(task: Task, tmp_path: Path) -> None:
    x = inputs(50, 1)
    y = labels(task, x)
    forgot, never = model(task), model(task)
    forgot.remember(range(100, 150), x, y)
    forgot(inputs(6, 2))
    forgot.remember([200, 201], inputs(2, 3), y[:2])
    forgot.forget([200, 100, 149, *range(103, 120)])
    forgot(inputs(6, 2))
    forgot.forget([201])
    kept = [i for i in range(1, 49) if not 3 <= i < 20]
    never.remember([100 + i for i in reversed(kept)], x[kept[::-1]], y[kept[::-1]])
    assert torch.equal(forgot(inputs(6, 2)), never(inputs(6, 2)))
    assert forgot.memory.store.digest() == never.memory.store.digest()
    for name, built in (("forgot", forgot), ("never", never)):
        built.save(tmp_path / name)
    assert (tmp_path / "forgot").read_bytes() == (tmp_path / "never").read_bytes()


@each_task
def test_a_file_holds_all_of_it(task: Task, tmp_path: Path) -> None:
    built = model(task, temperature=0.2, shrinkage=0.5, balance=0.5)
    built.save(tmp_path / "model")
    again = KeyMemoryTransformer.load(tmp_path / "model")
    assert torch.equal(again(inputs(6, 2)), built(inputs(6, 2))) and again.config == built.config
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    built = KeyMemoryTransformer.for_features(features=WIDTH, classes=3, dtype=dtype)
    x = inputs(40).to(dtype)
    built.remember(range(40), x, labels(TASKS[0], x.float()))
    found = built(x)
    assert found.dtype == dtype and float((found.argmax(1) == labels(TASKS[0], x.float())).double().mean()) > 0.8
    built.save(tmp_path / "model")
    assert torch.equal(KeyMemoryTransformer.load(tmp_path / "model")(x), found)


def test_it_is_about_as_good_as_logistic_regression_and_takes_a_new_class_at_once() -> None:
    data = load_digits()
    x, y = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=seeded())
    train, test = order[:1200], order[1200:]
    fixed, old = train[:600], train[y[train] != 9]
    encoder = Projection.whitening(x[fixed], y[fixed], fitted_on="permanent split")
    built = KeyMemoryTransformer.for_features(features=64, classes=10, key_encoder=encoder)
    rest = old[~torch.isin(old, fixed)]
    built.remember(fixed, x[fixed], y[fixed], permanent=True)
    built.fit_readout(x[fixed], y[fixed], ids=fixed)
    built.remember(rest, x[rest], y[rest])
    nine = test[y[test] == 9]
    without = KeyMemoryTransformer.for_features(features=64, classes=10)
    without.remember(old, x[old], y[old])
    assert not bool((without(x[nine]).argmax(1) == 9).any())
    some = train[y[train] == 9][:20]
    without.remember(some, x[some], y[some])
    assert float((without(x[nine]).argmax(1) == 9).double().mean()) > 0.5, "after 20 examples"
    more = train[(y[train] == 9) & ~torch.isin(train, fixed)]
    built.remember(more, x[more], y[more])
    theirs = LogisticRegression(max_iter=500).fit(x[train], y[train]).score(x[test], y[test])
    assert pathway_accuracies(built, x[test], y[test]).full >= theirs - 0.005


def test_weights_of_a_mixture_are_fitted_without_the_rows_themselves() -> None:
    """Labels are noise here, so that a row of one's own would be worth everything, and others are worth nothing."""
    built = KeyMemoryTransformer.for_features(features=WIDTH, classes=3, neighbours=1)
    x, y = inputs(300), torch.randint(3, (300,), generator=seeded(4))
    built.remember(range(300), x, y, permanent=True)
    weights = built.fit_readout(x, y, ids=range(300)).weights
    assert float(weights.max()) < 0.3
    held_out = built.fit_readout(inputs(300, 5), torch.randint(3, (300,), generator=seeded(6))).weights
    assert float(held_out.max()) < 0.3


def test_whitened_classes_are_round() -> None:
    task, x = Classification(3), 3 * inputs(400)
    x = x @ torch.randn(WIDTH, WIDTH, generator=seeded(3))
    y = labels(task, x)
    for shrinkage, spread in ((1e-6, 0.0), (0.5, 0.5)):
        keys = Projection.whitening(x, y, shrinkage=shrinkage, fitted_on="other data")(x).double()
        means = torch.stack([keys[y == c].mean(0) for c in range(3)])
        within = (keys - means[y]).T @ (keys - means[y]) / (400 - 3)
        raw = x.double() - torch.stack([x.double()[y == c].mean(0) for c in range(3)])[y]
        raw = raw.T @ raw / (400 - 3)
        shrunk = (1 - shrinkage) * raw + shrinkage * raw.diagonal().mean() * torch.eye(WIDTH)
        # Whitening makes the shrunk covariance round: the spectra of its ratio to the covariance are equal.
        expected = torch.linalg.eigvals(torch.linalg.solve(shrunk, raw)).real.sort().values
        torch.testing.assert_close(torch.linalg.eigvalsh(within), expected.double(), rtol=1e-3, atol=1e-3)
        assert (float((within - torch.eye(WIDTH)).abs().max()) > 0.1) == bool(spread)


def test_what_is_refused() -> None:
    built = model(TASKS[0])
    x, y = inputs(2, 3), torch.tensor([0, 1])
    built.remember([70, 71], x, y)
    with pytest.raises(ValueError, match="in exact mode pass ids of permanent instances, or held-out instances"):
        built.fit_readout(x, y, ids=[70, 71])
    with pytest.raises(ValueError, match="expected at least two folds and two instances, found 1 folds of 1"):
        built.fit_readout(x[:1], y[:1], ids=[0])
    with pytest.raises(ValueError, match="expected at least two folds and two instances, found 1 folds of 2"):
        built.fit_readout(x, y, ids=[0, 1], folds=1)
    with pytest.raises(ValueError, match="expected one id for each of 2 inputs, found 1"):
        built.fit_readout(x, y, ids=[0])
    for act in (
        lambda: built.loss(x, y, ids=[70, 71]),
        lambda: built(x, use_memory=False),
        lambda: built.parameter_groups(0.1),
    ):
        with pytest.raises(ValueError, match="this model has no transformer: it learns nothing"):
            act()
    with pytest.raises(ValueError, match=re.escape("expected features of shape (batch, 5), found (2, 4)")):
        built(x[:, :4])
    with pytest.raises(ValueError, match="the encoder must not have seen what can be forgotten"):
        KeyMemoryTransformer.for_features(
            features=WIDTH, classes=3, key_encoder=Identity(WIDTH, fitted_on="forgettable")
        )
    memory, vote = KeyValueMemory(KeyStore(WIDTH, 1)), NeighbourVote(Classification(3))
    alone = KeyMemoryTransformer(key_encoder=Identity(WIDTH), memory=memory, readout=vote, mode="paper")
    with pytest.raises(TypeError, match="only a Mixture has weights to fit, found NeighbourVote"):
        alone.fit_readout(x, y)


def test_whitening_refuses_what_it_cannot_be_fitted_to() -> None:
    x, y = inputs(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="shrinkage must be above 0, and 1 at most, found 0"):
        Projection.whitening(x, y, shrinkage=0, fitted_on="other data")
    with pytest.raises(ValueError, match="expected at least two inputs with one label each, found 4 inputs and labels"):
        Projection.whitening(x, y[:3], fitted_on="other data")
    same = Projection.whitening(x[:1].repeat(3, 1), y[:3], fitted_on="other data")
    assert bool(same(x).isfinite().all())


def test_an_answer_in_another_thread_is_of_one_state() -> None:
    built, x = model(TASKS[0]), inputs(40, 3)
    built.remember(range(100, 140), x, labels(TASKS[0], x))
    states, answers, done = [built(x[:3])], [], threading.Event()

    def answer() -> None:
        while not done.is_set():
            answers.append(built(x[:3]))

    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for instance in range(110, 140):
        built.forget([instance])
        states.append(built(x[:3]))
    done.set()
    for thread in threads:
        thread.join()
    assert answers and all(any(torch.equal(found, state) for state in states) for found in answers)


def test_whoever_keeps_an_old_head_or_old_sums_has_what_was_deleted() -> None:
    """As docs/munkey.md warns; the library itself overwrites both."""
    task = Classification(3)
    built = model(task)
    x = inputs(1, 7)
    built.remember([500], x, torch.tensor([1]))
    summand = built.readout.parts[1]._summand  # type: ignore[union-attr,operator]
    sums = built.memory.store.sums(summand)
    query = built.query(inputs(1))
    head = built.readout.parts[1].solved(query)  # type: ignore[union-attr,operator]
    old_sums, old_head = sums.get().clone(), head[0].clone()
    built.forget([500])
    assert not head[0].any(), "the old head is overwritten"
    gone = (old_sums - sums.get())[3:-1, -1]
    assert torch.equal(gone, summand.features(built.memory.scaled(x, "keys"))[0])
    change = old_head - built.readout.parts[1].solved(query)[0]  # type: ignore[union-attr,operator]
    direction = sums.get()[3:-1, 3:-1] @ change[:, 1]
    assert abs(float(torch.cosine_similarity(direction, gone, dim=0))) > 0.5

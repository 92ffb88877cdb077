"""Votes, linear heads and mixtures beside slow loops, closed forms and scikit-learn."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from stores import seeded
from torch import Tensor
from torch.nn import functional as F

from munkey import Classification, KeyStore, KeyValueMemory, MultiLabel, Projection, Regression, Task
from munkey.readout import DiscriminantReadout, Mixture, NeighbourVote, Query, Readout, RidgeReadout, UnitFeatures
from munkey.readout.linear import LabelledFeatures
from munkey.readout.mixture import fitted_weights

WIDTH = 6
TASKS: list[Task] = [Classification(4), MultiLabel(3), Regression(2)]
each_task = pytest.mark.parametrize("task", TASKS, ids=str)


def keys_of(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=seeded(seed), dtype=torch.float64))


def labels_of(task: Task, keys: Tensor, seed: int = 1) -> Tensor:
    """Labels that depend on the key, with noise."""
    noisy = keys[:, : task.outputs] + 0.2 * torch.randn(len(keys), task.outputs, generator=seeded(seed))
    if isinstance(task, Classification):
        return noisy.argmax(1)
    return (noisy > 0).long() if isinstance(task, MultiLabel) else noisy.float()


def memory_of(task: Task, keys: Tensor, labels: Tensor | None, metric: str = "cosine") -> KeyValueMemory:
    store = KeyStore(WIDTH, 1, label_shape=task.label_shape, label_dtype=task.label_dtype, dtype=torch.float64)
    memory = KeyValueMemory(store, metric=metric)
    memory.remember(range(len(keys)), keys, labels)
    return memory


def heads_of(task: Task) -> list[Readout]:
    heads: list[Readout] = [RidgeReadout(task, UnitFeatures(WIDTH))]
    return [*heads, DiscriminantReadout(task, UnitFeatures(WIDTH))] if isinstance(task, Classification) else heads


def query_of(memory: KeyValueMemory, keys: Tensor, k: int = 1, **settings: object) -> Query:
    return Query(memory, keys, keys, k, **settings)  # type: ignore[arg-type]


# --- votes ------------------------------------------------------------------------------------------------------


def weight_of(weights: str, score: float, best: float, rank: int) -> float:
    return {
        "softmax": math.exp((score - best) / 0.05),
        "rank": 1 / (rank + 2),
        "distance": 1 / math.sqrt(max(2 - 2 * score, 1e-6)),
        "equal": 1.0,
    }[weights]


@each_task
@pytest.mark.parametrize(
    ("weights", "balance"), [("softmax", 0.0), ("rank", 0.0), ("distance", 0.0), ("equal", 0.0), ("softmax", 0.7)]
)
def test_votes_are_those_of_a_loop_over_neighbours(task: Task, weights: str, balance: float) -> None:
    balance *= isinstance(task, Classification)
    keys, queries, k = keys_of(40), keys_of(5, 2), 7
    labels = labels_of(task, keys)
    memory = memory_of(task, keys, labels)
    found = NeighbourVote(task, k, weights=weights, balance=balance)(query_of(memory, queries, k))
    for query, outputs in zip(queries, found, strict=True):
        scores = keys @ query
        order = scores.argsort(descending=True)[:k].tolist()
        total, mean = 0.0, torch.zeros(task.outputs, dtype=torch.float64)
        for rank, row in enumerate(order):
            share = weight_of(weights, float(scores[row]), float(scores[order[0]]), rank)
            share /= int((labels == labels[row]).sum()) ** balance if balance else 1
            total += share
            one = F.one_hot(labels[row], 4) if isinstance(task, Classification) else labels[row]
            mean += share * one.double()
        mean /= total
        if isinstance(task, Classification):
            mean = (0.98 * mean + 0.02 / 4).log()
        elif isinstance(task, MultiLabel):
            mean = (0.98 * mean + 0.01).logit()
        torch.testing.assert_close(outputs, mean)


def test_balanced_votes_leave_out_rows_and_forget_to_the_bit() -> None:
    task, keys, queries = TASKS[0], keys_of(60), keys_of(9, 2)
    labels, out = labels_of(task, keys), [2, 3, 17, 40]
    kept = [row for row in range(60) if row not in out]
    vote, fewer = NeighbourVote(task, 5, balance=1.0), memory_of(task, keys[kept], labels[kept])
    expected, whole = vote(query_of(fewer, queries, 5)), memory_of(task, keys, labels)
    before = vote(query_of(whole, queries, 5))
    whole.forget(out)
    assert torch.equal(vote(query_of(whole, queries, 5)), expected) and not torch.equal(before, expected)
    again = memory_of(task, keys, labels)
    near = [Query(again, q[None], q[None], 5, exclude_ids=[2], without=torch.tensor([2])) for q in keys[2:3]]
    alone = memory_of(task, keys[[*range(2), *range(3, 60)]], labels[[*range(2), *range(3, 60)]])
    assert torch.equal(vote(near[0]), vote(query_of(alone, keys[2:3], 5)))


def test_equal_votes_are_those_of_scikit_learn() -> None:
    task, keys, queries = TASKS[0], keys_of(200), keys_of(50, 2)
    labels = labels_of(task, keys)
    vote = NeighbourVote(task, 9, weights="equal", smoothing=1e-12)
    found = vote(query_of(memory_of(task, keys, labels), queries, 9)).exp()
    theirs = KNeighborsClassifier(9).fit(keys.numpy(), labels.numpy()).predict_proba(queries.numpy())
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-9)


@each_task
def test_rows_without_a_label_have_no_vote(task: Task) -> None:
    keys = keys_of(20)
    labels = labels_of(task, keys)
    memory = memory_of(task, keys, labels)
    memory.remember(range(100, 110), keys[:10] + 1e-3)
    vote = NeighbourVote(task, 30)
    fewer = vote(query_of(memory_of(task, keys, labels), keys_of(5, 2), 30))
    torch.testing.assert_close(vote(query_of(memory, keys_of(5, 2), 30)), fewer)
    nothing = vote(query_of(memory_of(task, keys[:0], None), keys_of(2, 2), 30))
    same = {"Classification": -math.log(4)}.get(type(task).__name__, 0.0)
    torch.testing.assert_close(nothing, torch.full_like(nothing, same))


# --- linear heads -----------------------------------------------------------------------------------------------


@each_task
def test_ridge_is_that_of_scikit_learn(task: Task) -> None:
    keys, queries = keys_of(60), keys_of(9, 2)
    labels = labels_of(task, keys)
    ridge = RidgeReadout(task, UnitFeatures(WIDTH), shrinkage=0.2, scale=3.0)
    found = ridge(query_of(memory_of(task, keys, labels), queries))
    spread = float(keys.var(0, correction=0).mean())
    targets = F.one_hot(labels, 4) if isinstance(task, Classification) else labels
    theirs = Ridge(alpha=60 * 0.2 * spread / 0.8).fit(keys.numpy(), targets.double().numpy() / 0.8)
    scores = torch.from_numpy(theirs.predict(queries.numpy()) - theirs.intercept_)
    scores += torch.from_numpy(targets.double().numpy().mean(0) - keys.numpy().mean(0) @ theirs.coef_.T)
    expected = {
        "Classification": lambda: (3.0 * scores).log_softmax(1),
        "MultiLabel": lambda: 3.0 * (scores - 0.5),
        "Regression": lambda: scores,
    }[type(task).__name__]()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shrinkage", [1e-9, 0.25])
def test_a_discriminant_is_that_of_scikit_learn(shrinkage: float) -> None:
    task, keys, queries = TASKS[0], keys_of(300), keys_of(50, 2)
    labels = labels_of(task, keys)
    head = DiscriminantReadout(task, UnitFeatures(WIDTH), shrinkage=shrinkage, temperature=1.0)
    found = head(query_of(memory_of(task, keys, labels), queries))
    theirs = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage).fit(keys.numpy(), labels.numpy())
    np.testing.assert_allclose(found.numpy(), theirs.predict_log_proba(queries.numpy()), atol=5e-3)


@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_a_shrunk_discriminant_is_that_of_its_formula(balance: float) -> None:
    task, keys, queries = Classification(5), keys_of(80), keys_of(7, 2)
    labels = labels_of(TASKS[0], keys)  # nobody has the last class
    settings = {"shrinkage": 0.4, "temperature": 0.5, "balance": balance}
    head = DiscriminantReadout(task, UnitFeatures(WIDTH), **settings)  # type: ignore[arg-type]
    found = head(query_of(memory_of(task, keys, labels), queries))
    means = torch.stack([keys[labels == c].mean(0) for c in range(4)])
    centred = keys - means[labels]
    within = centred.T @ centred / 80
    inverse = torch.linalg.inv(0.6 * within + 0.4 * within.diagonal().mean() * torch.eye(WIDTH))
    prior = (1 - balance) * (labels.bincount() / 80).log()
    scores = torch.stack([(queries - mean) @ inverse @ (queries - mean).T for mean in means], 2)
    expected = (0.5 * (-0.5 * scores.diagonal().T + prior)).log_softmax(1)
    if balance == 0:
        assert bool((found[:, 4] < found[:, :4].amin(1)).all())
    torch.testing.assert_close(found[:, :4].log_softmax(1), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@each_task
def test_a_head_of_equal_rows_is_finite(task: Task, rows: int) -> None:
    """Features have no variance, but for rounding: one row, one row of each class, or the same row many times."""
    for x in (keys_of(1).repeat(rows, 1), keys_of(rows)):
        memory = memory_of(task, x, labels_of(task, x))
        for head in heads_of(task):
            assert head(query_of(memory, keys_of(5, 2))).isfinite().all()
    Projection.whitening(1e-9 * keys_of(1).repeat(2, 1), torch.tensor([0, 1]), fitted_on="other data")


@each_task
def test_a_head_without_rows_knows_nothing(task: Task) -> None:
    for head in heads_of(task):
        found = head(query_of(memory_of(task, keys_of(0), None), keys_of(3, 2)))
        assert bool(found.isfinite().all()) and torch.equal(found[0], found[1])


@each_task
def test_heads_leave_out_rows_to_the_bit(task: Task) -> None:
    keys = keys_of(30)
    labels = labels_of(task, keys)
    ridge, out = RidgeReadout(task, UnitFeatures(WIDTH)), torch.tensor([2, 3, 17])
    kept = [row for row in range(30) if row not in (2, 3, 17)]
    fewer = ridge(query_of(memory_of(task, keys[kept], labels[kept]), keys_of(4, 2)))
    whole = memory_of(task, keys, labels)
    assert torch.equal(ridge(query_of(whole, keys_of(4, 2), without=out)), fewer)
    assert not torch.equal(ridge(query_of(whole, keys_of(4, 2))), fewer)


def test_heads_share_sums_and_a_solution_is_overwritten_when_a_row_goes() -> None:
    task, features, keys = Classification(4), UnitFeatures(WIDTH), keys_of(30)
    memory = memory_of(task, keys, labels_of(task, keys))
    first, second = RidgeReadout(task, features), DiscriminantReadout(task, features)
    other = DiscriminantReadout(task, features, shrinkage=0.1)
    query = query_of(memory, keys_of(4, 2))
    held = [tensor for head in (first, second, other) for tensor in head.solved(query)]
    assert len(memory.store._sums) == 1 and all(tensor.any() for tensor in held)
    assert all(torch.equal(a, b) for a, b in zip(second.solved(query), held[2:4], strict=True))
    memory.forget([3])
    assert not any(tensor.any() for tensor in held)


def test_real_labels_out_of_range_are_refused_and_nothing_is_changed() -> None:
    task, keys = Regression(2), keys_of(12)
    memory = memory_of(task, keys, labels_of(task, keys))
    ridge = RidgeReadout(task, UnitFeatures(WIDTH))
    before = ridge(query_of(memory, keys_of(3, 2)))
    digest = memory.store.digest()
    with pytest.raises(ValueError, match="labels between -32 and 32, found 33; scale labels to about unit size"):
        memory.remember([50], keys[:1], torch.tensor([[0.0, -33.0]]))
    assert memory.store.digest() == digest and 50 not in memory.store
    assert torch.equal(ridge(query_of(memory, keys_of(3, 2))), before)


def test_the_greatest_number_of_a_summand_bounds_it() -> None:
    for task in TASKS:
        summand = LabelledFeatures(UnitFeatures(WIDTH, bits=3), task)
        keys = keys_of(20)
        labels = labels_of(task, keys) if not isinstance(task, Regression) else torch.full((20, 2), -32.0)
        found = summand(keys, labels)
        assert found.shape == (20, summand.width) and float(found.abs().max()) <= summand.greatest


# --- mixtures ---------------------------------------------------------------------------------------------------


@each_task
def test_fitted_weights_are_those_of_scipy(task: Task) -> None:
    keys = keys_of(300)
    labels = labels_of(task, keys)
    noise = torch.randn(4, 300, task.outputs, generator=seeded(5), dtype=torch.float64)
    good = labels.float() if isinstance(task, Regression) else 2 * keys[:, : task.outputs]
    outputs = torch.stack([good + 0.5 * noise[0], 3 * good + noise[1], noise[2], -good + noise[3]]).double()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(weights).requires_grad_()
        value = task.losses(torch.tensordot(w, outputs, 1), labels).mean()
        value.backward()
        assert w.grad is not None
        return value.item(), w.grad.numpy()

    theirs = minimize(loss, np.full(4, 0.3), jac=True, bounds=[(0, None)] * 4, method="L-BFGS-B", tol=1e-14)
    found = fitted_weights(task, outputs, labels)
    np.testing.assert_allclose(found.numpy(), theirs.x, atol=2e-4)
    assert found[3] == 0, "a corner is reached exactly"


def test_a_mixture_is_a_weighted_sum_and_computes_no_part_without_weight() -> None:
    task, keys = Classification(4), keys_of(30)
    memory, features = memory_of(task, keys, labels_of(task, keys)), UnitFeatures(WIDTH)
    parts = {"votes": NeighbourVote(task, 5), "ridge": RidgeReadout(task, features)}
    mixture, query = Mixture(parts, {"votes": 0.5, "ridge": 2.0}), query_of(memory, keys_of(4, 2), 5)
    assert (mixture.neighbours, mixture.deletion, mixture.task) == (5, "sums", task)
    torch.testing.assert_close(mixture(query), 0.5 * parts["votes"](query) + 2 * parts["ridge"](query))
    mixture.set_weights({"votes": 1.0, "ridge": 0.0})
    memory.store._sums.clear()
    torch.testing.assert_close(mixture(query), parts["votes"](query))
    assert not memory.store._sums and repr(mixture).startswith("Mixture(\n  votes=1, ridge=0")
    mixture.set_weights({"votes": 0.0, "ridge": 0.0})
    assert not mixture(query).any()


def test_newton_steps_never_make_a_loss_worse() -> None:
    task = Classification(3)
    outputs = 30 * torch.randn(3, 50, 3, generator=seeded(), dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=seeded(1))
    losses = []
    for steps in range(8):
        weights = fitted_weights(task, outputs, labels, steps=steps)
        losses.append(float(task.losses(torch.tensordot(weights, outputs, 1), labels).mean()))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses)) and losses[-1] < losses[0]


# --- what is refused --------------------------------------------------------------------------------------------


def test_settings_out_of_range_are_refused() -> None:
    task, features = Classification(3), UnitFeatures(WIDTH)
    with pytest.raises(ValueError, match="weights must be one of softmax, rank, distance, equal; found 'cubic'"):
        NeighbourVote(task, weights="cubic")
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        NeighbourVote(task, temperature=0)
    with pytest.raises(ValueError, match="smoothing must be between 0 and 1, found 1"):
        NeighbourVote(task, smoothing=1)
    with pytest.raises(ValueError, match="balance must be between 0 and 1, found 2"):
        NeighbourVote(task, balance=2)
    with pytest.raises(TypeError, match=re.escape("classes are balanced, found Regression(2); use balance=0")):
        NeighbourVote(Regression(2), balance=0.5)
    with pytest.raises(ValueError, match="shrinkage must be above 0, and 1 at most, found 0"):
        RidgeReadout(task, features, shrinkage=0)
    with pytest.raises(ValueError, match="scale must be above 0, found -1"):
        RidgeReadout(task, features, scale=-1)
    with pytest.raises(TypeError, match=re.escape("a discriminant needs classes, found Regression(2)")):
        DiscriminantReadout(Regression(2), features)
    with pytest.raises(ValueError, match="temperature must be above 0, found inf"):
        DiscriminantReadout(task, features, temperature=math.inf)
    with pytest.raises(ValueError, match="balance must be between 0 and 1, found 2"):
        DiscriminantReadout(task, features, balance=2)
    with pytest.raises(ValueError, match="a mixture needs at least one readout, found none"):
        Mixture({})
    with pytest.raises(ValueError, match="all parts of a mixture predict the same"):
        Mixture({"a": NeighbourVote(task), "b": NeighbourVote(Classification(4))})
    for wrong in ({"a": -1.0}, {"b": 1.0}, {"a": math.inf}):
        with pytest.raises(ValueError, match="expected a weight of at least 0 for each of a, found"):
            Mixture({"a": NeighbourVote(task)}, wrong)
    with pytest.raises(ValueError, match="weights are fitted to instances with labels, found none"):
        fitted_weights(task, torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64))

"""Tasks: losses and averages against plain formulas, and every task through training, forgetting, files and audit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifiers import SIZE, encoder, images
from stores import SECRET, seeded
from torch import Tensor
from torch.nn import functional as F

from munkey import Classification, DurableStore, KeyMemoryTransformer, KeyStore, MultiLabel, Regression, Task
from munkey.audit import inside_attacks, inside_view, pathway_accuracies, relearning_curve
from munkey.readout import ExemplarReadout
from munkey.store import ReceiptLog
from munkey.store.log import tokens_of
from munkey.task import TASKS, task_from

B, K, N = 5, 3, 4
TASK: dict[str, Task] = {"classification": Classification(N), "multi_label": MultiLabel(N), "regression": Regression(N)}
each_task = pytest.mark.parametrize("name", TASK)


def labels_of(task: Task, count: int, seed: int = 0) -> Tensor:
    if isinstance(task, Classification):
        return torch.randint(task.outputs, (count,), generator=seeded(seed))
    if isinstance(task, MultiLabel):
        return torch.randint(2, (count, task.outputs), generator=seeded(seed))
    return torch.randn(count, task.outputs, generator=seeded(seed))


def test_losses_are_the_plain_formulas() -> None:
    outputs = torch.randn(B, N, generator=seeded(1), dtype=torch.float64)
    for task in TASK.values():
        labels = labels_of(task, B)
        for b in range(B):
            p, y = outputs[b], labels[b]
            if isinstance(task, Classification):
                expected = -(p.exp() / p.exp().sum())[y].log()
            elif isinstance(task, MultiLabel):
                right = torch.where(y == 1, torch.sigmoid(p), 1 - torch.sigmoid(p))
                expected = -right.log().mean()
            else:
                expected = ((p - y) ** 2).mean()
            torch.testing.assert_close(task.losses(outputs, labels)[b], expected)


@each_task
def test_an_average_is_the_mean_of_what_is_predicted(name: str) -> None:
    task = TASK[name]
    outputs = 3 * torch.randn(B, K, N, generator=seeded(2), dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).expand(B, K)
    found = task.average(outputs, weights)
    of = {"classification": lambda x: x.softmax(-1), "multi_label": torch.sigmoid, "regression": lambda x: x}[name]
    torch.testing.assert_close(of(found), of(outputs[:, :2]).mean(1))
    extreme = torch.tensor([[[1e4, -1e4, 0.0, 0.0]] * K])
    assert task.average(extreme, weights[:1].float()).isfinite().all()
    assert torch.equal(task.predict(task.average(extreme, weights[:1].float())), task.predict(extreme[:, 0]))


def test_scores_are_what_people_report() -> None:
    outputs = torch.tensor([[2.0, 1.0, -1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert Classification(4).scores(outputs, torch.tensor([0, 1])).tolist() == [1, 0]
    assert MultiLabel(4).scores(outputs, torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])).tolist() == [0.75, 1]
    assert Regression(4).scores(outputs, torch.zeros(2, 4)).tolist() == [-1.5, -3.5]


@each_task
def test_a_configuration_makes_the_same_task(name: str) -> None:
    task = TASK[name]
    assert task_from(task.config()) == task and hash(task_from(task.config())) == hash(task) and set(TASKS) == set(TASK)
    assert repr(task) == f"{type(task).__name__}({N})" and task != Classification(N + 1)


@pytest.mark.parametrize(
    ("task", "labels", "error", "message"),
    [
        (Classification(3), [0, 3], ValueError, "expected labels below 3, found 3"),
        (Classification(3), [0, -100], ValueError, "a label is at least 0, found -100; leave out inputs that have no"),
        (Classification(3), [0], ValueError, "expected one label for each of 2 inputs, found (1,)"),
        (Classification(3), [0.0, 1.0], TypeError, "labels must be int64, found torch.float32; number the classes"),
        (Classification(3), ["cat", "dog"], TypeError, "expected labels as numbers, found list"),
        (Classification(3), np.array(["cat", "dog"]), TypeError, "expected labels as numbers, found ndarray"),
        (MultiLabel(2), [[0, 1], [2, 0]], ValueError, "labels of several properties are 0 or 1, found 0 to 2"),
        (MultiLabel(2), [[True, False]] * 2, TypeError, "labels must be int64, found torch.bool; give 0 or 1 for each"),
        (MultiLabel(2), [0, 1], ValueError, "expected one label of shape (2,) for each of 2 inputs, found (2,)"),
        (
            Regression(1),
            [[1.0], [np.nan]],
            ValueError,
            "labels must be finite, found NaN or infinity; leave out inputs",
        ),
        (Regression(1), [[1], [2]], TypeError, "labels must be float32, found torch.int64; use torch.as_tensor(labels"),
    ],
)
def test_errors_teach(task: Task, labels: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=re.escape(message)):
        task.check(labels, 2)


def test_labels_of_any_kind_of_numbers_are_taken() -> None:
    expected = torch.tensor([0, 2])
    for labels in ([0, 2], np.array([0, 2]), np.array([0, 2], np.uint8), expected.int(), expected):
        assert torch.equal(Classification(3).check(labels, 2), expected)
    assert Classification(np.int64(3)).config() == {"name": "classification", "outputs": 3}
    assert Regression(1).check(np.array([[0.5]]), 1).dtype == torch.float32
    with pytest.raises(ValueError, match="outputs must be at least 1, found 0"):
        Regression(0)
    with pytest.raises(ValueError, match="expected a task, one of classification, multi_label, regression, found 'x'"):
        task_from({"name": "x"})


# --- through a life -----------------------------------------------------------------------------------------


def built(task: Task, **settings: Any) -> KeyMemoryTransformer:  # noqa: ANN401
    small = {"width": 8, "heads": 2, "value_width": 4, "mode": "paper", "readout": "transformer", **settings}
    model = KeyMemoryTransformer.for_images(size=SIZE, task=task, key_encoder=encoder(), **small)
    model.memory.store.secret = SECRET
    return model


def same(one: KeyMemoryTransformer, other: KeyMemoryTransformer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.double().nan_to_num(7), theirs[name].double().nan_to_num(7)) for name, value in ours.items()
    )


@each_task
@pytest.mark.parametrize("mode", ["paper", "exact"])
def test_a_model_trains_forgets_and_comes_back(name: str, mode: str, tmp_path: Path) -> None:
    task = TASK[name]
    x, y = images(12), labels_of(task, 12)
    model = built(task, mode=mode)
    model.remember(range(8), x[:8], y[:8], permanent=mode == "exact")
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    if mode == "paper":
        model.attach(optimizer)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = model.loss(x[:8], y[:8], ids=range(8), generator=seeded(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    model.eval()
    model.remember(range(8, 12), x[8:], y[8:])
    model.remember([20], x[:1]) if mode == "paper" else None  # without a label

    model.forget([9, 11])
    assert not {9, 11} & set(model.memory.store)
    stored = model.memory.store.get([3]).labels[0]
    assert torch.equal(stored, y[3]) and stored.shape == task.label_shape

    model.save(tmp_path / "model")
    found = KeyMemoryTransformer.load(tmp_path / "model").eval()
    assert found.task == task and same(found, model) and torch.equal(found(x), model(x))
    assert found.memory.store.digest() == model.memory.store.digest()


@each_task
def test_a_model_is_audited(name: str) -> None:
    task = TASK[name]
    x, y = images(24), labels_of(task, 24)
    model = built(task).eval()
    model.remember(range(12), x[:12], y[:12])
    found = pathway_accuracies(model, x, y)
    with torch.no_grad():
        outputs = model(x)
    assert found.full == pytest.approx(float(task.scores(outputs, y).mean()))
    views = [inside_view(model, part, own) for part, own in zip(x.split(6), y.split(6), strict=True)]
    attacks = inside_attacks(*views, resamples=10)
    losses = [task.losses(view.logits["null"], view.labels) for view in views]
    assert {"null, loss", "null, classifier", "features", "gradients"} <= attacks.keys()
    slopes = []
    for image, label in zip(x[:6], y[:6], strict=True):
        inputs = model.readout.network.tokens(image[None])
        outputs = model.readout.network(inputs, model.memory.null.expand(1, 1, -1)).squeeze(1)
        own = list(model.readout.network.parameters())
        gradient = torch.autograd.grad(task.losses(outputs, label[None]).sum(), own, allow_unused=True)
        slopes.append(torch.stack([g.square().sum() for g in gradient if g is not None]).sum().sqrt())
    torch.testing.assert_close(views[0].gradients, torch.stack(slopes), rtol=1e-4, atol=1e-6)
    assert losses[0].shape == (6,)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIZE[0] * SIZE[1], N))
    linear.task = task  # type: ignore[assignment]
    optimizer = torch.optim.SGD(linear.parameters(), 0.1)
    curve = relearning_curve(linear, x, y, optimizer=optimizer, steps=5)
    assert curve[-1] < curve[0]


def test_exact_mode_writes_a_value_for_a_label_of_any_task() -> None:
    for task in TASK.values():
        model, y = built(task, mode="exact").eval(), labels_of(task, 3)
        writer = model.memory.writer
        assert writer is not None
        model.remember(range(3), images(3), y)
        keys = model.memory.store.get(range(3)).keys
        table = writer.of_label
        if isinstance(task, Classification):
            told = torch.stack([table.weight[1 + int(label)] for label in y])  # type: ignore[union-attr, index]
        else:
            told = F.linear(y.to(keys.dtype), table.weight, table.bias)  # type: ignore[arg-type]
        read = model.memory.read(model.memory.store.rows_of(range(3)))
        torch.testing.assert_close(read, writer.of_key(keys) + told)


# --- what a log recognises ----------------------------------------------------------------------------------


def test_a_token_does_not_depend_on_the_shape_of_a_label() -> None:
    ids, keys = torch.arange(3), torch.randn(3, 4, generator=seeded())
    plain = tokens_of(SECRET, ids, torch.tensor([2, 0, -1]), keys)
    assert tokens_of(SECRET, ids, torch.tensor([[2], [0], [-1]]), keys) == plain
    other = tokens_of(SECRET, ids, torch.tensor([[2, 0], [0, 1], [-1, -1]]), keys.double())
    assert other[2] == plain[2] and other[:2] != plain[:2]
    none = torch.full((3, 5), torch.nan)
    assert tokens_of(SECRET, ids, none, keys)[2] == plain[2]
    wide = torch.tensor([[0.5], [1.0], [2.0]])
    assert tokens_of(SECRET, ids, wide, keys) == tokens_of(SECRET, ids, wide.double().reshape(3, 1, 1), keys)


@pytest.mark.parametrize("task", [MultiLabel(3), Regression(2)])
def test_a_log_and_a_file_keep_labels_of_any_shape(task: Task, tmp_path: Path) -> None:
    y = labels_of(task, 4)
    about = {"label_shape": task.label_shape, "label_dtype": task.label_dtype, "secret": SECRET}
    with DurableStore.create(tmp_path / "store", 3, 2, **about) as store:  # type: ignore[arg-type]
        store.keep_receipts(tmp_path / "log", new=True)
        store.add(range(4), torch.randn(4, 3, generator=seeded()), y)
        store.add([9], torch.randn(1, 3, generator=seeded(1)))
        copy, digest = KeyStore(3, 2, **about), store.digest()  # type: ignore[arg-type]
        copy.load_state_dict(store.state_dict())
        store.forget([2, 9])
    assert copy.digest() == digest
    assert copy.keep_receipts(tmp_path / "log").forgotten == (2, 9), "a backup forgets again"
    copy.close()
    with DurableStore.open(tmp_path / "store", receipts=tmp_path / "log") as store:
        assert list(store) == [0, 1, 3] and torch.equal(store.get([3, 0]).labels, y[[3, 0]])
        assert store.digest() == copy.digest()
    with ReceiptLog(tmp_path / "log", SECRET) as log:
        assert len(log.gone) == 2


def test_a_store_refuses_labels_of_another_kind() -> None:
    store = KeyStore(3, 2, label_shape=(2,), label_dtype=torch.float32)
    keys = torch.randn(1, 3, generator=seeded())
    for labels, error, message in (
        (torch.tensor([[1, 2]]), TypeError, "labels must be float32, found torch.int64"),
        (torch.tensor([1.0]), ValueError, "expected one label of shape (2,) for each of 1 ids, found (1,)"),
        (
            torch.tensor([[1.0, torch.inf]]),
            ValueError,
            "labels must be finite, found NaN or infinity; leave labels out",
        ),
    ):
        with pytest.raises(error, match=re.escape(message)):
            store.add([1], keys, labels)
    assert len(store) == 0
    with pytest.raises(
        ValueError, match=re.escape("labels are stored as torch.int64 or torch.float32, found torch.int8")
    ):
        KeyStore(3, 2, label_dtype=torch.int8)


def test_task_network_and_memory_fit_together() -> None:
    model = built(Classification(4))
    readout = ExemplarReadout(model.exemplar_readout.network, task=Regression(4))
    with pytest.raises(
        ValueError, match=re.escape("the task Regression(4) needs a memory of labels of shape (4,), fou")
    ):
        KeyMemoryTransformer(key_encoder=model.key_encoder, memory=model.memory, readout=readout, mode="paper")
    with pytest.raises(
        ValueError, match=re.escape("give classes= or task=, one of both; found classes=3 and task=Reg")
    ):
        KeyMemoryTransformer.for_images(size=8, classes=3, task=Regression(1), key_encoder=model.key_encoder)

"""Values that are fitted after a training are those of single instances, and leave with them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from classifiers import images, labels, model, train
from torch import Tensor

from munkey import KeyMemoryTransformer, fit_values


def trained(count: int = 8) -> KeyMemoryTransformer:
    built = model(mode="paper", writer=False)
    built.memory.store.secret = b"for tests"
    built.remember(range(count), images(count), labels(count))
    train(built, list(range(count)))
    return built


def late(built: KeyMemoryTransformer, ids: list[int]) -> KeyMemoryTransformer:
    other, x, y = copy.deepcopy(built), images(30)[ids], labels(30)[ids]
    other.remember(ids, x, y)
    fit_values(other, ids, x, y)
    return other


def test_fitted_values_lower_the_loss_and_change_nothing_else() -> None:
    built, ids = trained(), list(range(10, 20))
    x, y = images(30)[ids], labels(30)[ids]
    built.remember(ids, x, y)
    rows, store = built.memory.store.rows_of(ids), built.memory.store
    before = {name: tensor.clone() for name, tensor in built.state_dict().items() if isinstance(tensor, Tensor)}

    def loss() -> Tensor:
        values = store.values.detach()[rows][:, None]
        network = built.exemplar_readout.network
        return built.task.losses(network(network.tokens(x), values).squeeze(1), y).detach()

    start, grad = loss(), store.values.grad.clone()  # type: ignore[union-attr]
    seen: list[int] = []
    fit_values(built, ids, x, y, batch_size=4, progress=lambda parts: [seen.append(len(p)) or p for p in parts])  # type: ignore[func-returns-value]
    assert seen == [4, 4, 2] and (loss() < start).all()
    name = "memory.store.values"
    for other, tensor in built.state_dict().items():
        if other != name and isinstance(tensor, Tensor) and "digest" not in other:
            assert torch.equal(tensor, before[other]), other
    same = (store.values[: store.used].detach() == before[name][: store.used]).all(1)
    assert (~same).nonzero().flatten().tolist() == sorted(rows.tolist())
    assert torch.equal(store.values.grad, grad)  # type: ignore[arg-type]


def test_what_is_fitted_to_one_instance_depends_on_no_other() -> None:
    built = trained()
    together, alone = late(built, [12, 10, 25]), late(built, [10])
    torch.testing.assert_close(*(each.memory.store.get([10]).values for each in (together, alone)))


def test_a_late_instance_that_is_forgotten_leaves_a_model_that_never_had_it() -> None:
    built = trained()
    one = late(late(built, [10, 11]), [20, 21])
    one.forget([20, 21])
    other = late(built, [10, 11])
    assert one.memory.store.digest() == other.memory.store.digest()
    with torch.no_grad():
        assert torch.equal(one.eval()(images(5, seed=3)), other.eval()(images(5, seed=3)))


def test_every_key_of_an_instance_has_its_value_fitted() -> None:
    built, x, y = trained(), images(30)[10:12], labels(30)[10:12]
    keys = torch.stack([built.key_encoder(x), built.key_encoder(x.flip(-1))], 1)
    built.memory.remember([10, 11], keys, y)
    before = built.memory.store.get([10, 11]).values.clone()
    fit_values(built, [10, 11], x, y)
    assert (built.memory.store.get([10, 11]).values.detach() != before).any(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [0]}, "expected one id for each of 2 inputs, found 1"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"labels": torch.tensor([0, 99])}, "99"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"ids": [0, 1], "x": images(2), "labels": labels(2), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_values(trained(), **given)  # type: ignore[arg-type]


def test_values_that_are_written_are_not_fitted() -> None:
    built = model(mode="exact")
    built.remember([0, 1], images(2), labels(2))
    with pytest.raises(ValueError, match="only values of paper mode are fitted; in exact mode a writer computes them"):
        fit_values(built, [0, 1], images(2), labels(2))
    with pytest.raises(KeyError, match="5"):
        fit_values(trained(), [5, 50], images(2), labels(2))

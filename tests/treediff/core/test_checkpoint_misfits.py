"""A run goes on as it began, or an error says what is different."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as rates

from treediff import EMA, TreeGrowth, TreeVAE
from treediff.core.checkpoint import Checkpoint, read_checkpoint, save_checkpoint


def refused(saved: dict[str, Any], parts: dict[str, Any], message: str, folder: Path) -> None:
    save_checkpoint(folder / "a", saved)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_checkpoint(folder / "a").fill(parts)


def adam(*sizes: int, kind: type[Optimizer] = torch.optim.Adam) -> Optimizer:
    """One that made a step."""
    weights = [nn.Parameter(torch.ones(size, size)) for size in sizes]
    optimizer = kind(weights, lr=0.1)  # type: ignore[call-arg]
    sum(weight.square().sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


DIFFERS = "does not fit; start the run as it was started. It differs at "


def lower_rate(optimizer: Optimizer) -> rates.LRScheduler:
    return rates.StepLR(optimizer, 3)


@pytest.mark.parametrize(
    ("saved", "parts", "message"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "has other parts than this run: 'b' is in the checkpoint only"),
        ({"a": 1}, {"a": 1, "b": 2}, "has other parts than this run: 'b' is not in the checkpoint"),
        ({"a": 1}, {"a": 2, "b": 2}, DIFFERS + "'a': expected 2, found 1"),
        ({"a": 1}, {"a": 1.0}, DIFFERS + "'a': expected 1.0, found 1"),
        ({"a": {"b": [1, (2,)]}}, {"a": {"b": [1, (3,)]}}, DIFFERS + "'a/b/1/0': expected 3, found 2"),
        ({"a": {"b": [1]}}, {"a": {"b": (1,)}}, DIFFERS + "'a/b': expected a tuple, found a list"),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": None}}, DIFFERS + "'a/c': expected None, found nothing"),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, DIFFERS + "'a': the tensors have other values"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, DIFFERS + "'a': expected float32 of shape (3,), found float32 of"),
        ({"a": torch.ones(2)}, {"a": 3}, DIFFERS + "'a': expected 3, found a tensor"),
        ({"a": adam(2)}, {"a": 3}, DIFFERS + "'a': expected a value, found Adam"),
        ({"a": 3}, {"a": adam(2)}, DIFFERS + "'a': expected Adam, found a value"),
        ({"a": adam(2)}, {"a": adam(2, kind=torch.optim.AdamW)}, DIFFERS + "'a': expected AdamW, found Adam"),
        (
            {"a": adam(2)},
            {"a": adam(3)},
            DIFFERS + "'a': 'exp_avg' has shape (2, 2), for a weight of shape (3, 3)",
        ),
        ({"a": adam(2, 2)}, {"a": adam(2)}, "contains a parameter group that doesn't match the size of optimizer's"),
        (
            {"a": nn.Linear(2, 1)},
            {"a": nn.Linear(2, 1, bias=False)},
            DIFFERS + "'a/bias': expected no such tensor, found",
        ),
        (
            {"a": nn.Linear(2, 1)},
            {"a": nn.Linear(3, 1)},
            DIFFERS + "'a/weight': expected float32 of shape (1, 3), found",
        ),
        ({"a": nn.Linear(2, 1)}, {"a": nn.Linear(2, 1).double()}, DIFFERS + "'a/bias': expected float64 of shape (1,)"),
        (
            {"a": EMA(nn.Linear(2, 1))},
            {"a": EMA(nn.Linear(3, 1))},
            "the state does not fit the model at 'weights.weight'",
        ),
        (
            {"a": rates.OneCycleLR(adam(2), 0.1, total_steps=20)},
            {"a": lower_rate(adam(2))},
            DIFFERS + "'a': expected StepLR, found OneCycleLR",
        ),
    ],
)
def test_other_runs_are_refused(saved: dict[str, Any], parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(saved, parts, message, tmp_path)


def test_a_schedule_with_another_state_is_refused(tmp_path: Path) -> None:
    schedule = lower_rate(adam(2))
    save_checkpoint(tmp_path / "a", {"a": schedule})
    found = read_checkpoint(tmp_path / "a")
    del found.states["a"]["step_size"]
    with pytest.raises(ValueError, match=re.escape(DIFFERS + "'a/step_size': expected 'there', found nothing")):
        found.fill({"a": schedule})


def test_states_that_their_owner_refuses(tmp_path: Path) -> None:
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401
            args[-1].append("not today")

    refused({"a": Picky(1, 1)}, {"a": Picky(1, 1)}, f"{DIFFERS}'a': Error(s) in loading state_dict", tmp_path)
    found = Checkpoint.of({"a": torch.Generator()})
    found.states["a"] = found.states["a"][:9]
    with pytest.raises(ValueError, match=r"the checkpoint does not fit; .* at 'a': .*RNG state size to be 9"):
        found.fill({"a": torch.Generator()})
    growth = TreeGrowth(TreeVAE.for_vectors(features=3))
    with pytest.raises(KeyError, match="expected what state_dict returned, with the entry 'history'"):
        Checkpoint({"a": {}}, {"a": "TreeGrowth"}).fill({"a": growth})


def test_a_part_that_is_not_there() -> None:
    with pytest.raises(KeyError, match=re.escape("the checkpoint holds no 'b'; it holds ['a']")):
        Checkpoint.of({"a": 1})["b"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"x": [object()]}, "found a object at 'a/x/0'"),
        ({3: {1, 2}}, "found a set at 'a/3'"),
        (torch.ones(2).to_sparse(), "found a sparse tensor at 'a'"),
        (1j, "found a complex at 'a'"),
        ({1: 0, "b": 0}, "the keys of a dict in a checkpoint must be all text or all whole numbers; at 'a' are others"),
        ({True: 0}, "the keys of a dict in a checkpoint must be all text or all whole numbers; at 'a' are others"),
    ],
)
def test_what_no_checkpoint_holds(value: object, found: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.escape(found)):
        save_checkpoint(tmp_path / "a", {"a": value})
    assert os.listdir(tmp_path) == []

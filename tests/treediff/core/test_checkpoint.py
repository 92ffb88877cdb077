"""What a checkpoint holds comes back bit by bit, training goes on as if never stopped, and nothing else is accepted."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import quick
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as rates
from worlds import seeded

from treediff import EMA
from treediff.core.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from treediff.core.io import model_bytes

each_file = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)

TENSORS = st.builds(
    lambda dtype, shape, seed: (torch.randn(shape, generator=seeded(seed)) * 3).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NESTED = st.recursive(
    TENSORS | PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("a/b0", max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(-2, 20), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(first: object, second: object) -> bool:
    """Types and bits."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict) and isinstance(second, dict):
        return set(first) == set(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)  # of nan, too


@each_file
@example({"x": {"0/0": torch.tensor(4.0), "0": [torch.tensor(5.0)]}})
@example({"x": {"0~10": [], "0/0": [None]}, "x/0": torch.tensor(1.0)})
@given(st.dictionaries(st.text("xy/~", min_size=1, max_size=3), NESTED, max_size=4))
def test_any_value_comes_back(tmp_path: Path, values: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "a", values)
    found = read_checkpoint(tmp_path / "a")
    assert same(found.states, values)
    found.fill(values)
    save_checkpoint(tmp_path / "b", found.states)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- training goes on ---------------------------------------------------------------------------------------


class Training:
    """Noise in, weights of several shapes and memory layouts, dropout; everything that has a state."""

    def __init__(
        self, optimizer: Callable[[list[nn.Parameter]], Optimizer], schedule: Callable[[Optimizer], Any]
    ) -> None:
        last = torch.contiguous_format if optimizer is RECIPES["lbfgs"][0] else torch.channels_last  # it knows no other
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2), nn.Linear(2, 1)
            )
        self.model = net.to(memory_format=last)  # type: ignore[call-overload]
        self.optimizer = optimizer(list(self.model.parameters()))
        self.schedule, self.ema = schedule(self.optimizer), EMA(self.model, 0.9)
        self.noise = seeded(1)
        self.parts = {name: value for name, value in vars(self).items() if name != "parts"}
        self.parts |= {"dropout": torch.default_generator, "seed": 3}

    def step(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss: Tensor = self.model(x).square().mean()
            loss.backward()
            return loss

        x = torch.randn(5, 3, 4, 4, generator=self.noise)
        loss = self.optimizer.step(closure)  # type: ignore[func-returns-value, arg-type]
        self.schedule.step(*([loss.item()] if isinstance(self.schedule, rates.ReduceLROnPlateau) else []))
        self.ema.update()


def one_cycle(optimizer: Optimizer) -> rates.LRScheduler:
    return rates.OneCycleLR(optimizer, 0.1, total_steps=20)


def constant(optimizer: Optimizer) -> rates.LRScheduler:
    return rates.LambdaLR(optimizer, lambda step: 0.9**step)


RECIPES: dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], Callable[[Optimizer], Any]]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), one_cycle),
    "fused": (lambda p: torch.optim.Adam(p, lr=0.1, fused=True), one_cycle),
    "adamw": (
        lambda p: torch.optim.AdamW([{"params": p[:2], "weight_decay": 0.0}, {"params": p[2:]}], lr=0.1),
        lambda o: rates.CosineAnnealingLR(o, 20),
    ),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda o: rates.SequentialLR(o, [rates.LinearLR(o, 0.1, 1, 3), rates.ExponentialLR(o, 0.9)], [3]),
    ),
    "plateau": (lambda p: torch.optim.SGD(p, lr=0.05), lambda o: rates.ReduceLROnPlateau(o, patience=0)),
    "steps": (lambda p: torch.optim.RMSprop(p, lr=0.05), lambda o: rates.MultiStepLR(o, [2, 4, 4])),
    "adafactor": (lambda p: torch.optim.Adafactor(p, lr=0.05), constant),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=3), constant),
}


@pytest.fixture
def luck() -> Iterator[None]:
    """Global random state that is put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.usefixtures("luck")
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_goes_on_bit_by_bit(recipe: str, tmp_path: Path) -> None:
    run = Training(*RECIPES[recipe])
    for _ in range(3):
        run.step()
    save_checkpoint(tmp_path / "a", run.parts)
    for _ in range(4):
        run.step()
    expected, luck = Checkpoint.of(run.parts).states, torch.rand(3)

    torch.manual_seed(9)
    again = Training(*RECIPES[recipe])
    again.step()  # whatever was there before
    again = Training(*RECIPES[recipe])
    read_checkpoint(tmp_path / "a").fill(again.parts)
    for _ in range(4):
        again.step()
    found = Checkpoint.of(again.parts).states
    for name, state in expected.items():
        if name == "schedule" and recipe == "steps":
            state["milestones"] = dict(state["milestones"])  # a Counter, which is a dict
            found[name]["milestones"] = dict(found[name]["milestones"])
        assert same(found[name], state), name
    assert torch.equal(torch.rand(3), luck), "dropout draws what it would have drawn"


def test_what_is_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    """Tensors of safetensors are windows into the file, and a checkpoint may be overwritten in its place."""
    save_checkpoint(tmp_path / "a", {"x": torch.ones(10_000)})
    found = read_checkpoint(tmp_path / "a")["x"]
    size = (tmp_path / "a").stat().st_size
    with open(tmp_path / "a", "r+b") as file:
        file.write(bytes(size))
    assert found.sum() == 10_000


# --- the file -----------------------------------------------------------------------------------------------


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint at .*; a run leaves one when it is interrupted"
    ):
        read_checkpoint(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_checkpoint(path)
    path.write_bytes(model_bytes("TreeVAE", {}, {}))
    with pytest.raises(ValueError, match="holds a TreeVAE, expected a Checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"states": 3, "classes": {}},
        {"states": {"a": {}}, "classes": {}},
        {"states": {"a": {"tensor": "b"}}, "classes": {}},
        {"states": {"a": {"tensor": ["a"]}}, "classes": {}},
        {"states": {"a": {"float": "much"}}, "classes": {}},
        {"states": {"a": {"float": {}}}, "classes": {}},
        {"states": {"a": {"tuple": 3}}, "classes": {}},
        {"states": {"a": {"dict": []}}, "classes": {}},
        {"states": {"a": {"numbered": {"x": 1}}}, "classes": {}},
        {"states": {"a": {"pickle": "x"}}, "classes": {}},
        {"states": {"a": {"dict": {}, "tuple": []}}, "classes": {}},
        {"states": {"a": 1}, "classes": 3},
    ],
)
def test_a_damaged_header(header: dict[str, Any], tmp_path: Path) -> None:
    full = json.dumps({"format": 1, "class": "Checkpoint", **header})
    save_file({"a": torch.zeros(1)}, tmp_path / "a", metadata={"treediff": full})
    with pytest.raises(ValueError, match=r"the header of .* is damaged"):
        read_checkpoint(tmp_path / "a")


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {"a": [math.inf, -math.inf, math.nan, 0.1 + 0.2]})
    found = read_checkpoint(tmp_path / "a")["a"]
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2]) and found[3] == 0.1 + 0.2


def test_a_key_with_a_slash_is_not_two_keys(tmp_path: Path) -> None:
    values = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1), "b+": torch.full((1,), 2.0)}}
    save_checkpoint(tmp_path / "a", {"x": values, "x/a": {"b": torch.full((1,), 3.0)}})
    found = read_checkpoint(tmp_path / "a").states
    assert same(found, {"x": values, "x/a": {"b": torch.full((1,), 3.0)}})


@pytest.mark.parametrize("how", ["full", "limit"])
def test_a_full_disk_leaves_the_old_one(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    save_checkpoint(path, {"x": torch.zeros(10_000)})
    old = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full":  # a disk that finds out when it has to write

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:  # a real write that the system refuses half way
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"No space left on device|File too large"):
            save_checkpoint(path, {"x": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a"]
    assert not read_checkpoint(path)["x"].any()

"""A small training, and what processes of tests do with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from worlds import seeded

from treediff import EMA
from treediff.core.distributed import ALONE, World, data_parallel, start
from treediff.core.long_run import LongRun

EPOCHS, BATCHES = 3, 4  # in each of two stages
STEPS = 2 * EPOCHS * BATCHES


class Training:
    """Two stages of a small training, whose second one has an optimiser of its own."""

    def __init__(self, world: World = ALONE) -> None:
        self.model, self.stage, self.world, self.done = nn.Linear(3, 1), 0, world, 0
        with torch.no_grad():
            self.model.weight.fill_(0.5)
            self.model.bias.fill_(0.1)
        self.x, self.seen = torch.randn(15, 3, generator=seeded(3)), [0]

    def state_dict(self) -> dict[str, Any]:
        """Which stage it is in, and the rows it saw."""
        return {"stage": self.stage, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage, self.seen = state["stage"], list(state["seen"])

    def run(self, run: LongRun, act: Callable[[int], None] | None = None) -> None:
        """Train to the end; `act` is called in each step with the number of steps done here."""
        first = 0 if run.saved is None else run.saved["training"]["stage"]
        for self.stage in range(first, 2):
            for _ in self._steps(run):
                self.done += 1
                if act is not None:
                    act(self.done)

    def _steps(self, run: LongRun) -> Iterator[None]:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        ema, order = EMA(self.model, 0.9), seeded(self.stage)
        noise = self.world.own(order)
        parts = {"training": self, "model": self.model, "optimizer": optimizer, "ema": ema}
        parts |= {"order": order, "noise": noise}
        loss_of = data_parallel(lambda x: self.model(x).square().mean(), self.model)

        def batches(_: int) -> tuple[Tensor, ...]:
            return torch.randperm(len(self.x), generator=order).split(4)

        for rows in run.steps(f"stage {self.stage}", EPOCHS, batches, parts):
            self.seen += rows.tolist()
            x = self.x[self.world.share(rows)]
            loss = loss_of(x + 0.1 * torch.randn(x.shape, generator=noise))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()
            run.measured(loss=loss)
            yield
        with ema.average():
            self.average = self.model.weight.detach().clone()

    def result(self) -> list[Any]:
        """All that must be equal."""
        return [self.model.weight.tolist(), self.model.bias.tolist(), self.average.tolist(), self.seen]


def trained(path: Path, act: Callable[[int], None] | None = None, **settings: Any) -> Training:  # noqa: ANN401
    training = Training()
    with LongRun(path, **{"show": False, **settings}) as run:
        training.run(run, act)
    return training


def killed(path: Path, where: str, at: int) -> None:
    """Be killed while the n-th checkpoint is written: when half of it is, or just before what `where` says."""
    calls = 0

    def kill(*args: Any) -> None:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == at:
            if where == "half":
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    name = "fsync" if where == "half" else where
    real = getattr(os, name)
    with mock.patch.object(os, name, kill):
        trained(path, every=0.0)


def endless(path: Path, resume: bool) -> None:
    """Write one checkpoint after another, each of 4 MB of one number, the number of the step."""
    model = nn.Linear(1, 1_000_000, bias=False).requires_grad_(False)
    model.weight.fill_(0.0)
    with LongRun(path, every=0.0, show=False, resume=resume) as run:
        for _ in run.steps("endless", 10**6, lambda epoch: [torch.tensor([epoch])], {"model": model}):
            model.weight.add_(1)


def stopped(path: Path) -> None:
    """Train, say when it has begun, and wait until somebody asks it to stop."""

    def act(done: int) -> None:
        if done == 2:
            Path(f"{path}.begun").touch()
            end = time.monotonic() + 60
            while time.monotonic() < end and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
                time.sleep(0.01)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if a shell has put the tests in the background
    sys.stderr = open(f"{path}.said", "w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    trained(path, act)


# --- on many processes --------------------------------------------------------------------------------------


def together(path: str, resume: bool, at: int, asked: int) -> tuple[list[Any], int, int]:
    """On all ranks: the result, the exit status, and how many steps were done; one rank is asked to stop in a step."""
    world = start()
    training, status = Training(world), 0

    def act(done: int) -> None:
        if done == at and world.rank == asked:
            signal.raise_signal(signal.SIGTERM)

    try:
        with LongRun(path, resume=resume, world=world, show=False) as run:
            training.run(run, act)
    except SystemExit as error:
        return [], int(error.code or 0), training.done
    return training.result(), status, training.done

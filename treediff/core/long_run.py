"""Training that takes long: it says how far it is, and goes on after an interruption as if there had been none.

The loop stays yours. `LongRun.steps` yields the batches, and between two of them it writes a checkpoint every few
minutes, and one when somebody asks the process to stop. See `treediff.core.checkpoint` for what is in it.

Letters: `B` rows of a batch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from treediff.core.checkpoint import Checkpoint, CheckpointFiles, read_checkpoint
from treediff.core.distributed import ALONE, World
from treediff.core.progress import Progress
from treediff.core.stopping import StopRequest

__all__ = ["LongRun"]

_GO, _SAVE, _STOP = range(3)


class LongRun:
    """A run of one or several stages that shows its progress, can be interrupted, and goes on from a checkpoint.

    Between two steps a checkpoint is written if the last one is `every` seconds old, and at the end of each stage. What
    goes wrong while one is written leaves the one before. In a stage, the first Ctrl-C or SIGTERM lets the step finish,
    writes a checkpoint, says where it is, and ends the process with status 130 or 143; a second one stops at once. When
    `with` is left without an error the run has finished, and the checkpoint is removed.

    Args:
        path: of the checkpoint, in a folder that all processes see; without one there is progress and nothing else.
        resume: whether to go on from the checkpoint there.
        every: seconds between two checkpoints.
        world: the processes that train together. The first one writes; all stop at the same step.
        show: whether to show progress.
        files: how checkpoints come to the disk and go from it.

    Raises:
        FileExistsError: if there is a checkpoint that would be lost.
        FileNotFoundError: if there is none to go on from.
        ValueError: if it is damaged, or there is no path to go on from.

    Attributes:
        saved: the checkpoint to go on from, until the first stage begins; None otherwise.

    Examples:
        >>> import tempfile
        >>> model, x = torch.nn.Linear(2, 1), torch.rand(6, 2)
        >>> optimizer, order = torch.optim.Adam(model.parameters()), torch.Generator().manual_seed(0)
        >>> parts = {"model": model, "optimizer": optimizer, "order": order}
        >>> with LongRun(tempfile.mkdtemp() + "/checkpoint.safetensors", show=False) as run:
        ...     for rows in run.steps("training", 2, lambda epoch: torch.randperm(6, generator=order).split(3), parts):
        ...         loss = model(x[rows]).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         run.measured(loss=loss)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        every: float = 300.0,
        world: World = ALONE,
        show: bool = True,
        files: CheckpointFiles | None = None,
    ) -> None:
        self.path, self.every, self.world = None if path is None else os.fspath(path), every, world
        self.show, self.files = show and world.first, files or CheckpointFiles()
        self.saved: Checkpoint | None = None
        self.progress: Progress | None = None
        self.place = _Place()
        stopping = "finishing the step, then writing a checkpoint; once more stops at once"
        self._asked = StopRequest(stopping if world.first else "")
        self._last = time.monotonic()
        if self.path is None:
            if resume:
                raise ValueError("a run goes on from a checkpoint; expected its path, found none")
            return
        if resume:
            self.saved = read_checkpoint(self.path)
        elif os.path.exists(self.path):
            raise FileExistsError(
                f"there is a checkpoint of an interrupted run, {self.path!r}; go on with --resume, or remove it to "
                "begin anew"
            )
        if world.first:
            self.files.tidy(self.path)

    @property
    def epoch(self) -> int:
        """The epoch of the present step, from 0."""
        return self.place.epoch

    @property
    def step(self) -> int:
        """The number of the present step in its epoch, from 0."""
        return self.place.step

    @property
    def seconds(self) -> float:
        """How long the run has taken, before it was interrupted included."""
        return self.place.seconds + time.monotonic() - self.place.since

    # --- the loop -----------------------------------------------------------------------------------------

    def steps(
        self, stage: str, epochs: int, batches: Callable[[int], Iterable[Tensor]], parts: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        """The batches of one stage of training; of a run that goes on, those that are left.

        Args:
            stage: its name, for whoever looks on.
            epochs: how many.
            batches: from the number of an epoch to its batches, `(B,)` row numbers each; asked once for each epoch.
            parts: all that changes from step to step or decides what a step does, by name, as for `save_checkpoint`. If
                the run goes on, they are given the states they had before the first batch comes. A `torch.Generator`
                has a state of its own on each process; everything else must be the same on all.

        Raises:
            OSError: if a checkpoint cannot be written; the one before is whole.
            SystemExit: once a checkpoint is written, if the process was asked to stop.
            TypeError: if a checkpoint cannot hold one of the parts.
            ValueError: if the checkpoint to go on from does not fit, a part is called 'place', or an epoch has no
                batch.
        """
        parts = self._ready(stage, parts)
        self.progress = None
        if self.path is not None:
            self._asked.listen()
        try:
            yield from self._left(stage, epochs, batches, parts)
            self._between(parts, at_least=_SAVE)
        finally:
            self._asked.release()
        self._close()

    def _left(
        self, stage: str, epochs: int, batches: Callable[[int], Iterable[Tensor]], parts: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        """The batches from the present place to the end of the stage."""
        place = self.place
        for epoch in range(place.epoch, epochs):
            if not place.batches:
                place.epoch, place.step, place.batches = epoch, 0, list(batches(epoch))
            if not place.batches:
                raise ValueError(f"expected at least one batch in an epoch, found none in epoch {epoch}")
            count = len(place.batches)
            if self.progress is None:
                done = place.epoch * count + place.step
                self.progress = Progress(stage, epochs * count, done=done, show=self.show)
            while place.step < count:
                self._between(parts)
                yield place.batches[place.step]
                place.step += 1
                self.progress.update()
            place.batches = []
        place.epoch, place.step = epochs, 0

    def measured(self, **values: float | Tensor) -> None:
        """Show these values from now on.

        Args:
            **values: such as a loss; a tensor is read only when it is shown.
        """
        if self.progress is not None:
            self.progress.measured(**values)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _ready(self, stage: str, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Parts with the states to begin with, each generator as one of many, and the place in the run."""
        if "place" in parts:
            raise ValueError("'place' is the name of where a run is; give the part another name")
        generators = {
            name: _RankGenerators(part, self.world) for name, part in parts.items() if isinstance(part, torch.Generator)
        }
        self.place.begin(stage)
        parts = {"place": self.place, **parts, **generators}
        if self.saved is not None:
            self.saved.fill(parts)
            self.saved = None
        return parts

    def _between(self, parts: Mapping[str, Any], at_least: int = _GO) -> None:
        """What there is to do between two steps; all processes do the same."""
        if self.path is None:
            return
        old = time.monotonic() - self._last >= self.every
        wish = _STOP if self._asked.number is not None else _SAVE if old else _GO
        wish = self.world.greatest(max(wish, at_least))
        if wish == _GO:
            return
        self.place.seconds, self.place.since = self.seconds, time.monotonic()
        found = Checkpoint.of(parts)
        if self.world.first:
            self._write(self.path, found)
        self._last = time.monotonic()
        if wish == _STOP:
            self.world.greatest(wish)  # nobody leaves before the file is there
            self._close()
            self._say_goodbye(self.path)
            raise SystemExit(128 + (self._asked.number or signal.SIGINT))

    def _say_goodbye(self, path: str) -> None:
        if self.world.first:
            print(f"stopped; go on with --resume from the checkpoint {path}", file=sys.stderr)

    def _write(self, path: str, found: Checkpoint) -> None:
        try:
            self.files.write(path, found.to_bytes())
        except OSError as error:
            if os.path.exists(path):
                error.add_note(f"the checkpoint before this one is whole, {path}; make room and go on with --resume")
            raise

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._asked.release()
        self._close()
        if self.path is None:
            return
        if kind is None and self.world.first:
            self.files.remove(self.path)
        if kind is KeyboardInterrupt and os.path.exists(self.path):
            self._say_goodbye(self.path)
            raise SystemExit(128 + signal.SIGINT)


class _Place:
    """Where a run is: the stage, the epoch, its batches, and how many of them are done."""

    def __init__(self) -> None:
        self.seconds, self.since = 0.0, time.monotonic()
        self.begin("")

    def begin(self, stage: str) -> None:
        """Go to the start of a stage."""
        self.stage, self.epoch, self.step = stage, 0, 0
        self.batches: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "seconds": self.seconds,
            "epoch": self.epoch,
            "step": self.step,
            "rows": torch.cat(self.batches) if self.batches else torch.zeros(0, dtype=torch.int64),
            "sizes": [len(rows) for rows in self.batches],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["stage"] != self.stage:
            raise ValueError(
                f"the run was interrupted in the stage {state['stage']!r}; expected that, found {self.stage!r}"
            )
        self.seconds += state["seconds"]
        self.epoch, self.step = state["epoch"], state["step"]
        self.batches = list(state["rows"].split(state["sizes"])) if state["sizes"] else []


class _RankGenerators:
    """A generator, of which each process has its own."""

    def __init__(self, generator: torch.Generator, world: World) -> None:
        self.generator, self.world = generator, world

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.world.map(lambda _: self.generator.get_state(), range(self.world.size))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        states = state["states"]
        if len(states) != self.world.size:
            raise ValueError(
                f"the checkpoint is of a run on {len(states)} processes, found {self.world.size}; start as many"
            )
        self.generator.set_state(states[self.world.rank])

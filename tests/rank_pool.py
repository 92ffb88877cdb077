"""Processes that form a process group, and wait for functions to run on all of them."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from copies import context

PATIENCE = 300  # seconds; ranks give each other up sooner


class RankPool:
    """So many ranks, on gloo; they stay until they are closed, or end themselves.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size, self.folder = size, tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, f"{self.folder.name}/meet", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, act: Callable[..., Any], *args: object) -> list[Any]:
        """What a function of a module returns on each rank; an error of any rank is raised."""
        found = self.tried(act, *args)
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def tried(self, act: Callable[..., Any], *args: object) -> list[Any]:
        """What a function returns or raises on each rank; None of a rank that is gone."""
        for pipe in self.pipes:
            pipe.send((act, args))
        return [_received(pipe) for pipe in self.pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self.folder.cleanup()


def _received(pipe: Connection) -> Any:  # noqa: ANN401
    if not pipe.poll(PATIENCE):
        raise TimeoutError(f"a rank has said nothing for {PATIENCE} seconds")
    try:
        return pipe.recv()
    except EOFError:
        return None


def _serve(rank: int, size: int, meet: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    while True:
        try:
            act, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(act(*args))
        except Exception as error:
            error.add_note("".join(traceback.format_exception(error)))
            pipe.send(error)
    dist.destroy_process_group()

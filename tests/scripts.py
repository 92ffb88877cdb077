"""Scripts in processes of their own, which have to end."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import tempfile
import warnings
from pathlib import Path
from subprocess import CompletedProcess

from copies import context

PATIENCE = 300  # seconds; each script of the tests takes a few


def started(script: Path, *options: str, folder: Path | None = None, size: int = 0) -> CompletedProcess[str]:
    """A script that has ended, well or not, with what its first process printed; every warning was an error to it.

    Args:
        script: what runs.
        *options: its command line.
        folder: where it runs.
        size: how many processes run it together, told so as `torchrun` does; 0 if nobody tells it.
    """
    with tempfile.TemporaryDirectory() as outputs:
        job = script, options, folder or Path.cwd()
        processes = [
            context.Process(target=_run, args=(*job, f"{outputs}/{rank}", about))
            for rank, about in enumerate(_ranks(size))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        if late := [process for process in processes if process.exitcode is None]:
            for process in late:
                process.kill()
            raise TimeoutError(f"{script.name} has not ended after {PATIENCE} seconds")
        out, err = (Path(f"{outputs}/0.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    worst = max(abs(process.exitcode or 0) for process in processes)
    return CompletedProcess([str(script), *options], worst, out, err)


def _ranks(size: int) -> list[dict[str, str]]:
    """What each process is told in its environment."""
    if not size:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _run(script: Path, options: tuple[str, ...], folder: Path, output: str, about: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(about)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    warnings.simplefilter("error")
    runpy.run_path(str(script), run_name="__main__")

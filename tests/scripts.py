"""Scripts in a process of their own, which has to end."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from copies import context

PATIENCE = 300  # seconds; each script of the tests takes a few


def started(script: Path, *options: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A script that has ended, well or not; every warning was an error to it."""
    with tempfile.TemporaryDirectory() as outputs:
        files = [f"{outputs}/{name}" for name in ("out", "err")]
        process = context.Process(target=_run, args=(script, options, folder or Path.cwd(), *files))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{script.name} has not ended after {PATIENCE} seconds")
        out, err = (Path(file).read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess([str(script), *options], process.exitcode, out, err)


def launched(size: int, script: Path, *options: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same on so many processes, by `torchrun`."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--", str(script))
    return subprocess.run([*launcher, *options], cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def _run(script: Path, options: tuple[str, ...], folder: Path, out: str, err: str) -> None:
    os.chdir(folder)
    for number, name in ((1, out), (2, err)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [str(script), *options]
    sys.path.insert(0, str(script.parent))
    warnings.simplefilter("error")
    runpy.run_path(str(script), run_name="__main__")

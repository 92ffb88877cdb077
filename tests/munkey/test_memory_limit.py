"""A real limit on memory: a change that has no room does not happen, or the store refuses everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys, torch
torch.set_num_threads(1)
from munkey import KeyStore

ROWS, WIDTH = 60_000, 32
store = KeyStore(WIDTH, WIDTH)
keys = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
store.add(range(ROWS), keys, values=keys)
optimizer = torch.optim.Adam([store.values], lr=0.1)
store.attach(optimizer)
store.read(torch.arange(ROWS)).sum().backward()
optimizer.step()
before = store.digest()
CHANGES = {
    "forget": lambda: store.forget(range(0, ROWS, 2)),
    "compact": lambda: store.compact(),
    "add": lambda: store.add(range(ROWS, 2 * ROWS), keys, values=keys),
}
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
spare = int(sys.argv[2]) << 20
resource.setrlimit(resource.RLIMIT_AS, (now + spare, resource.RLIM_INFINITY))
failed = False
try:
    CHANGES[sys.argv[1]]()
except (MemoryError, RuntimeError) as error:  # PyTorch says it in its own way
    failed = True
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    same = store.digest() == before
    ids = list(store)
    rows = store.rows_of(ids)
    whole = store.ids[rows].tolist() == ids and torch.equal(store.keys[rows], keys[torch.tensor(ids) % ROWS])
    right = (same and len(ids) == ROWS) if failed else True
    print("whole" if whole and right else "violation", "failed" if failed else "done")
except RuntimeError as error:
    print("refuses" if "could not be finished" in str(error) else f"violation {error}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory is in use from /proc")
@pytest.mark.parametrize("name", ["forget", "compact", "add"])
def test_a_change_that_has_no_room(name: str) -> None:
    said = []
    for spare in (1, 14, 400):
        run = subprocess.run([sys.executable, "-c", CHILD, name, str(spare)], capture_output=True, text=True)
        said.append(run.stdout.strip() or run.stderr[-200:])
    assert all(words in ("whole failed", "whole done", "refuses") for words in said), said
    assert said[-1] == "whole done", said
    assert "whole failed" in said or name == "forget", said  # which may find room in what was freed before

"""A real limit on memory: a change that has no room does not happen, or the store refuses everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import os, resource, sys, torch
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

def attempt(name, spare):
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (spare << 20), resource.RLIM_INFINITY))
    failed = False
    try:
        CHANGES[name]()
    except (MemoryError, RuntimeError) as error:  # PyTorch says it in its own way
        failed = True
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        same = store.digest() == before
        ids = list(store)
        rows = store.rows_of(ids)
        whole = store.ids[rows].tolist() == ids and torch.equal(store.keys[rows], keys[torch.tensor(ids) % ROWS])
        right = (same and len(ids) == ROWS) if failed else True
        print("whole" if whole and right else "violation", "failed" if failed else "done", flush=True)
    except RuntimeError as error:
        print("refuses" if "could not be finished" in str(error) else f"violation {error}", flush=True)

for name in sys.argv[1:]:
    for spare in (1, 14, 400):
        child = os.fork()  # of a store that is made once
        if not child:
            attempt(name, spare)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("died", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory is in use from /proc")
def test_a_change_that_has_no_room() -> None:
    names = ["forget", "compact", "add"]
    run = subprocess.run([sys.executable, "-c", CHILD, *names], capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 9, run.stderr[-500:]
    for name, said in zip(names, (lines[:3], lines[3:6], lines[6:]), strict=True):
        assert all(words in ("whole failed", "whole done", "refuses") for words in said), (name, said)
        assert said[-1] == "whole done", (name, said)
        assert "whole failed" in said or name == "forget", (name, said)  # which may find room in what was freed before

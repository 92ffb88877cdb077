"""Time and memory to add rows with drawn values to an empty store, in a process that does nothing else.

    python benchmarks/store_adding.py --rows 1000000 --to file

Keys and values have 128 dimensions each. The bytes of the store are the bytes of its columns, spare room included.
`peak` is the greatest resident memory, and `resident` the resident memory afterwards. Both are without the memory
before, which includes the given keys, and are multiples of the bytes of the store. Linux only. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from munkey import DurableStore, KeyStore

WIDTH = 128


def resident() -> dict[str, int]:
    """Resident bytes now, `VmRSS`, and at most so far, `VmHWM`."""
    # Not getrusage, in which a new process begins with the peak of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":") for line in lines if line.startswith("Vm"))
    return {name: 1024 * int(sizes[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def added(store: KeyStore, rows: int) -> dict[str, float]:
    """Seconds, bytes, and memory."""
    keys = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    keys /= keys.norm(dim=1, keepdim=True)
    ids = torch.arange(rows)
    before = resident()["VmRSS"]
    start = time.perf_counter()
    store.add(ids, keys)
    seconds, after = time.perf_counter() - start, resident()
    size = sum(column.numel() * column.element_size() for column in store.columns)
    peak, stays = ((after[name] - before) / size for name in ("VmHWM", "VmRSS"))
    return {"seconds": seconds, "store bytes": size, "peak": peak, "resident": stays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--to", choices=("memory", "file"), default="memory")
    parser.add_argument("--folder", type=Path, help="folder of the file; by default a temporary folder")
    args = parser.parse_args()
    KeyStore(WIDTH, WIDTH).add(range(64), torch.eye(64, WIDTH))  # whatever is created on first use is created before
    if args.to == "memory":
        found = added(KeyStore(WIDTH, WIDTH), args.rows)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            with DurableStore.create(f"{folder}/store", WIDTH, WIDTH) as store:
                found = added(store, args.rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

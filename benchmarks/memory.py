"""Peak memory of growing a tree, fitting a density and training a second stage on a file larger than that.

    python benchmarks/memory.py --out docs/results/memory.json       # 200,000 images of 64 x 64 x 3, a file of 2.4 GB

The images are made first: disks of one of eight colours on noise. Each stage of growth reads all rows and trains for
some steps. The memory is that of a separate process, as Linux counts it: the greatest resident set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, LeafDensity, TreeGrowth, TreeVAE
from treediff.data import Rows


def make(path: Path, rows: int, size: int) -> None:
    """Write the images, some at a time."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (rows, size, size, 3))
    generator = np.random.default_rng(0)
    colours = np.array([[r, g, b] for r in (40, 220) for g in (40, 220) for b in (40, 220)])
    inside = np.hypot(*(np.indices((size, size)) - size / 2 + 0.5)) < size / 3
    for start in tqdm(range(0, rows, 5_000), desc="make"):
        part = generator.integers(0, 256, (min(5_000, rows - start), size, size, 3), np.uint8)
        part[:, inside] = colours[generator.integers(0, 8, len(part))][:, None] + part[:, inside] // 16
        images[start : start + len(part)] = part
    images.flush()


def work(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Grow, fit, train; the seconds of each."""
    rows = Rows(np.load(path, mmap_mode="r"))
    found: dict[str, Any] = {}
    torch.set_flush_denormal(True)
    start = time.perf_counter()
    model = TreeVAE.for_images(size=rows.shape[2], channels=3, latent=8, width=64, likelihood="gaussian")
    growth = TreeGrowth(
        model, max_leaves=args.leaves, epochs=1, cut_rows=args.cut_rows, subtree_epochs=0, keep_cuts="always"
    )
    training = 0.0
    for stage in growth.stages(rows):
        optimizer = torch.optim.Adam(stage.parameters(), lr=2e-3, fused=True)
        began = time.perf_counter()
        for _, batch in zip(range(args.steps), stage.batches(0, 256), strict=False):
            loss = stage.loss(rows[batch], stage.kl_weight(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        training += time.perf_counter() - began
        print(stage.kind, f"{time.perf_counter() - start:.0f} s, loss {loss.item():.0f}", file=sys.stderr, flush=True)
    found |= {"leaves": len(model.topology.leaves), "growth": time.perf_counter() - start, "training": training}
    start = time.perf_counter()
    pair = DiffuseTreeVAE(model, LeafConditionedDDPM.for_tree(model, width=16, blocks=1))
    pair.density = LeafDensity.fit(model, rows, components=4)
    found["density"] = time.perf_counter() - start
    start = time.perf_counter()
    optimizer = torch.optim.Adam(pair.ddpm.parameters(), lr=1e-3, fused=True)
    for batch in torch.randperm(len(rows))[: 32 * args.steps].split(32):
        loss = pair.loss(rows[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found | {"second stage": time.perf_counter() - start}


def peak_of(process: subprocess.Popen[str]) -> float:
    """The greatest resident set of a process until it ends, in MiB, which the system keeps."""
    peak = 0.0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            peak = int(found[1]) / 1024
        time.sleep(0.05)
    return peak


def main() -> None:
    """Make the file, work in another process, read its peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--leaves", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of each stage, and of the second stage")
    parser.add_argument("--cut-rows", type=int, default=20_000)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.file:
        print(json.dumps(work(args.file, args)))
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("file", "out")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        make(path, args.rows, args.size)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = [sys.executable, __file__, f"--file={path}", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            peak, printed = peak_of(child), child.stdout.read()  # type: ignore[union-attr]
        if child.returncode:
            raise SystemExit(f"the work ended with status {child.returncode}")
        result = {"file_mib": path.stat().st_size / 2**20, "peak_mib": peak, "seconds": json.loads(printed)}
    result |= settings
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

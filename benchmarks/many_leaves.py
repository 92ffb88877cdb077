"""Seconds of growing a tree to many leaves, in training and outside of it: routing rows, cutting leaves, pruning.

    python benchmarks/many_leaves.py --data fashion-mnist --leaves 64 --out docs/results/many_leaves.json

One epoch for each stage, on vectors; images are projected on their principal components.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from treediff import TreeGrowth, TreeVAE
from treediff.data import load_dataset
from treediff.growth.growth import LEARNING
from treediff.layers import PrincipalComponents


def main() -> None:
    """Read the data, grow, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--leaves", type=int, default=64)
    parser.add_argument("--max-depth", type=int, default=12)
    parser.add_argument("--rows", type=int, help="use so many training rows only")
    parser.add_argument("--cut-share", type=float, default=0.2)
    parser.add_argument("--cut-rows", type=int, default=10_000)
    parser.add_argument("--intermediate-every", type=int, default=8)
    parser.add_argument("--splits-at-once", type=int, default=1)
    parser.add_argument("--keep-cuts", default="never", choices=LEARNING)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    x = load_dataset(args.data).train_images[: args.rows].flatten(1)
    x = PrincipalComponents.fit(x, min(args.components, x.shape[1]))(x)
    generator = torch.Generator().manual_seed(0)
    model = TreeVAE.for_vectors(features=x.shape[1], max_depth=args.max_depth, generator=generator)
    growth = TreeGrowth(
        model,
        max_leaves=args.leaves,
        epochs=1,
        subtree_epochs=0,
        intermediate_every=args.intermediate_every,
        splits_at_once=args.splits_at_once,
        cut_share=args.cut_share,
        cut_rows=args.cut_rows,
        keep_cuts=args.keep_cuts,
    )
    start, training, stages, seen = time.perf_counter(), 0.0, 0, 0
    for stage in tqdm(growth.stages(x), desc="stages"):
        began = time.perf_counter()
        optimizer = torch.optim.Adam(stage.parameters(), lr=2e-3, fused=True)
        for rows in stage.batches(0, args.batch_size):
            loss = stage.loss(x[rows], stage.kl_weight(0), generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        training += time.perf_counter() - began
        stages, seen = stages + 1, seen + len(stage.rows)
    whole = time.perf_counter() - start
    result: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    result |= {"shape": list(x.shape), "found": len(model.topology.leaves), "depth": model.topology.max_depth}
    result |= {"stages": stages, "rows_trained": seen, "seconds": whole, "training": training}
    result |= {"outside": 1 - training / whole, "threads": torch.get_num_threads()}
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

"""Time a TreeVAE beside the plain loop over nodes: training step, sub-tree step, inference, generation, memory.

    python benchmarks/treevae_step.py --data fashion-mnist --out docs/results/treevae_step.json

Trees are trained first, one growth per kind of latent, and kept in --trees; a time on an untrained tree says little,
because an untrained router sends every image everywhere. Each row runs in a process of its own; inside, the model and
the loop take turns, and medians are printed. Run nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from treediff import TreeGrowth, TreeVAE
from treediff.data import load_dataset
from treediff.metrics import leaf_perplexity
from treediff.testing import NaiveTreeVAE

KINDS: dict[str, dict[str, Any]] = {"vector": {"latent": 8, "width": 128}, "maps": {"latent": (16, 2, 2), "width": 32}}
BATCH = 256


def grow(kind: str, images: Tensor, trees: Path, sizes: list[int]) -> None:
    """Grow one tree and keep a copy at every size asked for."""
    wanted = {n: trees / f"{kind}-{n}.safetensors" for n in sizes}
    if all(path.exists() for path in wanted.values()):
        return
    model = TreeVAE.for_images(size=28, max_depth=8, generator=torch.Generator().manual_seed(0), **KINDS[kind])
    growth = TreeGrowth(model, max_leaves=max(sizes), epochs=3, settle_epochs=1, intermediate_every=8, min_share=0.002)
    for stage in growth.stages(images):
        if stage.kind == "final":
            break
        optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3, fused=True)
        for epoch in range(stage.epochs):
            for rows in tqdm(list(stage.batches(epoch, BATCH)), desc=f"{kind} {stage.kind}", leave=False):
                optimizer.zero_grad()
                stage.loss(images[rows], stage.kl_weight(epoch)).backward()
                optimizer.step()
        leaves = len(model.topology.leaves)
        if leaves in wanted and stage.kind == "subtree":
            model.save(wanted[leaves])


def take_turns(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each task, run in turn after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 2):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def row(kind: str, leaves: int, trees: Path, images: Tensor, rounds: int) -> dict[str, object]:
    """All figures of one tree."""
    model = TreeVAE.load(trees / f"{kind}-{leaves}.safetensors")
    naive = NaiveTreeVAE(model)
    batches = images[: BATCH * 8].split(BATCH)
    optimizers: dict[TreeVAE | NaiveTreeVAE, torch.optim.Adam] = {
        m: torch.optim.Adam(m.parameters(), lr=0.0, fused=True) for m in (model, naive)
    }
    count = 0

    def step(owner: TreeVAE | NaiveTreeVAE, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            nonlocal count
            count += 1
            optimizers[owner].zero_grad()
            loss(batches[count % len(batches)]).backward()
            optimizers[owner].step()

        return run

    def noise() -> Tensor:
        return torch.randn(BATCH, len(model.topology), *model.latent)

    before = peak()
    tasks = {
        "step_ms": step(model, lambda x: model.elbo(x, threshold=1e-3).loss()),
        "dense_step_ms": step(model, lambda x: model.elbo(x).loss()),
        "naive_step_ms": step(naive, lambda x: naive.elbo(x, noise()).loss()),
    }
    result = take_turns({"step_ms": tasks["step_ms"]}, 3)
    memory = {"step_peak_mib": peak() - before}
    result = take_turns(tasks, rounds)
    with torch.no_grad():
        probs = torch.cat([model.leaf_log_probs(x).exp() for x in images[:10_000].split(1000)])
        visits = model.posterior(batches[0], threshold=1e-3).visits
        test = images[:10_000].split(1000)
        result |= take_turns({"cluster_10k_ms": lambda: [model.cluster(x) for x in test]}, 3)
        model.eval()
        result |= take_turns({"generate_256_ms": lambda: model.sample(BATCH)}, rounds)
        model.train()
    result |= subtree(model, batches, rounds)
    return {
        "kind": kind,
        "leaves": leaves,
        "depth": model.topology.max_depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "leaf_perplexity": round(leaf_perplexity(probs), 3),
        "visits_per_image": round(len(visits.image) / BATCH, 2),
        "leaves_decoded_per_image": round(len(visits.at_leaves()) / BATCH, 2),
        **{name: round(value, 2) for name, value in result.items()},
        **memory,
        "times_faster_than_naive": round(result["naive_step_ms"] / result["step_ms"], 2),
    }


def subtree(model: TreeVAE, batches: tuple[Tensor, ...], rounds: int) -> dict[str, float]:
    """The step of a sub-tree stage: split the shallowest leaf and train its children, all else frozen."""
    growth = TreeGrowth(model, max_leaves=10**6, min_share=0.0, epochs=1)
    growth.history = [{"kind": "initial", "split": None, "epochs": 1, "above": 0.0}]
    growth.policy = lambda leaves: leaves.rows.double() * 0 - torch.arange(len(leaves.rows))
    growth.min_rows = 1
    stages = growth.stages(torch.cat(batches))
    stage = next(s for s in stages if s.kind == "subtree")
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        stage.loss(batches[0]).backward()
        optimizer.step()

    return take_turns({"subtree_step_ms": step}, rounds)


def peak() -> int:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Grow the trees, then measure each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--leaves", type=int, nargs="+", default=[2, 4, 8, 10, 16, 32])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trees", type=Path, default=Path("runs/trees"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    images = load_dataset(args.data).train_images
    if args.row:
        print(json.dumps(row(args.row[0], int(args.row[1]), args.trees, images, args.rounds)))
        return
    args.trees.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in args.kinds:
        grow(kind, images, args.trees, args.leaves)
        for leaves in args.leaves:
            command = [sys.executable, __file__, "--data", args.data, "--trees", str(args.trees)]
            command += ["--rounds", str(args.rounds), "--row", kind, str(leaves)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(found.splitlines()[-1]))
            print(rows[-1], flush=True)
    result = {
        "rows": rows,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

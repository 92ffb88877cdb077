"""Time a TreeVAE beside the plain loop over nodes: training step, sub-tree step, inference, generation, memory.

    python benchmarks/treevae_step.py --data fashion-mnist --out docs/results/treevae_step.json

Trees are trained first, one growth per kind of latent, and kept in --trees. Times of an untrained tree mean little,
because an untrained router sends every image everywhere. Each row runs in a separate process, where the model, the loop
and a tree of two leaves run alternately, five steps each. Times are medians, ratios are medians over the rounds. Run
nothing else at the same time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from treediff import Stage, TreeGrowth, TreeVAE
from treediff.data import load_dataset
from treediff.growth import KLAnnealing
from treediff.metrics import leaf_perplexity
from treediff.testing import NaiveTreeVAE

KINDS: dict[str, dict[str, Any]] = {"vector": {"latent": 8, "width": 128}, "maps": {"latent": (16, 2, 2), "width": 32}}
BATCH = 256
THRESHOLD = TreeGrowth.threshold  # nodes of less probability are visited at random, as in training


def grow(kind: str, images: Tensor, trees: Path, sizes: list[int]) -> None:
    """Grow one tree on a third of the images and keep a copy at every requested size."""
    wanted = {n: trees / f"{kind}-{n}.safetensors" for n in sizes}
    if all(path.exists() for path in wanted.values()):
        return
    model = TreeVAE.for_images(size=28, max_depth=8, generator=torch.Generator().manual_seed(0), **KINDS[kind])
    growth = TreeGrowth(
        model, max_leaves=2 * max(sizes), epochs=2, settle_epochs=1, subtree_epochs=0, intermediate_every=8
    )
    images = images[: len(images) // 3]
    for stage in growth.stages(images):
        if stage.kind == "final" or all(path.exists() for path in wanted.values()):
            break
        train(stage, images, f"{kind} {stage.kind}")
        leaves = len(model.topology.leaves)
        if leaves in wanted:
            trained = copy.deepcopy(model)
            rows = torch.arange(len(images))
            final = Stage(trained, "final", 0, 6, rows, KLAnnealing(step=0.2), threshold=THRESHOLD)
            train(final, images, f"{kind} with {leaves} leaves")
            trained.save(wanted[leaves])


def train(stage: Stage, images: Tensor, name: str) -> None:
    """One stage of growth."""
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3, fused=True)
    for epoch in range(stage.epochs):
        for rows in tqdm(list(stage.batches(epoch, BATCH)), desc=name, leave=False):
            optimizer.zero_grad()
            stage.loss(images[rows], stage.kl_weight(epoch)).backward()
            optimizer.step()


def take_turns(tasks: Mapping[str, Callable[[], object]], rounds: int, calls: int = 5) -> dict[str, list[float]]:
    """Milliseconds per call of each task; in its turn a task runs several times on end, as in training."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            task()  # fills the cache again, which other tasks have used
            start = time.perf_counter()
            for _ in range(calls):
                task()
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return times


def step(
    parameters: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], batches: Sequence[Tensor]
) -> Callable[[], None]:
    """One step of training that leaves the weights as they are, on the next batch at every call."""
    optimizer = torch.optim.Adam(parameters, lr=0.0, fused=True)
    turn = itertools.cycle(batches)

    def run() -> None:
        optimizer.zero_grad()
        loss(next(turn)).backward()
        optimizer.step()

    return run


def whole_tree(model: TreeVAE) -> Stage:
    """The stage that trains everything."""
    return Stage(model, "final", 0, 1, torch.arange(BATCH), KLAnnealing.constant(), threshold=THRESHOLD)


def row(kind: str, leaves: int, trees: Path, images: Tensor, rounds: int) -> dict[str, object]:
    """All figures of one tree."""
    model, small = (TreeVAE.load(trees / f"{kind}-{n}.safetensors") for n in (leaves, 2))
    batches = images[: BATCH * 8].split(BATCH)
    ours = step(model.parameters(), whole_tree(model).loss, batches)
    before = peak()
    take_turns({"step": ours}, 1)
    memory = peak() - before
    naive, fresh = NaiveTreeVAE(model), copy.deepcopy(model)
    for bank in (fresh.banks.posterior_routers, fresh.banks.prior_routers):
        for node in bank.nodes:
            torch.nn.init.zeros_(bank.weights_of(node))  # an untrained router sends everything everywhere

    def noise() -> Tensor:
        return torch.randn(BATCH, len(model.topology), *model.latent)

    times = take_turns(
        {
            "step_ms": ours,
            "two_leaves_step_ms": step(small.parameters(), whole_tree(small).loss, batches),
            "naive_step_ms": step(naive.parameters(), lambda x: naive.elbo(x, noise()).loss(), batches),
            "dense_step_ms": step(model.parameters(), lambda x: model.elbo(x).loss(), batches),
            "untrained_step_ms": step(fresh.parameters(), whole_tree(fresh).loss, batches),
        },
        rounds,
    )
    ratios = {
        "times_faster_than_naive": ratio(times["naive_step_ms"], times["step_ms"]),
        "times_two_leaves": ratio(times["step_ms"], times["two_leaves_step_ms"]),
    }
    with torch.no_grad():
        probs = torch.cat([model.leaf_log_probs(x).exp() for x in images[:10_000].split(1000)])
        visits = model.route(model.features(batches[0]), threshold=THRESHOLD, chance=torch.rand(BATCH))
        test = images[:10_000].split(1000)
        times |= take_turns({"cluster_10k_ms": lambda: [model.cluster(x) for x in test]}, 3, calls=1)
        model.eval()
        times |= take_turns({"generate_256_ms": lambda: model.sample(BATCH)}, rounds)
        model.train()
    about = {
        "kind": kind,
        "leaves": leaves,
        "depth": model.topology.max_depth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "leaf_perplexity": round(leaf_perplexity(probs), 3),
        "visits_per_image": round(len(visits.image) / BATCH, 2),
        "leaves_decoded_per_image": round(len(visits.at_leaves()) / BATCH, 2),
    }
    times |= subtree(model, batches, rounds)
    medians = {name: round(statistics.median(found), 2) for name, found in times.items()}
    return {**about, **medians, **ratios, "step_peak_mib": memory}


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of times in the same round."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 2)


def subtree(model: TreeVAE, batches: tuple[Tensor, ...], rounds: int) -> dict[str, list[float]]:
    """The step of a sub-tree stage: split the shallowest leaf and train its children, all else frozen."""
    split = model.topology.leaves[0]
    model.split(split)
    stage = Stage(model, "subtree", 0, 1, torch.arange(BATCH), KLAnnealing.constant(), (split,), threshold=THRESHOLD)
    return take_turns({"subtree_step_ms": step(stage.parameters(), stage.loss, batches)}, rounds)


def peak() -> int:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Grow the trees, then measure each tree in a separate process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--leaves", type=int, nargs="+", default=[2, 4, 8, 10, 16, 32])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--trees", type=Path, default=Path("runs/trees"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    images = load_dataset(args.data).train_images[:]
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

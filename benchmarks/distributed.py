"""Time of a step, an image, a search and a deletion on several processes, and the messages between processes.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 1 benchmarks/distributed.py --out docs/results/distributed.json
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/distributed.py --out docs/results/distributed.json
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 benchmarks/distributed.py --out docs/results/distributed.json --store

Each run adds its number of processes to the file. Images of training and generation are counted over all processes.
The store has `--rows` rows in all; times are medians of the slowest process, messages and bytes are sums over all
processes. With more processes than cores (`--store` is for that) times mean nothing and are left out. The last line
printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from munkey import KeyMemoryTransformer, Projection, ShardedKeyStore
from treediff import DiffuseTreeVAE, LeafConditionedDDPM, Stage, TreeTopology, TreeVAE
from treediff.core.distributed import World, data_parallel, start
from treediff.growth import KLAnnealing
from treediff.pipeline.conditions import condition_of


def seconds(act: Callable[[], object], rounds: int) -> float:
    """Median over rounds of what the slowest process takes; all begin together."""
    taken = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        act()
        mine = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        taken.append(float(mine))
    return statistics.median(taken[1:])


def stepper(
    loss: Callable[[Tensor], Tensor], optimizers: list[torch.optim.Optimizer], rows: Tensor
) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(rows).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def models(world: World, batch: int, rounds: int) -> dict[str, float]:
    """Images trained on and drawn in a second."""
    x, labels = torch.rand(batch, 1, 28, 28), torch.arange(batch) % 10
    own = world.share(torch.arange(batch))
    tree = TreeVAE.for_images(
        size=28, channels=1, topology=TreeTopology.balanced(3), generator=torch.Generator().manual_seed(0)
    )
    stage = Stage(tree, "final", 0, 1, torch.arange(batch), KLAnnealing.constant())
    vae_loss = data_parallel(stage.loss, tree, unused=True)
    torch.manual_seed(0)
    ddpm = LeafConditionedDDPM.for_tree(tree, width=32)
    with torch.no_grad():
        condition = condition_of(tree, x)
    ddpm_loss = data_parallel(ddpm.loss, ddpm)
    encoder = Projection.random((1, 28, 28), 64)
    classifier = KeyMemoryTransformer.for_images(
        classes=10, channels=1, size=28, key_encoder=encoder, mode="paper", sparse=True
    )
    classifier.shard()
    classifier.remember(own, x[own], labels[own])
    values = torch.optim.SparseAdam([classifier.memory.store.values], lr=1e-2)
    classifier.attach(values)
    munkey_loss = data_parallel(classifier.loss, classifier, unused=True)
    steps: dict[str, tuple[Callable[[Tensor], Tensor], list[torch.optim.Optimizer]]] = {
        "TreeVAE, 8 leaves": (lambda rows: vae_loss(x[rows]), [torch.optim.Adam(tree.parameters(), 1e-4)]),
        "second stage": (lambda rows: ddpm_loss(x[rows], condition[rows]), [torch.optim.Adam(ddpm.parameters(), 1e-4)]),
        "munkey": (
            lambda rows: munkey_loss(x[rows], labels[rows], ids=rows),
            [torch.optim.Adam(classifier.parameter_groups(0.0), 1e-4), values],
        ),
    }
    found = {f"{name}, trained": batch / seconds(stepper(*each, own), rounds) for name, each in steps.items()}
    pair = DiffuseTreeVAE(tree.eval(), ddpm.eval())

    def draw() -> None:
        with torch.no_grad():
            pair.generate(len(own), first_index=int(own[0]), steps=5, generator=torch.Generator().manual_seed(0))

    found["pair, drawn in 5 steps"] = batch / seconds(draw, rounds)
    return found


def store(world: World, rows: int, width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time, messages and bytes of searching and forgetting."""
    made = ShardedKeyStore(width, 16, scale=0.0, secret=b"benchmark")
    for part in torch.arange(rows).split(50_000):
        mine = part.tensor_split(world.size)[world.rank]
        keys = F.normalize(torch.randn(len(mine), width, generator=torch.Generator().manual_seed(int(mine[0]))), dim=1)
        made.add(mine, keys)
    found = {}
    for queries in (1, 64, 256):
        asked = F.normalize(torch.randn(queries, width, generator=torch.Generator().manual_seed(7)), dim=1)
        own = asked.tensor_split(world.size)[world.rank]
        found[f"search {queries}"] = measured(made, partial(made.nearest, own, 10), rounds)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    for count in [count for count in (1, 100, 10_000) if (rounds + 2) * count < len(order)]:
        gone = iter(order[: (rounds + 2) * count].split(count))
        order = order[(rounds + 2) * count :]
        found[f"forget {count}"] = measured(made, partial(forget_next, made, gone), rounds)
    return found


def forget_next(made: ShardedKeyStore, gone: Iterator[Tensor]) -> None:
    made.forget(next(gone))


def measured(made: ShardedKeyStore, act: Callable[[], object], rounds: int) -> dict[str, float]:
    before = made.ranks.messages, made.ranks.bytes
    act()
    sent = made.ranks.messages - before[0], made.ranks.bytes - before[1]
    messages, size = (sum(each) for each in zip(*made.ranks.gather(sent), strict=True))
    return {"seconds": seconds(act, rounds), "messages": messages, "bytes": size}


def main() -> None:
    """All measurements with one number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--store", action="store_true", help="only what is sent for the store, no times")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if not dist.is_torchelastic_launched():
        raise SystemExit("start it with torchrun, see --help")
    dist.init_process_group("gloo")
    world = start()
    row: dict[str, Any] = {
        "rows": args.rows,
        "width": args.width,
        "store": store(world, args.rows, args.width, args.rounds),
    }
    if args.store:
        for each in row["store"].values():
            del each["seconds"]
    else:
        row["images a second"] = models(world, args.batch, args.rounds)
    if world.first:
        result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
        result[str(world.size)] = row
        if args.out:
            args.out.write_text(json.dumps(result) + "\n")
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

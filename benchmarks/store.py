"""Time forgetting, searching and training with a memory, beside faiss and beside a transformer without memory.

    pip install faiss-cpu
    python benchmarks/store.py --out docs/results/store.json

*Forgetting*: ids of rows of 128 + 128 numbers are removed from a store in memory, from one in a file, and from a flat
index of faiss with the same keys; they are filled once, and other ids go in every turn, a fifth of all at most.
*Searching*: the 4 nearest of the same queries and keys, with our exact search and faiss' flat index in turns;
neighbours are compared, and ids that differ are counted where float64 scores are more than 1e-6 apart. `--keys` adds
keys of real images, an `.npz` with `keys` and `queries`. *Model*: a training step and inference with 4 neighbours
beside the same transformer without neighbours. PyTorch and faiss have threads of their own, which look out busily for
more work when a call ends, and would slow down whoever comes next; so there is a pause between the two, and a call that
does not count. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, Projection
from munkey.search.codes import Screen
from munkey.search.exact import nearest

WIDTH = 128
_PAUSE = 0.3  # seconds after which threads have gone to sleep


def seconds(act: Callable[..., object], *given: object) -> float:
    start = time.perf_counter()
    act(*given)
    return time.perf_counter() - start


def in_turns(acts: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, after a pause and a call that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            time.sleep(_PAUSE)
            act()
            taken[name].append(seconds(act))
    return {name: statistics.median(values) for name, values in taken.items()}


def filled(rows: int, folder: str | None = None) -> KeyStore:
    generator = torch.Generator().manual_seed(0)
    store = KeyStore(WIDTH, WIDTH) if folder is None else DurableStore.create(f"{folder}/store", WIDTH, WIDTH)
    keys = F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=1)
    store.add(torch.arange(rows), keys, values=keys)
    return store


def forgetting(rounds: int, sizes: list[int]) -> list[dict[str, Any]]:
    """Removing ids: in memory, in a file, and in faiss."""
    return [removing(rows, count, rounds) for rows in sizes for count in (1, 100, 1000, 10_000) if count <= rows // 10]


def removing(rows: int, count: int, rounds: int) -> dict[str, Any]:
    """Other ids in every turn, never more than a fifth of all."""
    memory = filled(rows)
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH))
    index.add_with_ids(memory.keys[:rows].numpy(), np.arange(rows))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    taken: dict[str, list[float]] = {"memory": [], "file": [], "faiss": []}
    with tempfile.TemporaryDirectory() as folder:
        durable = filled(rows, folder)
        for part in order.split(count)[: min(rounds, max(1, rows // count // 5))]:
            taken["memory"].append(seconds(memory.forget, part))
            taken["faiss"].append(seconds(index.remove_ids, part.numpy()))
            taken["file"].append(seconds(durable.forget, part))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    found = {"rows": rows, "forgotten": count, "turns": len(taken["memory"]), **medians}
    print(json.dumps(found), flush=True)
    return found


def searching(name: str, keys: Tensor, queries: Tensor, rounds: int) -> list[dict[str, Any]]:
    """The 4 nearest rows, here and in faiss."""
    ids, screen = torch.arange(len(keys)), Screen.of(keys)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    found = []
    for batch in (1, 64, 256):
        asked = queries[:batch].contiguous()
        ours = nearest(asked, keys, ids, 5, screen=screen)
        theirs = torch.from_numpy(index.search(asked.numpy(), 4)[1])
        clear = (ours.scores.diff(dim=1).abs() > 1e-6).all(1)
        acts = {
            "ours": lambda asked=asked: nearest(asked, keys, ids, 4, screen=screen),
            "faiss": lambda asked=asked: index.search(asked.numpy(), 4),
        }
        medians = in_turns(acts, rounds)
        found.append(
            {
                "keys": name,
                "rows": len(keys),
                "width": keys.shape[1],
                "queries": batch,
                **medians,
                "times faster": medians["faiss"] / medians["ours"],
                "candidates": float(ours.candidates.double().mean()),
                "different": int((ours.ids[:, :4] != theirs)[clear].sum()),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def modelling(rounds: int, rows: int = 60_000) -> dict[str, float]:
    """A training step of 64 images and inference of 256, with 4 neighbours and without."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(rows, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (rows,), generator=generator)
    model = KeyMemoryTransformer.for_images(10, 1, 28, Projection.random((1, 28, 28), WIDTH), sparse=True)
    ids = torch.arange(rows)
    model.memory.remember(ids, model.key_encoder(images), labels)
    values = model.memory.store.values
    optimizers = [torch.optim.AdamW(model.parameter_groups(0.05)), torch.optim.SparseAdam([values])]
    model.attach(optimizers[1])

    def step(memory: bool) -> None:
        some = torch.randint(rows, (64,), generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if memory:
            model.loss(images[some], labels[some], ids=some).backward()
        else:
            F.cross_entropy(model(images[some], use_memory=False), labels[some]).backward()
        for optimizer in optimizers[: 1 + memory]:
            optimizer.step()

    @torch.no_grad()
    def infer(memory: bool) -> None:
        model(images[:256], use_memory=memory)

    acts = {
        "step": lambda: step(True),
        "step without memory": lambda: step(False),
        "inference": lambda: infer(True),
        "inference without memory": lambda: infer(False),
        "search": lambda: model.memory.neighbours(model.key_encoder(images[:256]), 4),
    }
    return in_turns(acts, 5 * rounds) | {"bytes per row": float(model.memory.store.row_bytes())}


def main() -> None:
    """Everything, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--keys", type=Path, nargs="*", default=[], help="npz files with keys and queries")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.rows = 1, [2000]
    generator = torch.Generator().manual_seed(0)
    searched = []
    for rows, width in ((2000, 16),) if args.quick else ((60_000, 768), (max(args.rows), WIDTH)):
        keys = F.normalize(torch.randn(rows + 256, width, generator=generator), dim=1)
        searched += searching("normal", keys[256:].contiguous(), keys[:256], args.rounds)
    for path in args.keys:
        with np.load(path) as file:
            keys, queries = (F.normalize(torch.from_numpy(file[name]).float(), dim=1) for name in ("keys", "queries"))
        searched += searching(path.stem, keys, queries, args.rounds)
    result = {
        "threads": torch.get_num_threads(),
        "searching": searched,
        "forgetting": forgetting(args.rounds, args.rows),
        "model": modelling(args.rounds, 1000 if args.quick else 60_000),
    }
    line = json.dumps(result)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()

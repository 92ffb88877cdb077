"""Time the operations of a memory, beside faiss, SQLite and LMDB, and beside a transformer without memory.

    pip install faiss-cpu lmdb
    python benchmarks/store.py --out docs/results/store.json
    python benchmarks/store.py --parts forgetting opening --rows 1000000

All sides run alternately within one run. Keys and values have 128 dimensions each.

*forgetting*: ids are deleted from a store in memory and from a flat index of faiss with the same keys. They are also
deleted from a store in a file, and from SQLite and LMDB with the same rows (`store_peers.py`). Every turn deletes other
ids, at most a fifth of all. The stores have their screen, as after a search, and their digest. Afterwards the files are
searched for the keys that were deleted last. *opening*: a file is read until all rows are in memory; our store compares
every row with its tag. Files are in the cache of the system. *adding*: rows with drawn values, each time in a separate
process (`store_adding.py`). *searching*: the 4 nearest of the same queries and keys, with our exact search and faiss'
flat index. Keys are normal, or of 1,000 clusters in which two keys have a cosine of 0.8 (wide) or 0.99 (tight). A
neighbour found by faiss is *different* if its float64 score is more than 1e-6 from the score of our neighbour in its
place. `--keys` adds keys of real images, an `.npz` with `keys` and `queries`. *heads*: a classifier of features with
votes and a linear head, 1,280 features and 100 classes: one row is forgotten, right after an answer and after another
row, and the first and the next input are answered. *keys*: keys of an encoder, beside one image at a time and plain
batches of 64, whose bits may differ. *model*: a training step and inference with 4 neighbours beside the same
transformer without neighbours.

PyTorch and faiss have separate threads, which wait busily for more work after a call and would slow down the next call.
So there is a pause between the two, and an uncounted call where a call changes nothing. Pending writes are on the disk
before a file changes. The last line printed is one JSON object, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import store_peers
import torch
from store_peers import PEERS
from torch import Tensor
from torch.nn import functional as F

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, Projection
from munkey.search.exact import nearest
from munkey.search.screen import Screen

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from train_munkey import efficientnet_lite

WIDTH = 128
COUNTS = (1, 100, 10_000)  # of ids that are forgotten at once
SETS = ((60_000, 768), (0, WIDTH))  # rows and width of keys that are searched; 0 is the most of --rows
COSINES = {"normal": None, "wide": 0.8, "tight": 0.99}
CLUSTERS = 1000
_pause = 0.3  # seconds after which threads are asleep; 0 if little is tried
_ROWS = 1 << 16  # keys that are drawn at a time
_LOOKED_FOR = 4  # keys in files

Times = dict[str, float]


# --- time ---------------------------------------------------------------------------------------------------


def seconds(act: Callable[..., object], *given: object) -> float:
    start = time.perf_counter()
    found = act(*given)
    taken = time.perf_counter() - start
    del found  # after the clock, as freeing memory takes time
    return taken


def in_turns(acts: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Median seconds of each, one after the other in every round, after a pause and a call that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            time.sleep(_pause)
            act()
            taken[name].append(seconds(act))
    return {name: statistics.median(values) for name, values in taken.items()}


def each_once(
    acts: Mapping[str, Callable[[Tensor], object]], parts: Sequence[Tensor], settle: Callable[[], object] = lambda: None
) -> Times:
    """Median seconds of each for a part, another one in every turn, after a pause."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for part in parts:
        for name, act in acts.items():
            settle()
            time.sleep(_pause)
            taken[name].append(seconds(act, part))
    return {name: statistics.median(values) for name, values in taken.items()}


def faster(ours: float, others: Mapping[str, float]) -> Times:
    return {name: taken / ours for name, taken in others.items()}


def tell(what: str, ours: float, others: Mapping[str, float]) -> None:
    beside = "".join(f"; {name} {1000 * s:,.2f} ms, {s / ours:.3g} times ours" for name, s in others.items())
    print(f"{what}: {1000 * ours:,.2f} ms{beside}", flush=True)


# --- rows ---------------------------------------------------------------------------------------------------


def unit_keys(rows: int, width: int, seed: int = 0, cosine: float | None = None) -> Tensor:
    """Keys of length 1: normal noise, or near one of 1,000 centres, so that two of a cluster have this mean cosine."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(CLUSTERS, width, generator=generator), dim=1)
    keys = torch.empty(rows, width)
    for part in keys.split(_ROWS):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
        if cosine is not None:  # of c + s n and c + s m with unit vectors at right angles: 1 / (1 + s^2)
            part *= (1 / cosine - 1) ** 0.5
            part += centres[torch.randint(CLUSTERS, (len(part),), generator=generator)]
            part /= part.norm(dim=1, keepdim=True)
    return keys


def filled(store: KeyStore, keys: Tensor) -> KeyStore:
    store.add(torch.arange(len(keys)), keys, values=keys)
    return store


def ready(store: KeyStore, keys: Tensor, gone: Tensor) -> KeyStore:
    """The store with these rows, except for the deleted rows, as after a search."""
    filled(store, keys).nearest(keys[:1], 1)
    store.forget(gone)  # for the first time all rows are hashed
    return store


# --- forgetting ---------------------------------------------------------------------------------------------


def forgetting(rounds: int, sizes: Sequence[int], where: Path | None) -> Iterator[dict[str, Any]]:
    """Removing ids in memory and in files."""
    for rows in sizes:
        keys = unit_keys(rows, WIDTH)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
        for count in (count for count in COUNTS if count <= rows // 10):
            turns = min(rounds, max(1, rows // count // 5))
            parts = [part.sort().values for part in order[1 : 1 + turns * count].split(count)]
            memory = in_memory(keys, order[:1], parts)
            with tempfile.TemporaryDirectory(dir=where) as folder:
                file, left = in_files(keys, order[:1], parts, Path(folder))
            for place, times in (("memory", memory), ("file", file)):
                others = {name: taken for name, taken in times.items() if name != place}
                tell(f"forget {count:,} of {rows:,} in {place}", times[place], others)
            times = memory | file
            ratios = {name: times[name] / times["memory" if name == "faiss" else "file"] for name in ("faiss", *PEERS)}
            found = {"rows": rows, "forgotten": count, "turns": turns, **times, "times faster": ratios}
            yield found | {"left": left, "looked for": min(_LOOKED_FOR, count)}


def in_memory(keys: Tensor, gone: Tensor, parts: Sequence[Tensor]) -> Times:
    """Seconds of a removal from a store, and from an index."""
    store = ready(KeyStore(WIDTH, WIDTH), keys, gone)
    index: Any = faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH))  # its type stubs lack arrays
    index.add_with_ids(keys.numpy(), np.arange(len(keys)))
    index.remove_ids(gone.numpy())
    return each_once({"memory": store.forget, "faiss": lambda ids: index.remove_ids(ids.numpy())}, parts)


def in_files(keys: Tensor, gone: Tensor, parts: Sequence[Tensor], folder: Path) -> tuple[Times, dict[str, int]]:
    """Seconds of a removal from files, and the number of keys of the last removal that are still in the files."""
    (folder / "file").mkdir()
    store = DurableStore.create(folder / "file" / "store", WIDTH, WIDTH)
    ready(store, keys, gone)
    peers = store_peers.filled(folder, keys)
    acts: dict[str, Callable[[Tensor], object]] = {"file": store.forget}
    for name, peer in peers.items():
        peer.forget(gone.tolist())
        acts[name] = partial(deleted, peer)
    times = each_once(acts, parts, os.sync)
    for opened in (store, *peers.values()):
        opened.close()
    last = keys[parts[-1][:_LOOKED_FOR]]
    return times, {name: store_peers.left(folder / name, last) for name in acts}


def deleted(peer: store_peers.Peer, ids: Tensor) -> None:
    peer.forget(ids.tolist())


# --- opening, adding ----------------------------------------------------------------------------------------


def opening(rounds: int, sizes: Sequence[int], where: Path | None) -> Iterator[dict[str, Any]]:
    """Seconds from a file to rows in memory."""
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=where) as folder:
            keys, path = unit_keys(rows, WIDTH), Path(folder) / "store"
            with DurableStore.create(path, WIDTH, WIDTH) as store:
                filled(store, keys)
            del store
            peers = store_peers.filled(Path(folder), keys, [name for name in PEERS if name != "sqlite wal"])
            for peer in peers.values():
                peer.close()
            os.sync()
            acts = {name: partial(read, peer) for name, peer in peers.items()}
            times = in_turns({"ours": partial(opened, path), **acts}, rounds)
        ours = times.pop("ours")
        tell(f"open {rows:,} rows", ours, times)
        yield {"rows": rows, "ours": ours, **times, "times faster": faster(ours, times)}


def opened(path: Path) -> KeyStore:
    """A store that has been read, and whose file is closed again."""
    with DurableStore.open(path) as store:
        return store


def read(peer: store_peers.Peer) -> tuple[Tensor, ...]:
    peer.open()
    rows = peer.read()
    peer.close()
    return rows


def adding(rounds: int, sizes: Sequence[int], where: Path | None) -> Iterator[dict[str, Any]]:
    """Medians of time and memory."""
    script = Path(__file__).with_name("store_adding.py")
    for rows in sizes:
        found: dict[str, list[dict[str, float]]] = {"memory": [], "file": []}
        for _ in range(rounds):
            for place, each in found.items():
                command = [sys.executable, str(script), "--rows", str(rows), "--to", place]
                command += [] if where is None else ["--folder", str(where)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                each.append(json.loads(done.stdout.splitlines()[-1]))
        medians = {p: {k: statistics.median(e[k] for e in each) for k in each[0]} for p, each in found.items()}
        for place, row in medians.items():
            memory = f"memory {row['peak']:.2f} of the store at most, {row['resident']:.2f} afterwards"
            print(f"add {rows:,} rows to {place}: {row['seconds']:.3f} s; {memory}", flush=True)
        yield {"rows": rows, **medians}


# --- searching ----------------------------------------------------------------------------------------------


def searching(rounds: int, sets: Sequence[tuple[int, int]], paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Keys that are drawn, and keys of files."""
    for rows, width in sets:
        for name, cosine in COSINES.items():
            keys = unit_keys(rows + 256, width, cosine=cosine)
            yield from searched(name, keys[256:], keys[:256], rounds)
    for path in paths:
        with np.load(path) as file:
            keys, queries = (F.normalize(torch.from_numpy(file[name]).float(), dim=1) for name in ("keys", "queries"))
        yield from searched(path.stem, keys, queries, rounds)


def searched(name: str, keys: Tensor, queries: Tensor, rounds: int, k: int = 4) -> Iterator[dict[str, Any]]:
    """The nearest rows, here and in faiss."""
    ids, screen = torch.arange(len(keys)), Screen.of(keys)
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    for batch in (1, 64, 256):
        asked = queries[:batch].contiguous()
        find, search = partial(nearest, asked, keys, ids, k, screen=screen), partial(index.search, asked.numpy(), k)
        ours, theirs = find(), torch.from_numpy(search()[1])
        scores = torch.einsum("bd,bkd->bk", asked.double(), keys[theirs].double())
        different = int(((scores - ours.scores).abs() > 1e-6).sum())
        medians = in_turns({"ours": find, "faiss": search}, rounds)
        what = f"search {batch} of {len(keys):,} x {keys.shape[1]} ({name})"
        tell(what, medians["ours"], {"faiss": medians["faiss"]})
        yield {
            "keys": name,
            "rows": len(keys),
            "width": keys.shape[1],
            "queries": batch,
            **medians,
            "times faster": medians["faiss"] / medians["ours"],
            "candidates": float(ours.candidates.double().mean()),
            "different": different,
            "recall": 1 - different / theirs.numel(),
        }


# --- keys, model --------------------------------------------------------------------------------------------


def encoding(rounds: int, count: int) -> dict[str, Any] | None:
    """Seconds for a key; None where the encoder is not installed."""
    try:
        encoder, single = efficientnet_lite(), efficientnet_lite()
    except ImportError as error:
        print(f"no keys are timed: {error}", flush=True)
        return None
    single.row_wise = False  # so that each is encoded alone
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sample = images[: max(1, count // 10)]
    first = seconds(encoder.keys, images[:32])
    acts = {
        "keys": lambda: encoder.keys(images),
        "batches of 64": lambda: [encoder(part) for part in images.split(64)],
        "one at a time": lambda: single.keys(sample),
    }
    times = in_turns(acts, rounds)
    each = {name: taken / (len(sample) if name == "one at a time" else count) for name, taken in times.items()}
    ours = each.pop("keys")
    tell("a key", ours, each)
    about = {"images": count, "sample": len(sample), "first 32": first, "full": all(encoder._full.passed.values())}
    return {**about, "keys": ours, **each, "times faster": faster(ours, each)}


def heads(rounds: int, rows: int, width: int = 1280, classes: int = 100) -> dict[str, float]:
    """Medians for one row that is forgotten from a classifier of features, and for one input."""
    keys, generator = unit_keys(rows, width), torch.Generator().manual_seed(0)
    model = KeyMemoryTransformer.for_features(features=width, classes=classes)
    model.remember(torch.arange(rows), keys, torch.randint(classes, (rows,), generator=generator))
    order, question = iter(torch.randperm(rows, generator=generator).split(1)), keys[:1]
    answer, forget = torch.no_grad()(lambda: model(question)), lambda: model.forget(next(order))
    taken: dict[str, list[float]] = {}
    for turn in range(-1, rounds):  # the first builds what the others use
        time.sleep(_pause)
        acts = [
            ("forget after an answer", forget),
            *[("forget", forget)] * 20,
            ("first answer", answer),
            ("answer", answer),
        ]
        for name, act in acts:
            found = seconds(act)
            if turn >= 0:
                taken.setdefault(name, []).append(found)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, found in medians.items():
        print(f"{name}, of {rows:,} x {width}: {1000 * found:.2f} ms", flush=True)
    return {"rows": float(rows), "width": float(width), "classes": float(classes), **medians}


def modelling(rounds: int, rows: int) -> Times:
    """A training step of 64 images and inference of 256: in paper mode with 4 neighbours, in exact mode with 16, and
    without memory."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(rows, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (rows,), generator=generator)
    model = KeyMemoryTransformer.for_images(
        classes=10, channels=1, size=28, key_encoder=Projection.random((1, 28, 28), WIDTH), mode="paper", sparse=True
    )
    ids = torch.arange(rows)
    model.memory.remember(ids, model.key_encoder(images), labels)
    values = model.memory.store.values
    optimizers = [torch.optim.AdamW(model.parameter_groups(0.05)), torch.optim.SparseAdam([values])]
    model.attach(optimizers[1])

    exact = KeyMemoryTransformer.for_images(
        classes=10, channels=1, size=28, key_encoder=Projection.random((1, 28, 28), WIDTH), readout="transformer"
    )
    exact.memory.remember(ids, exact.key_encoder(images), labels)
    exact.eval()

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
        "inference, exact mode": torch.no_grad()(lambda: exact(images[:256])),
        "search": lambda: model.memory.neighbours(model.key_encoder(images[:256]), 4),
    }
    return in_turns(acts, 5 * rounds) | {"bytes per row": float(model.memory.store.row_bytes())}


def main() -> None:
    """The requested parts, one after another."""
    global _pause
    args = options()
    _pause *= not args.quick
    most = max(args.rows)
    sets = [(2000, 16)] if args.quick else [(rows or most, width) for rows, width in SETS]
    parts: dict[str, Callable[[], object]] = {
        "forgetting": lambda: list(forgetting(args.rounds, args.rows, args.folder)),
        "opening": lambda: list(opening(args.rounds, args.rows, args.folder)),
        "adding": lambda: list(adding(min(3, args.rounds), args.rows, args.folder)),
        "searching": lambda: list(searching(args.rounds, sets, args.keys)),
        "heads": lambda: heads(3 * args.rounds, min(100_000, most), *((32, 5) if args.quick else ())),
        "keys": lambda: encoding(min(3, args.rounds), args.images),
        "model": lambda: modelling(args.rounds, 1000 if args.quick else 60_000),
    }
    line = json.dumps({"threads": torch.get_num_threads(), **{name: parts[name]() for name in args.parts}})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("forgetting", "opening", "adding", "searching", "heads", "keys", "model")
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--keys", type=Path, nargs="*", default=[], help="npz files with keys and queries")
    parser.add_argument("--folder", type=Path, help="folder of the files, on a disk; by default a temporary folder")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.rows, args.images = 1, [2000], 40
    return args


if __name__ == "__main__":
    main()

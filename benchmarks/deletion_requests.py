"""Cost of forgetting in service: memory, an index, latency, a request, and a thousand requests in a row.

    python benchmarks/deletion_requests.py --data fashion-mnist --out docs/results/deletion_requests.json

*Service*: bytes kept for an instance, and median seconds to build the memory, add an instance, answer 256 images, and
forget one instance and one hundred. It compares munkey, with each aggregation, and rivals that delete. Weights
are not trained there, as no cost depends on weights. *Requests*: a model is trained, and then forgets one instance
after another, once with its memory in the process and once in a file. The accuracy on 256 test images and the seconds
of each request are recorded. After each request no id that was ever forgotten may be in the store. After every
hundredth request the digest must be equal to the digest of a fresh store with the remaining rows. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, Projection
from munkey.presets import patch_for
from treediff.data import load_dataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from rivals import Features, NearestNeighbours, Plain, RACDelete, SemiParametric
from train_munkey import train


class Data:
    """Images with keys."""

    def __init__(self, name: str, key_width: int) -> None:
        data = load_dataset(name)
        assert data.train_labels is not None and data.test_labels is not None
        self.name, self.images, self.labels = data.name, data.train_images[:], data.train_labels
        self.test_images, self.test_labels = data.test_images[:], data.test_labels
        self.shape, self.classes = tuple(self.images.shape[1:]), 1 + int(data.train_labels.max())
        self.encoder = Projection.random(self.shape, key_width)
        self.keys = torch.cat([F.normalize(self.encoder.keys(x), dim=1) for x in self.images.split(1000)])
        self.ids = torch.arange(len(self.images))

    def munkey(self, **settings: Any) -> KeyMemoryTransformer:  # noqa: ANN401
        channels, height, width = self.shape
        return KeyMemoryTransformer.for_images(
            classes=self.classes,
            channels=channels,
            size=(height, width),
            key_encoder=self.encoder,
            sparse=True,
            **{"mode": "paper", "readout": "transformer", **settings},
        )

    def remembered_by(self, model: Any, ids: Tensor) -> None:  # noqa: ANN401
        model.remember(ids, self.images[ids], self.labels[ids], keys=self.keys[ids])


def seconds(act: Callable[..., object], *given: object, rounds: int = 1) -> float:
    """Median seconds over rounds."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        act(*given)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def bytes_kept(model: nn.Module, count: int) -> float:
    """Bytes for an instance: rows of a store with the columns that a search needs, or images that are drawn again."""
    if isinstance(model, SemiParametric):
        return sum(x.numel() * x.element_size() for x in (model.ids, model.images, model.labels)) / count
    return sum(float(module.row_bytes()) for module in model.modules() if isinstance(module, KeyStore))


def service(data: Data, rounds: int) -> list[dict[str, Any]]:
    """One row for each model, all in one run."""

    def features() -> Features:
        return Features(data.shape, patch_for(*data.shape[1:]))

    makers: dict[str, Callable[[], Any]] = {
        f"munkey, {name}, {k}": partial(data.munkey, aggregation=name, neighbours=k)
        for name in ("ensemble", "softmax", "rank")
        for k in (1, 4, 16)
    }
    makers |= {
        "munkey, exact, ensemble, 4": partial(data.munkey, mode="exact"),
        "nearest neighbours, 16": lambda: NearestNeighbours(data.encoder, data.classes),
        "retrieval-augmented, 4": lambda: RACDelete(Plain(features(), data.classes), data.encoder, data.classes),
        "semi-parametric, 4096": lambda: SemiParametric(features(), data.classes),
        "no memory": lambda: Plain(features(), data.classes),
    }
    return [served(data, name, make().eval(), rounds) for name, make in tqdm(makers.items(), desc="service")]


@torch.no_grad()
def served(data: Data, name: str, model: Any, rounds: int) -> dict[str, Any]:  # noqa: ANN401
    """Costs of one model; each time other instances are added or removed."""
    ids, batch = data.ids[:-rounds], data.test_images[:256]
    row: dict[str, Any] = {"model": name, "build": seconds(data.remembered_by, model, ids)}
    row["bytes"] = bytes_kept(model, len(ids))
    new = iter(data.ids[-rounds:].split(1))
    row["add 1"] = seconds(lambda: data.remembered_by(model, next(new)), rounds=rounds)
    model(batch)
    row["answer 256"] = seconds(model, batch, rounds=rounds)
    if name == "no memory":
        return row
    ones, hundreds, rest = ids[: 102 * rounds].split([rounds, 100 * rounds, rounds])
    for count, part in ((1, ones), (100, hundreds)):
        gone = iter(part.split(count))
        row[f"forget {count}"] = seconds(lambda own=gone: model.forget(next(own)), rounds=rounds)
    last = iter(rest.split(1))
    row["forget 1 and answer 256"] = seconds(lambda: (model.forget(next(last)), model(batch)), rounds=rounds)
    return row


def requests(data: Data, count: int, epochs: int) -> dict[str, Any]:
    """Requests one after another, with the memory in the process and in a file."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = data.munkey()
    data.remembered_by(model, data.ids)
    train(model, data.images, data.labels, data.ids, epochs=epochs, batch_size=128)
    found: dict[str, Any] = {"training": time.perf_counter() - start}
    order = torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(1))[:count].tolist()
    with tempfile.TemporaryDirectory() as folder:
        for where in ("in memory", "in a file"):
            own = copy.deepcopy(model)
            if where == "in a file":
                own.memory.store = DurableStore.copy_of(own.memory.store, f"{folder}/store")
            own.memory.store.digest()  # the first one after training takes a pass over the store
            found[where] = sequence(own, data, order)
            if isinstance(own.memory.store, DurableStore):
                own.memory.store.close()
    return found


@torch.no_grad()
def sequence(model: KeyMemoryTransformer, data: Data, order: list[int]) -> dict[str, Any]:
    """Seconds and accuracy after each request; an error if a check fails."""
    store, taken, right = model.memory.store, [], []
    for number, instance in enumerate(tqdm(order, desc="requests", mininterval=1), start=1):
        taken.append(seconds(model.forget, [instance]))
        if len(store) != len(data.ids) - number or store.contains(order[:number]).any():
            raise AssertionError(f"request {number}: an instance is there that must not be, or is missing")
        if number % 100 == 0 and fresh(store).digest() != store.digest():
            raise AssertionError(f"request {number}: the digest is not that of a store that never held them")
        right.append(float((model(data.test_images[:256]).argmax(1) == data.test_labels[:256]).double().mean()))
    return {"seconds": taken, "accuracy": right, "median": statistics.median(taken), "greatest": max(taken)}


def fresh(store: KeyStore) -> KeyStore:
    """A new store with the same rows."""
    other, rows = KeyStore(*store.widths, secret=store.secret), slice(0, store.used)
    other.add(store.ids[rows], store.keys[rows], store.labels[rows], store.values.detach()[rows])
    return other


def main() -> None:
    """Service, then requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--key-width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    data = Data(args.data, args.key_width)
    result = {"data": data.name, "instances": len(data.ids), "key width": args.key_width}
    result |= {"service": service(data, args.rounds), "requests": requests(data, args.requests, args.epochs)}
    for row in result["service"]:
        print({name: value if isinstance(value, str) else float(f"{value:.3g}") for name, value in row.items()})
    if args.out:
        args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

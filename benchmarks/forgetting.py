"""Forget, and compare with a model trained without: accuracies, an attack, and the average gap between the two.

    python benchmarks/forgetting.py --data fashion-mnist --floor random-10% --out docs/results/forgetting_fashion.json
    python benchmarks/forgetting.py --data path/to/cifar10.npz --encoder efficientnet --epochs 30 \
        --kinds random-10% --also neighbours=1 aggregation=rank --out docs/results/forgetting_cifar.json

For each seed one model is trained on everything (colour images moved and mirrored). Then, for each kind of forget set,
a copy of it forgets, and another model, of another seed, is trained without. Accuracies and the area under the curve of
the loss attack are in percent; the attack separates forgotten instances from test images of the same kind. The *floor*
is the gap between two models trained without, of different seeds: the gap of perfect forgetting. Settings of the model
are options by name, as in `--set own_token_probability=0.5`; `--set drop_exemplar=1 drop_input=0` is a transformer
without memory, which forgets nothing. `--permanent 0.5` is exact mode: weights are trained on half of the images, and
the model that forgot is compared with a model of the same seed. `--also` evaluates the same models with another number
of neighbours or another aggregation. Every row is saved when it is complete, and the next run with the same settings
does not compute it again. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from munkey import KeyMemoryTransformer
from munkey.audit import area_under_curve, average_gap
from munkey.readout.aggregate import AGGREGATIONS
from munkey.search.exact import nearest
from treediff.data import load_dataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from train_munkey import augment_of, encoder_of, train


class Task:
    """Images, labels, and keys, which are computed once."""

    def __init__(self, args: argparse.Namespace) -> None:
        data = load_dataset(args.data)
        assert data.train_labels is not None and data.test_labels is not None
        rows = slice(0, len(data.train_images) - args.holdout)
        self.name, self.images, self.labels = data.name, data.train_images[rows], data.train_labels[rows]
        self.test_images, self.test_labels = data.test_images[:], data.test_labels
        if args.holdout:
            self.test_images, self.test_labels = data.train_images[rows.stop :], data.train_labels[rows.stop :]
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(7))
        self.stay, self.forgettable = order.tensor_split([round(args.permanent * len(order))])
        self.classes = 1 + int(torch.cat([self.labels, self.test_labels]).max())
        self.encoder = encoder_of(args, tuple(self.images.shape[1:]))
        self.keys, self.test_keys = (F.normalize(keys, dim=1) for keys in self._keys(args.keys))

    def _keys(self, path: Path | None) -> tuple[Tensor, Tensor]:
        """Keys of both splits, read from the file, or written to the file if it is missing."""
        mark = self.encoder.fingerprint() + digest(self.images) + digest(self.test_images)
        if path and path.exists():
            with np.load(path) as file:
                if str(file["mark"]) != mark:
                    raise SystemExit(f"{path} holds keys of other images or of another encoder; name another file")
                return torch.from_numpy(file["keys"]), torch.from_numpy(file["queries"])
        keys, queries = (
            torch.cat([encode(part) for part in tqdm(x.split(250), desc=name, mininterval=1.0)])
            for name, encode, x in (
                ("keys", self.encoder.keys, self.images),
                ("queries", self.encoder, self.test_images),
            )
        )
        if path:
            np.savez(path, keys=keys.numpy(), queries=queries.numpy(), mark=mark)
        return keys, queries

    def key_accuracy(self) -> float:
        """Accuracy of the class of the nearest key, in percent: the accuracy of the keys alone."""
        found = nearest(self.test_keys, self.keys, torch.arange(len(self.keys)), 1).rows[:, 0]
        return 100 * float((self.labels[found] == self.test_labels).double().mean())

    def forget_set(self, kind: str, seed: int) -> Tensor:
        """Rows to forget: a share at random, the class of a random row, or the rows nearest to a random row."""
        order = self._order(seed)
        if kind.startswith("random"):
            share = float(kind.removeprefix("random-").removesuffix("%")) / 100
            return order[: round(len(self.images) * share)]
        if kind == "class":
            return order[self.labels[order] == self.labels[order[0]]]
        return order[self._near(self.keys[order], order[0], len(self.images) // 100)]

    def others(self, kind: str, seed: int) -> Tensor:
        """Test images of the same kind as the forget set."""
        first = self._order(seed)[0]
        if kind == "class":
            return (self.test_labels == self.labels[first]).nonzero().squeeze(1)
        if kind == "cluster":
            return self._near(self.test_keys, first, len(self.test_keys) // 100)
        return torch.arange(len(self.test_images))

    def _order(self, seed: int) -> Tensor:
        """Forgettable rows, in random order."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return self.forgettable[torch.randperm(len(self.forgettable), generator=generator)]

    def _near(self, keys: Tensor, row: Tensor, count: int) -> Tensor:
        """The keys most similar to the key of a training image."""
        return (keys @ self.keys[row]).topk(count).indices


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def trained(task: Task, ids: Tensor, seed: int, args: argparse.Namespace) -> KeyMemoryTransformer:
    """A model of some instances; in exact mode weights are trained on the permanent ones."""
    channels, height, width = task.images.shape[1:]
    settings: dict[str, Any] = {
        "mode": "exact" if args.permanent else "paper",
        "readout": "transformer",
        "sparse": True,
    }
    settings |= dict(args.set)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KeyMemoryTransformer.for_images(
            classes=task.classes,
            channels=channels,
            size=(height, width),
            key_encoder=task.encoder,
            seed=seed,
            **settings,
        )
    everyone, ids = ids, task.stay if args.permanent else ids
    model.remember(ids, task.images[ids], task.labels[ids], keys=task.keys[ids], permanent=args.permanent > 0)
    train(
        model,
        task.images,
        task.labels,
        ids,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        value_rate=args.value_rate,
        augment=augment_of(channels),
        seed=seed,
    )
    later = everyone[~torch.isin(everyone, ids)]
    model.remember(later, task.images[later], task.labels[later], keys=task.keys[later])
    return model


class Splits:
    """The forget set, the retain set, and test images of the same kind as the forget set."""

    def __init__(self, task: Task, kind: str, seed: int) -> None:
        self.task, self.forget = task, task.forget_set(kind, seed)
        everything = torch.arange(len(task.images))
        self.retain = everything[~torch.isin(everything, self.forget)]
        self.others = task.others(kind, seed)

    def measured(self, model: KeyMemoryTransformer, *, use_memory: bool) -> dict[str, float]:
        """Accuracies and the attack, in percent."""
        found, losses, task = {}, {}, self.task
        splits = {"test": (task.test_images, task.test_labels, task.test_keys)}
        for name, rows in (("retain", self.retain[: len(task.test_images)]), ("forget", self.forget)):
            splits[name] = (task.images[rows], task.labels[rows], task.keys[rows])
        for name, (x, labels, keys) in splits.items():
            parts = zip(x.split(256), keys.split(256), strict=True)
            with torch.no_grad():
                logits = torch.cat([model(a, keys=k, use_memory=use_memory) for a, k in parts])
            found[name] = 100 * float((logits.argmax(1) == labels).double().mean())
            losses[name] = F.cross_entropy(logits, labels, reduction="none")
        found["attack"] = 100 * area_under_curve(-losses["forget"], -losses["test"][self.others])
        return found

    def compared(self, models: list[KeyMemoryTransformer], *, use_memory: bool = True) -> dict[str, Any]:
        """A model that forgot beside one or two that were trained without."""
        found, *oracles = (self.measured(model, use_memory=use_memory) for model in models)
        result = {"after": found, "oracle": oracles[0], "gap": average_gap(found, oracles[0])}
        return result | ({"floor": average_gap(oracles[1], oracles[0])} if len(oracles) > 1 else {})


def changed(model: KeyMemoryTransformer, name: str, value: int | str) -> KeyMemoryTransformer:
    """A model with the same weights and memory and one other setting."""
    model, readout = copy.copy(model), copy.copy(model.exemplar_readout)
    readout._modules = dict(readout._modules)
    model._modules = {**model._modules, "readout": readout}
    if name == "neighbours":
        readout.neighbours = int(value)
    else:
        readout.aggregation = AGGREGATIONS[str(value)](readout.neighbours)
    return model


def row_of(full: KeyMemoryTransformer, task: Task, kind: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One kind of forget set: the model that forgets, and the models trained without."""
    start = time.perf_counter()
    splits, use_memory = Splits(task, kind, seed), dict(args.set).get("drop_exemplar") != 1
    before = splits.measured(full, use_memory=use_memory)
    model = copy.deepcopy(full)
    forgetting = time.perf_counter()
    receipt = model.forget(splits.forget)
    forgetting = time.perf_counter() - forgetting
    # An exact model is compared with one of the same seed, to which it must be equal.
    others = range(not args.permanent, 1 + (not args.permanent) + (kind in args.floor))
    oracles = [trained(task, splits.retain, seed + 100 * n, args) for n in others]
    row: dict[str, Any] = {
        "seed": seed,
        "kind": kind,
        "forgotten": receipt.rows,
        "seconds": forgetting,
        "before": before,
    }
    row |= splits.compared([model, *oracles], use_memory=use_memory)
    row["gap before"] = average_gap(before, row["oracle"])
    row["input alone"] = splits.compared([model, *oracles], use_memory=False)
    for name, value in args.also:
        row[f"{name}={value}"] = splits.compared([changed(each, name, value) for each in (model, *oracles)])
    return row | {"minutes": (time.perf_counter() - start) / 60}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and, over seeds, sample standard deviation; other settings of a model are below its kind."""
    names = ["test", "retain", "forget", "attack"]
    lines = ["| | " + " | ".join([*names, "gap", "floor"]) + " |", "| --- " * 7 + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        lines.append(_line(f"{kind}, before", [[row["before"][n] for n in names] + [row["gap before"]] for row in own]))
        views = [None, *(name for name in own[0] if isinstance(own[0][name], dict) and "after" in own[0][name])]
        for view in views:
            found = [row if view is None else row[view] for row in own]
            title = kind if view is None else f"{kind}, {view}"
            after = [[each["after"][n] for n in names] + [each["gap"], each.get("floor")] for each in found]
            lines.append(_line(f"{title}, after", after))
            lines.append(_line(f"{title}, retrained", [[each["oracle"][n] for n in names] for each in found]))
    return "\n".join(lines)


def _line(title: str, rows: list[list[float | None]]) -> str:
    cells = []
    for column in zip(*rows, strict=True):
        known = [number for number in column if number is not None]
        spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
        cells.append(f"{statistics.mean(known):.2f}{spread}" if known else "")
    return f"| {title} | " + " | ".join(cells + [""] * (6 - len(cells))) + " |"


def setting(pair: str) -> tuple[str, Any]:
    """A name and its value: JSON, or a word."""
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    """All seeds and kinds of forget sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--encoder", default="random", help="random, efficientnet, or a file of train_encoder.py")
    parser.add_argument("--key-width", type=int, default=64)
    parser.add_argument("--keys", type=Path, help="npz file for keys: written, or read if it is there")
    parser.add_argument("--kinds", nargs="+", default=["random-1%", "random-10%", "class", "cluster"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--holdout", type=int, default=0, help="test on the last so many training images instead")
    parser.add_argument("--permanent", type=float, default=0.0, help="exact mode: share of images to train weights on")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--value-rate", type=float, default=1e-2)
    parser.add_argument("--floor", nargs="*", default=[], metavar="KIND", help="a second model trained without")
    parser.add_argument("--set", nargs="*", default=[], type=setting, metavar="NAME=VALUE", help="of the model")
    parser.add_argument("--also", nargs="*", default=[], type=setting, metavar="NAME=VALUE", help="see above")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    task = Task(args)
    about = {name: value for name, value in vars(args).items() if name not in ("out", "data", "seeds", "kinds", "keys")}
    about = {"data": task.name, **about, "encoder": Path(args.encoder).name, "fitted on": task.encoder.fitted_on}
    about["key accuracy"] = task.key_accuracy()
    about = json.loads(json.dumps(about))
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        rows = before.pop("results")
        if before != about:
            raise SystemExit(f"{args.out} holds results of other settings; move it away, or name another file")
    for seed in args.seeds:
        kinds = [kind for kind in args.kinds if (seed, kind) not in {(row["seed"], row["kind"]) for row in rows}]
        full = trained(task, torch.arange(len(task.images)), seed, args) if kinds else None
        for kind in kinds:
            assert full is not None
            rows.append(row_of(full, task, kind, seed, args))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps({**about, "results": rows}) + "\n")
    print(table(rows))
    print(json.dumps({**about, "results": rows}))


if __name__ == "__main__":
    main()

"""Forget, and compare with a model trained without: accuracies, an attack, and the average gap between the two.

    python benchmarks/forgetting.py --data fashion-mnist --out docs/results/forgetting_fashion.json
    python benchmarks/forgetting.py --data path/to/cifar10.npz --encoder efficientnet --epochs 30 \
        --kinds random-10% --out docs/results/forgetting_cifar.json

For each seed one model is trained on everything. Then, for each kind of forget set, a copy of it forgets, and another
model, of another seed, is trained without. Accuracies and the area under the curve of the loss attack are in percent;
the attack tells forgotten instances from test images of the same kind. The *floor* is the gap between two models
trained without, of different seeds: what a gap of zero looks like. Settings of the model are options by name, as in
`--set own_token_probability=0.5`. Progress is saved after each row; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from munkey import ConvEncoder, EfficientNetLite0, KeyEncoder, KeyMemoryTransformer, Projection
from munkey.audit import average_gap, loss_attack
from treediff.cpu import tune_cpu
from treediff.data import batches, load_dataset


class Task:
    """Images, labels, and keys, which are made once."""

    def __init__(self, args: argparse.Namespace) -> None:
        data = load_dataset(args.data)
        assert data.train_labels is not None and data.test_labels is not None
        rows = slice(0, args.rows)
        self.name, self.images, self.labels = data.name, data.train_images[rows], data.train_labels[rows]
        self.test_images, self.test_labels = data.test_images, data.test_labels
        self.classes = 1 + int(torch.cat([self.labels, self.test_labels]).max())
        self.encoder = encoder_of(args, tuple(self.images.shape[1:]))
        self.keys = self._keys(self.images, "keys", self.encoder.keys)
        self.test_keys = self._keys(self.test_images, "queries", self.encoder)

    @staticmethod
    def _keys(x: Tensor, name: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([encode(part) for part in tqdm(x.split(250), desc=name, mininterval=1.0)])

    def forget_set(self, kind: str, seed: int) -> Tensor:
        """Rows to forget: a share at random, the class of a random row, or what is nearest to a random row."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(1000 + seed))
        if kind.startswith("random"):
            return order[: round(len(order) * float(kind.removeprefix("random-").removesuffix("%")) / 100)]
        if kind == "class":
            return (self.labels == self.labels[order[0]]).nonzero().squeeze(1)
        return self._near(self.keys, order[0], len(order) // 100)

    def others(self, kind: str, seed: int) -> Tensor:
        """Test images of the same kind as what is forgotten."""
        first = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(1000 + seed))[0]
        if kind == "class":
            return (self.test_labels == self.labels[first]).nonzero().squeeze(1)
        if kind == "cluster":
            return self._near(self.test_keys, first, len(self.test_keys) // 100)
        return torch.arange(len(self.test_images))

    def _near(self, keys: Tensor, row: Tensor, count: int) -> Tensor:
        """The keys most like that of a training image."""
        unit = torch.nn.functional.normalize(keys, dim=1)
        return (unit @ torch.nn.functional.normalize(self.keys[row], dim=0)).topk(count).indices


def encoder_of(args: argparse.Namespace, shape: tuple[int, ...]) -> KeyEncoder:
    if args.encoder == "random":
        return Projection.random(shape, args.key_width)
    if args.encoder == "efficientnet":
        return EfficientNetLite0()
    return ConvEncoder.load(args.encoder)


def trained(
    task: Task, ids: Tensor, seed: int, settings: dict[str, Any], args: argparse.Namespace
) -> KeyMemoryTransformer:
    """A model of some instances."""
    channels, height, width = task.images.shape[1:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = KeyMemoryTransformer.for_images(
            task.classes, channels, (height, width), task.encoder, seed=seed, sparse=True, **settings
        )
    model.remember(ids, task.images[ids], task.labels[ids], keys=task.keys[ids])
    values = model.memory.store.values
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameter_groups(0.05), lr=2e-3)]
    optimizers.append(torch.optim.SparseAdam([values], lr=1e-2))
    model.attach(optimizers[1])
    steps = args.epochs * -(-len(ids) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 2e-3, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=steps, desc="train", mininterval=1.0)
    for _ in range(args.epochs):
        for rows in batches(len(ids), args.batch_size, generator=generator):
            own = ids[rows]
            x = task.images[own]
            if channels == 3:
                x = augmented(x, generator)
            loss = model.loss(x, task.labels[own], ids=own, generator=generator)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return model.eval()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, and shifted by up to 4 pixels; all of a batch alike."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(3)
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")[
        :, :, 4 + down : 4 + down + x.shape[2], 4 + right : 4 + right + x.shape[3]
    ]


def measured(
    model: KeyMemoryTransformer, task: Task, forget: Tensor, retain: Tensor, others: Tensor
) -> dict[str, float]:
    """Accuracies and the attack, in percent."""
    found, losses = {}, {}
    splits = {
        "test": (task.test_images, task.test_labels, task.test_keys),
        "retain": tuple(column[retain[:20_000]] for column in (task.images, task.labels, task.keys)),
        "forget": tuple(column[forget] for column in (task.images, task.labels, task.keys)),
    }
    for name, (x, labels, keys) in splits.items():
        with torch.no_grad():
            logits = torch.cat([model(a, keys=k) for a, k in zip(x.split(256), keys.split(256), strict=True)])
        found[name] = 100 * float((logits.argmax(1) == labels).double().mean())
        losses[name] = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found["attack"] = 100 * loss_attack(losses["forget"], losses["test"][others])
    return found


def input_alone(model: KeyMemoryTransformer, task: Task, forget: Tensor, others: Tensor) -> float:
    """The attack on the input pathway: what the weights kept, in percent."""
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(x, use_memory=False), labels, reduction="none")
            for x, labels in (
                (task.images[forget], task.labels[forget]),
                (task.test_images[others], task.test_labels[others]),
            )
        ]
    return 100 * loss_attack(*losses)


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
    parser.add_argument("--kinds", nargs="+", default=["random-1%", "random-10%", "class", "cluster"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rows", type=int, help="use the first so many training images only")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--floor", action="store_true", help="a second model trained without, of another seed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tune_cpu()
    settings = dict(setting(pair) for pair in args.set)
    task = Task(args)
    everything = torch.arange(len(task.images))
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for seed in args.seeds:
        full = trained(task, everything, seed, settings, args)
        for kind in args.kinds:
            forget = task.forget_set(kind, seed)
            retain = everything[~torch.isin(everything, forget)]
            others = task.others(kind, seed)
            before = measured(full, task, forget, retain, others)
            model = copy.deepcopy(full)
            receipt = model.forget(forget)
            after = measured(model, task, forget, retain, others)
            oracles = [trained(task, retain, seed + 100 * n, settings, args) for n in range(1, 2 + args.floor)]
            found = [measured(oracle, task, forget, retain, others) for oracle in oracles]
            row = {"seed": seed, "kind": kind, "forgotten": receipt.rows, "before": before, "after": after}
            row |= {
                "oracle": found[0],
                "gap": average_gap(after, found[0]),
                "gap before": average_gap(before, found[0]),
            }
            row |= {"input attack": input_alone(model, task, forget, others)}
            row |= {"input attack of the oracle": input_alone(oracles[0], task, forget, others)}
            row |= {"floor": average_gap(found[1], found[0])} if args.floor else {}
            rows.append(row | {"minutes": (time.perf_counter() - start) / 60})
            print(json.dumps(rows[-1]), flush=True)
            about = {name: value for name, value in vars(args).items() if name not in ("out", "data")}
            about |= {"encoder": Path(args.encoder).name, "fitted on": task.encoder.fitted_on}
            result = json.dumps({"data": task.name, **about, "results": rows})
            if args.out:
                args.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

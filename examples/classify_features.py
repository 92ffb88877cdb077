"""Classify features of a frozen network, and forget some instances to the bit.

    python examples/embed.py --data photographs/ --out features.npz
    python examples/classify_features.py --data features.npz
    python examples/classify_features.py --data table.npz --learn trees         # boosted trees, for a table

A share of the instances is permanent. The whitening of keys is fitted to them. Five small networks are trained, each
on four fifths of them, and averaged. What each network says of the fifth that it did not learn chooses how much votes
of neighbours, a linear head on exact sums, and the networks count. All other instances can be forgotten, and the last
lines check it: a classifier that never had them gives the same bits. `--learn trees` takes boosted trees in place of
networks, `--learn nothing` neither. Everything is here: copy it and change what you like. The last line printed is one
JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F

from munkey import Classification, KeyMemoryTransformer, Projection
from munkey.readout import ModuleReadout
from treediff.data import load_dataset

SHRINKAGES = (0.3, 0.6)  # of the whitening, to choose from
Learn = Callable[[Tensor, Tensor, int], nn.Module]  # from inputs, labels and the number of classes


class Standardised(nn.Module):
    """Features with mean 0 and standard deviation 1."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        spread = x.std(0)
        self.register_buffer("spread", torch.where(spread > 0, spread, 1.0))  # a rare word may be in no row of these

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (x - self.mean) / self.spread  # type: ignore[operator]
        return found


def network(x: Tensor, y: Tensor, classes: int, *, epochs: int, seed: int) -> nn.Sequential:
    """A network with one hidden layer and dropout; a plain PyTorch loop."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(x.shape[1], 512), nn.GELU(), nn.Dropout(0.5), nn.Linear(512, classes)
        found = nn.Sequential(Standardised(x), *layers)
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * -(-len(x) // 128) + 1)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(128):
                loss = F.cross_entropy(found(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return found.eval()


class Average(nn.Module):
    """The mean of the log-probabilities of networks."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x).log_softmax(1) for network in self.networks]).mean(0)


class Trees(nn.Module):
    """Log-probabilities by gradient-boosted trees of scikit-learn, for tables."""

    def __init__(self, x: Tensor, y: Tensor, classes: int, *, seed: int) -> None:
        super().__init__()
        self.trees, self.classes = HistGradientBoostingClassifier(random_state=seed).fit(x.numpy(), y.numpy()), classes

    def forward(self, x: Tensor) -> Tensor:
        found = x.new_full((len(x), self.classes), 1e-9)
        found[:, torch.from_numpy(self.trees.classes_)] = torch.from_numpy(self.trees.predict_proba(x.numpy())).to(x)
        return found.clamp_min(1e-9).log()


def classifier(
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    fixed: Tensor,
    classes: int,
    *,
    learn: Learn | None = None,
    balance: float = 0.0,
) -> KeyMemoryTransformer:
    """A classifier that remembers instances; `learn` is given those of `fixed`, which are permanent."""
    if not len(fixed):
        model = KeyMemoryTransformer.for_features(features=x.shape[1], classes=classes, balance=balance)
        model.remember(ids, x[ids], y[ids])
        return model
    task, folds = Classification(classes), fixed.tensor_split(5)
    held, trained = folds[0], torch.cat(folds[1:])

    def whitened(own: Tensor, shrinkage: float, others: dict[str, ModuleReadout]) -> KeyMemoryTransformer:
        encoder = Projection.whitening(x[own], y[own], shrinkage=shrinkage, fitted_on="permanent split")
        model = KeyMemoryTransformer.for_features(
            features=x.shape[1], task=task, key_encoder=encoder, balance=balance, readouts=others
        )
        model.remember(own, x[own], y[own], permanent=True)
        return model

    def loss(shrinkage: float) -> float:
        """Of instances that neither whitening nor memory has seen."""
        model = whitened(trained, shrinkage, {})
        model.fit_readout(x[held], y[held])
        return float(task.losses(answers(model, x[held]), y[held]).mean())

    readouts, unseen = {}, {}
    if learn is not None:
        parts = [torch.cat([other for other in folds if other is not fold]) for fold in folds]
        networks = [learn(x[part], y[part], classes) for part in parts]
        known = y[fixed].unique()  # of other classes the networks have no opinion
        readouts["network"] = ModuleReadout(task, Average(networks), fitted_on="permanent split", known=known)
        unseen["network"] = torch.cat([Average([n])(x[fold]) for n, fold in zip(networks, folds, strict=True)])
    model = whitened(fixed, min(SHRINKAGES, key=loss), readouts)
    model.fit_readout(x[fixed], y[fixed], ids=fixed, outputs=unseen)
    rest = ids[~torch.isin(ids, fixed)]
    model.remember(rest, x[rest], y[rest])
    return model


@torch.no_grad()
def answers(model: KeyMemoryTransformer, x: Tensor) -> Tensor:
    """Log-probabilities, a batch at a time."""
    return torch.cat([model(part) for part in x.split(256)])


def named_permanent(path: str) -> Tensor | None:
    """The rows that a file of embed.py names, since its network was fitted to them."""
    if not path.endswith(".npz"):
        return None
    with np.load(path) as file:
        return torch.from_numpy(file["permanent"]) if "permanent" in file.files else None


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and its mean over classes (more is better), log loss in nats and calibration error (less is better)."""
    log_probs = logits.double().log_softmax(1)
    sure, guess = log_probs.exp().max(1)
    right = (guess == labels).double()
    bins = (15 * sure).long().clamp_max(14)
    gap = sum(abs(float((sure[bins == b] - right[bins == b]).sum())) for b in range(15)) / len(labels)
    return {
        "accuracy": float(right.mean()),
        "balanced accuracy": float(balanced_accuracy_score(labels, guess)),
        "log loss": float(F.nll_loss(log_probs, labels)),
        "calibration error": gap,
    }


def main() -> None:
    """Remember, measure, forget, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a file of embed.py, or images, whose pixels are the features")
    parser.add_argument("--permanent", type=float, default=0.5, help="share of the instances that cannot be forgotten")
    parser.add_argument("--forget", type=float, default=0.1, help="share of the others that are forgotten")
    parser.add_argument("--learn", default="network", choices=("network", "trees", "nothing"))
    parser.add_argument("--epochs", type=int, default=30, help="of the network")
    parser.add_argument(
        "--balance", type=float, default=0.0, help="from 0, as frequent as seen, to 1, all classes alike"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/features"), help="folder for results")
    args = parser.parse_args()
    data = load_dataset(args.data)
    if data.train_labels is None or data.test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for training and test, found none")
    x, test = data.train_images[:].flatten(1), data.test_images[:].flatten(1)
    y, classes = data.train_labels, 1 + int(torch.cat([data.train_labels, data.test_labels]).max())
    ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
    fixed = named_permanent(args.data)
    fixed = ids[: int(args.permanent * len(ids))] if fixed is None else fixed
    rest = ids[~torch.isin(ids, fixed)]
    start = time.perf_counter()
    learn: dict[str, Learn | None] = {"trees": partial(Trees, seed=args.seed), "nothing": None}
    learn["network"] = partial(network, epochs=args.epochs, seed=args.seed)
    build = partial(classifier, x, y, fixed=fixed, classes=classes, learn=learn[args.learn], balance=args.balance)
    model = build(ids)
    before = answers(model, test)
    seconds = time.perf_counter() - start
    gone = rest[: max(1, int(args.forget * len(rest)))]
    start = time.perf_counter()
    receipt = model.forget(gone)
    to_forget = time.perf_counter() - start
    start = time.perf_counter()
    after = answers(model, test)
    to_answer = time.perf_counter() - start
    never = build(ids[~torch.isin(ids, gone)])
    result = {
        "data": data.name,
        "seed": args.seed,
        "instances": len(ids),
        "features": x.shape[1],
        "weights": dict(zip(model.readout.readouts, model.readout.weights.tolist(), strict=True)),  # type: ignore
        "seconds to remember and answer": seconds,
        "before": scores(before, data.test_labels),
        "forgotten": len(receipt.forgotten),
        "seconds to forget": to_forget,
        "seconds to answer after": to_answer,
        "after": scores(after, data.test_labels),
        "equal to never": torch.equal(after, answers(never, test)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / "model.safetensors")
    (args.out / "results.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

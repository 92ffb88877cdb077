"""Compare classifiers of the same features: what forgets to the bit, and what has to be trained again.

    python benchmarks/readouts.py --data cifar.npz banking.npz --seeds 3 --out docs/results/readouts.json

Files are those of `examples/embed.py`; `fashion-{seed}.npz` names one for each seed. Settings of the rivals
(neighbours, temperature, shrinkage, penalty) are those that are best on a fifth of the training rows, which are then
used as well. munkey is `examples/classify_features.py`: half of the rows are permanent; five networks are trained on
four fifths of these each, and three weights are chosen by cross-validation. For a table there is another with boosted
trees in place of the networks. Numbers are means over seeds; a seed decides which rows are permanent, which are held
out, and initial weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey import Classification, KeyMemoryTransformer
from munkey.readout import DiscriminantReadout, NeighbourVote, Query, RidgeReadout, UnitFeatures
from treediff.data import load_dataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from classify_features import Learn, Trees, answers, classifier, named_permanent, network, scores
from rivals import Fit, Predict, boosting, logistic


def readout(make: Callable[[Classification, int], Any]) -> Fit:
    """One readout alone, on the features as keys."""

    def fit(x: Tensor, y: Tensor, classes: int) -> Predict:
        model = KeyMemoryTransformer.for_features(features=x.shape[1], classes=classes)
        model.remember(range(len(x)), x, y)
        part = make(Classification(classes), x.shape[1])
        return lambda q: torch.cat([part(Query(model.memory, b, b, max(1, part.neighbours))) for b in q.split(256)])

    return fit


def perceptron(epochs: int, seed: int) -> Fit:
    """A network with one hidden layer of 512 and dropout, of `examples/classify_features.py`."""

    def fit(x: Tensor, y: Tensor, classes: int) -> Predict:
        found = network(x, y, classes, epochs=epochs, seed=seed)
        return lambda q: found(q).detach()

    return fit


def tip_adapter(beta: float, alpha: float) -> Fit:
    """Tip-Adapter without training (arXiv 2111.03930, eq. 3 to 5) beside a linear head, here a ridge regression.

    The paper's head is CLIP's for the names of classes, which features of other networks do not have.
    """

    def fit(x: Tensor, y: Tensor, classes: int) -> Predict:
        keys, head, values = F.normalize(x, dim=1), ridge(0.03)(x, y, classes), F.one_hot(y, classes).float()

        def predict(q: Tensor) -> Tensor:
            votes = [(-beta * (1 - F.normalize(b, dim=1) @ keys.T)).exp() @ values for b in q.split(256)]
            return head(q) + alpha * torch.cat(votes)

        return predict

    return fit


def votes(k: int, temperature: float) -> Fit:
    return readout(lambda task, width: NeighbourVote(task, k, temperature=temperature))


def ridge(shrinkage: float) -> Fit:
    return readout(lambda task, width: RidgeReadout(task, UnitFeatures(width), shrinkage=shrinkage))


def discriminant(shrinkage: float) -> Fit:
    return readout(lambda task, width: DiscriminantReadout(task, UnitFeatures(width), shrinkage=shrinkage))


#: Rivals and the settings that are tried for each; the first three forget to the bit as well.
RIVALS: dict[str, Callable[[int, bool], Iterable[Fit]]] = {
    "votes": lambda seed, table: [votes(k, t) for k in (1, 8, 32, 128) for t in (0.02, 0.05, 0.1)],
    "ridge": lambda seed, table: [ridge(s) for s in (0.003, 0.01, 0.03, 0.1, 0.3)],
    "discriminant": lambda seed, table: [discriminant(s) for s in (0.003, 0.01, 0.03, 0.1, 0.3)],
    "logistic regression": lambda seed, table: [logistic(p) for p in (1e-5, 1e-4, 3e-4, 1e-3, 3e-3)],
    "perceptron": lambda seed, table: [perceptron(epochs, seed) for epochs in (10, 30)],
    "Tip-Adapter": lambda seed, table: [tip_adapter(b, a) for b in (5.0, 20.0) for a in (0.3, 1.0, 3.0)],
    "boosted trees": lambda seed, table: [boosting(seed)] if table else [],
}


def compare(path: Path, seed: int, *, table: bool) -> dict[str, Any]:
    """All methods on one file, with one seed."""
    path = Path(str(path).format(seed=seed))
    data = load_dataset(path)
    assert data.train_labels is not None and data.test_labels is not None
    x, y = data.train_images[:].flatten(1), data.train_labels
    test, labels = data.test_images[:].flatten(1), data.test_labels
    classes = 1 + int(torch.cat([y, labels]).max())
    ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    half, held, fitted = ids[: len(ids) // 2], ids[: len(ids) // 5], ids[len(ids) // 5 :]
    if (named := named_permanent(str(path))) is not None:  # these features were fitted to some rows
        half, ids = named, torch.cat([named, ids[~torch.isin(ids, named)]])
        held, fitted = ids[-(len(ids) // 5) :], ids[: -(len(ids) // 5)]
    found, learn = {}, partial(network, epochs=30, seed=seed)
    ours: dict[str, tuple[Tensor, Learn | None, float]] = {
        "munkey": (half, learn, 0.0),
        "munkey, balance 0.5": (half, learn, 0.5),
        "munkey, no network": (half, None, 0.0),
        "munkey, nothing permanent": (ids[:0], None, 0.0),
    }
    if table:
        ours["munkey, trees"] = half, partial(Trees, seed=seed), 0.0
    for name, (fixed, how, balance) in ours.items():
        start = time.perf_counter()
        model = classifier(x, y, ids, fixed, classes, learn=how, balance=balance)
        found[name] = scores(answers(model, test), labels) | {"seconds": time.perf_counter() - start}
        print(path.stem, seed, name, f"{100 * found[name]['accuracy']:.2f}", flush=True)
    for name, fits in RIVALS.items():
        tried = [
            (scores(fit(x[fitted], y[fitted], classes)(x[held]), y[held])["accuracy"], fit) for fit in fits(seed, table)
        ]
        if tried:
            best = max(tried, key=lambda pair: pair[0])[1]
            start = time.perf_counter()
            found[name] = scores(best(x, y, classes)(test), labels) | {"seconds": time.perf_counter() - start}
            print(path.stem, seed, name, f"{100 * found[name]['accuracy']:.2f}", flush=True)
    return found


def summarised(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    return {
        name: {
            what: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
            for what in runs[0][name]
            for values in [[run[name][what] for run in runs]]
        }
        for name in runs[0]
    }


def main() -> None:
    """Run all, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of examples/embed.py")
    parser.add_argument("--tables", nargs="*", default=[], help="names of files that are tables")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("readouts.json"))
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for path in args.data:
        name = path.stem.replace("-{seed}", "")
        if name not in found:
            runs = [compare(path, seed, table=name in args.tables) for seed in range(args.seeds)]
            found[name] = summarised(runs)
            args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps({name: {m: row["accuracy"] for m, row in rows.items()} for name, rows in found.items()}))


if __name__ == "__main__":
    main()

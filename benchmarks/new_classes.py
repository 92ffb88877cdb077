"""Learn on: accuracy on a class after its first examples, and on all others, without any training.

    python benchmarks/new_classes.py --data flowers.npz banking.npz --out docs/results/new_classes.json

Files are those of `examples/embed.py`. A classifier of `examples/classify_features.py --learn nothing` is made without
some classes: neither its whitening nor its memory has an instance of these. Then, class by class, the memory is
given 1, 5 or 20 examples, which are forgotten again afterwards. *New* is the accuracy on test rows of the class, *old*
on test rows of the classes that were there before; means over classes and seeds, in percent. *All* is the accuracy on
the same rows of a classifier that had all training rows of the class from the beginning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from munkey import KeyMemoryTransformer
from treediff.data import load_dataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from classify_features import answers, classifier

COUNTS = (1, 5, 20)


def accuracy(model: KeyMemoryTransformer, x: Tensor, y: Tensor) -> float:
    """Share of correct answers, in percent."""
    return 100 * float((answers(model, x).argmax(1) == y).double().mean())


def learn_on(path: Path, new_classes: int, balance: float, seed: int) -> dict[str, dict[str, list[float]]]:
    """Accuracies by number of examples, one for each new class."""
    data = load_dataset(path)
    assert data.train_labels is not None and data.test_labels is not None
    x, y, test, labels = data.train_images[:], data.train_labels, data.test_images[:], data.test_labels
    classes, generator = 1 + int(torch.cat([y, labels]).max()), torch.Generator().manual_seed(seed)
    new = torch.randperm(classes, generator=generator)[:new_classes]
    ids = torch.randperm(len(x), generator=generator)
    old = ids[~torch.isin(y[ids], new)]
    model = classifier(x, y, old, old[: len(old) // 2], classes, balance=balance)
    known = ~torch.isin(labels, new)
    found: dict[str, dict[str, list[float]]] = {}
    found["0"] = {"new": [0.0], "old": [accuracy(model, test[known], labels[known])]}
    for label in tqdm(new.tolist(), desc=path.stem, leave=False):
        own, asked = ids[y[ids] == label], labels == label
        for count in (*COUNTS, len(own)):
            model.remember(own[:count], x[own[:count]], y[own[:count]])
            each = found.setdefault(str(count) if count in COUNTS else "every", {"new": [], "old": []})
            each["new"].append(accuracy(model, test[asked], labels[asked]))
            each["old"].append(accuracy(model, test[known], labels[known]))
            model.forget(own[:count])
    before = classifier(x, y, ids, ids[: len(ids) // 2], classes, balance=balance)
    found["all"] = {
        "new": [accuracy(before, test[labels == label], labels[labels == label]) for label in new.tolist()],
        "old": [accuracy(before, test[known], labels[known])],
    }
    return found


def main() -> None:
    """All files and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of examples/embed.py")
    parser.add_argument("--classes", type=int, default=3, help="number of new classes, one after another")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("new_classes.json"))
    args = parser.parse_args()
    found = {}
    for path in args.data:
        for balance in (0.0, 0.5, 1.0):
            runs = [learn_on(path, args.classes, balance, seed) for seed in range(args.seeds)]
            found[f"{path.stem}, balance {balance:g}"] = {
                count: {what: statistics.mean(v for run in runs for v in run[count][what]) for what in ("new", "old")}
                for count in runs[0]
            }
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

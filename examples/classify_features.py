"""Classify features of a frozen network, and forget some instances to the bit; nothing is trained.

    python examples/embed.py --data photographs/ --out features.npz
    python examples/classify_features.py --data features.npz

A share of the instances is permanent: the whitening of keys and two weights are fitted to them. All others can be
forgotten, and the last lines check it: a classifier that never had them gives the same bits. Everything is here: copy
it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor
from torch.nn import functional as F

from munkey import Identity, KeyMemoryTransformer, Projection
from treediff.data import load_dataset


def classifier(x: Tensor, y: Tensor, ids: Tensor, fixed: Tensor, classes: int) -> KeyMemoryTransformer:
    """A classifier that remembers instances; those of `fixed` are permanent."""
    rest = ids[~torch.isin(ids, fixed)]
    encoder = (
        Projection.whitening(x[fixed], y[fixed], fitted_on="permanent split") if len(fixed) else Identity(x.shape[1])
    )
    model = KeyMemoryTransformer.for_features(features=x.shape[1], classes=classes, key_encoder=encoder)
    if len(fixed):
        model.remember(fixed, x[fixed], y[fixed], permanent=True)
        model.fit_readout(x[fixed], y[fixed], ids=fixed)
    model.remember(rest, x[rest], y[rest])
    return model


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/features"), help="folder for results")
    args = parser.parse_args()
    data = load_dataset(args.data)
    if data.train_labels is None or data.test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for training and test, found none")
    x, test = data.train_images.flatten(1), data.test_images.flatten(1)
    y, classes = data.train_labels, 1 + int(torch.cat([data.train_labels, data.test_labels]).max())
    ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
    fixed, rest = ids[: int(args.permanent * len(ids))], ids[int(args.permanent * len(ids)) :]
    start = time.perf_counter()
    model = classifier(x, y, ids, fixed, classes)
    before = model(test)
    seconds = time.perf_counter() - start
    gone = rest[: max(1, int(args.forget * len(rest)))]
    start = time.perf_counter()
    receipt = model.forget(gone)
    to_forget = time.perf_counter() - start
    start = time.perf_counter()
    after = model(test)
    to_answer = time.perf_counter() - start
    never = classifier(x, y, ids[~torch.isin(ids, gone)], fixed, classes)
    result = {
        "data": data.name,
        "seed": args.seed,
        "instances": len(ids),
        "features": x.shape[1],
        "readout": repr(model.readout).splitlines()[1].strip(),
        "seconds to remember and answer": seconds,
        "before": scores(before, data.test_labels),
        "forgotten": len(receipt.forgotten),
        "seconds to forget": to_forget,
        "seconds to answer after": to_answer,
        "after": scores(after, data.test_labels),
        "equal to never": torch.equal(after, never(test)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / "model.safetensors")
    (args.out / "results.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

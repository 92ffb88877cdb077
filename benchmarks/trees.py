"""Trees of features beside every simpler way to cluster the same features.

    python examples/embed.py --data photographs.npz --out features.npz
    python benchmarks/trees.py --data features.npz --out trees.json

Features are projected on their principal components, which are those of the training rows, and scaled to one length
(`--no-unit-length` for measurements, where length means something). All methods have as many clusters as there are
classes, learn from the training rows, and are measured on the test rows; labels serve to measure alone. The tree of
k-means, of the mixture and of the TEMI head is that of L2H, a test row belongs to the cluster nearest to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from temi import temi
from torch import Tensor, nn
from treevae_vectors import fit, scores, ward

from treediff import TreeVAE
from treediff.data import load_dataset
from treediff.growth import logits_to_hierarchy
from treediff.growth.growth import LEARNING
from treediff.layers import PrincipalComponents, UnitLength

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from train_photographs import growth_of

Splits = tuple[Tensor, Tensor]


def components(source: str, args: argparse.Namespace) -> tuple[Splits, Tensor, int]:
    """Components of both splits, labels of the second, and the number of classes."""
    data = load_dataset(source)
    images, labels, test, targets = data.train_images, data.train_labels, data.test_images, data.test_labels
    assert labels is not None and targets is not None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
    if args.holdout:
        test, targets = images.select(order[: args.holdout]), labels[order[: args.holdout]]
    train = images[order[args.holdout :][: args.rows]].flatten(1)
    project = PrincipalComponents.fit(train, min(args.components, train.shape[1]))
    features = nn.Sequential(project, UnitLength() if args.unit_length else nn.Identity())
    return (features(train), features(test[:].flatten(1))), targets, 1 + int(targets.max())


def k_means(x: Splits, clusters: int, seed: int) -> tuple[Tensor, dict[int, int | None]]:
    """Clusters of the test rows, and the tree that L2H makes of the distances."""
    model = KMeans(clusters, n_init=10, random_state=seed).fit(x[0].double().numpy())
    distances = [torch.from_numpy(model.transform(split.double().numpy())).square() for split in x]
    logits = -distances[0] / (2 * distances[0].amin(1).mean() / x[0].shape[1])  # of Gaussians of the mean variance
    return distances[1].argmin(1), dict(logits_to_hierarchy(logits).parents)


def mixture(x: Splits, clusters: int, seed: int) -> tuple[Tensor, dict[int, int | None]]:
    """Clusters of the test rows by a mixture of Gaussians, and the tree of its posterior."""
    model = GaussianMixture(clusters, n_init=2, reg_covar=1e-3, random_state=seed).fit(x[0].double().numpy())
    logits = torch.from_numpy(np.log(model.predict_proba(x[0].double().numpy()).clip(1e-300)))
    return torch.from_numpy(model.predict(x[1].double().numpy())), dict(logits_to_hierarchy(logits).parents)


def head(x: Splits, clusters: int, seed: int, steps: int) -> tuple[Tensor, dict[int, int | None]]:
    """Clusters of the test rows by a head that was trained to agree on neighbours, and the tree of what it says."""
    model = temi(x[0], clusters, seed=seed, steps=steps)
    with torch.no_grad():
        logits = [model(split)[0] for split in x]
    return logits[1].argmax(1), dict(logits_to_hierarchy(logits[0]).parents)


def tree(x: Splits, clusters: int, seed: int, args: argparse.Namespace) -> tuple[Tensor, dict[int, int | None]]:
    """A TreeVAE, grown on the components."""
    generator = torch.Generator().manual_seed(seed)
    model = TreeVAE.for_vectors(
        features=x[0].shape[1], latent=args.latent, max_depth=args.max_depth, generator=generator
    )
    settings = {name: getattr(args, name) for name in ("effort", "cut_share", "cut_neighbours", "keep_cuts")}
    growth = growth_of(model, len(x[0]), leaves=clusters, seed=seed, **settings)
    fit(growth, x[0], args, f"seed {seed}")
    return model.cluster(x[1]), dict(model.topology.parents)


def compare(name: str, x: Splits, labels: Tensor, classes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All methods from all seeds."""
    found = []

    def measure(method: str, seed: int | None, start: float, made: tuple[Tensor, dict[int, int | None]]) -> None:
        row = {"data": name, "method": method, "seed": seed, "seconds": time.perf_counter() - start}
        found.append(row | scores(labels, *made))
        print(json.dumps(found[-1]), flush=True)

    if "ward" in args.methods:
        start = time.perf_counter()
        measure("ward", None, start, ward(x[0][: args.ward_rows], x[1], classes))
    for seed in args.seeds:
        start = time.perf_counter()
        if "k-means" in args.methods:
            measure("k-means + l2h", seed, start, k_means(x, classes, seed))
        start = time.perf_counter()
        if "mixture" in args.methods:
            measure("mixture + l2h", seed, start, mixture(x, classes, seed))
        start = time.perf_counter()
        if "temi" in args.methods:
            measure("temi + l2h", seed, start, head(x, classes, seed, args.temi_steps))
        start = time.perf_counter()
        if "tree" in args.methods:
            measure("treevae", seed, start, tree(x, classes, seed, args))
    return found


def main() -> None:
    """Read the features, compare on each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["digits"], help="names, or files of features or images")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--unit-length", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rows", type=int, help="use so many training rows only")
    parser.add_argument("--holdout", type=int, default=0, help="measure on so many training rows, which are left out")
    parser.add_argument("--ward-rows", type=int, default=10_000, help="rows of Ward's tree, as its memory is quadratic")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["ward", "k-means", "mixture", "temi", "tree"])
    parser.add_argument("--temi-steps", type=int, default=3000)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--cut-share", type=float, default=0.2)
    parser.add_argument("--cut-neighbours", type=int, default=30)
    parser.add_argument("--max-depth", type=int, default=12)
    parser.add_argument("--keep-cuts", default="always", choices=LEARNING)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    rows = []
    for source in args.data:
        x, labels, classes = components(source, args)
        rows += compare(Path(source).stem, x, labels, classes, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out")}
    result = json.dumps({"settings": settings, "rows": rows})
    print(result)
    if args.out:
        args.out.write_text(result)


if __name__ == "__main__":
    main()

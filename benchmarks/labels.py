"""Images of the second stage's network under class labels, and under no condition at all.

    python benchmarks/labels.py --data photographs.npz --epochs 10 --out labels.json
    python benchmarks/labels.py --data photographs.npz --epochs 10 --labels none --out nothing.json

What a tree of clusters is to be compared with: the same U-Net, trained as often on the same images as that of
`train_photographs.py`. Fréchet distances are taken in the features of EfficientNet-Lite0; lower is better.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treediff import LeafConditionedDDPM, TreeTopology
from treediff.core.cpu import has_fast
from treediff.core.distributed import ALONE
from treediff.data import load_dataset
from treediff.diffusion import TreeCondition
from treediff.metrics import FeatureStatistics, frechet_bootstrap, frechet_distance

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from evaluate_generation import efficientnet, in_batches
from train_diffusion import settings_of, train


def one_leaf_for_each(classes: int) -> TreeTopology:
    """A tree with a leaf for each class, as even as can be; its inner nodes mean nothing."""
    tree = TreeTopology.balanced(0)
    while len(tree.leaves) < classes:
        tree = tree.split(min(tree.leaves, key=lambda leaf: (tree.depth(leaf), leaf)))
    return tree


def network_for(
    shape: tuple[int, ...], topology: TreeTopology, args: argparse.Namespace, generator: torch.Generator
) -> LeafConditionedDDPM:
    """The network of `train_photographs.py`, for conditions that are nodes."""
    settings: dict[str, Any] = {name: getattr(args, name) for name in ("width", "blocks", "patch")}
    model: LeafConditionedDDPM = LeafConditionedDDPM.for_images(
        size=(shape[1], shape[2]),
        channels=shape[0],
        latent=(1,),
        topology=topology,
        condition="node",
        coarsen=0.2 if args.labels == "classes" else 0.0,
        generator=generator,
        **settings,
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    return model


def main() -> None:
    """Train, draw, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz file, or a folder, with labels")
    parser.add_argument("--labels", default="classes", choices=["classes", "none"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--patch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--holdout", type=int, default=0, help="compare with the last training images instead")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--out", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    file, args.out, args.resume, args.save_every = args.out, args.out.parent, False, 1e9
    args.ema, args.float32, args.mirror = 0.999, False, True

    data = load_dataset(args.data)
    images = data.train_images.select(slice(len(data.train_images) - args.holdout))
    real = data.train_images[-args.holdout :] if args.holdout else data.test_images[:]
    assert data.train_labels is not None
    topology = one_leaf_for_each(1 + int(data.train_labels.max()) if args.labels == "classes" else 2)
    leaves = torch.tensor(topology.leaves)
    places = leaves[data.train_labels] if args.labels == "classes" else torch.zeros_like(data.train_labels)
    generator = torch.Generator().manual_seed(args.seed)
    model = network_for(tuple(images.shape[1:]), topology, args, generator)

    start = time.perf_counter()
    ema = train(model, images, lambda rows, x, generator: TreeCondition.at(places[rows]), args, ALONE)
    seconds = time.perf_counter() - start
    drawn_of = places[torch.randint(len(images), (args.samples,), generator=generator)]  # as common as in the data

    def sample(rows: Tensor) -> Tensor:
        seed = torch.Generator().manual_seed(args.seed)
        condition = TreeCondition.at(drawn_of[rows])
        drawn: Tensor = model.sample(condition, steps=args.steps, first_index=int(rows[0]), generator=seed)
        return drawn.float()

    with ema.average(), torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
            drawn = torch.cat(in_batches(sample, args.samples, 250, "generate"))
        network = efficientnet()
        seen, found = (torch.cat([network(part) for part in x.split(500)]) for x in (real, drawn))
        target = FeatureStatistics.of(seen)
    result = {
        "distance": frechet_distance(target, found),
        "interval": frechet_bootstrap(target, found, rounds=50, generator=generator),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": seconds,
    }
    line = json.dumps({"data": data.name, **settings_of(args), **result})
    file.write_text(line)
    print(line)


if __name__ == "__main__":
    main()

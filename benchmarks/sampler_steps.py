"""Fréchet distance over network calls for each sampler, from the same noise and the same places in the tree.

    python benchmarks/sampler_steps.py --data fashion-mnist --model examples/models/fashion-mnist.safetensors \
        --classifier runs/fashion-classifier/classifier.safetensors --out docs/results/sampler_steps.json

A row is `sampler:steps:grid`. Image `i` of every row starts from the same latents and the same noise. Intervals are
from `frechet_bootstrap`, over the random draw of images. Distances are to the test images, or with
`--holdout` to the last training images, in the features of the classifier. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from treediff import DiffuseTreeVAE
from treediff.core.cpu import has_fast
from treediff.data import load_dataset
from treediff.diffusion import DDIMSampler, DDPMSampler, DPMSolverSampler, HeunSampler, Sampler
from treediff.metrics import FeatureClassifier, FeatureStatistics, frechet_bootstrap, frechet_distance
from treediff.pipeline.conditions import condition_of

SAMPLERS: dict[str, Sampler] = {
    "dpm-solver": DPMSolverSampler(),
    "sde-dpm-solver": DPMSolverSampler(eta=1.0),
    "ddim": DDIMSampler(),
    "heun": HeunSampler(),
    "ddpm": DDPMSampler("small"),
    "ddpm-large": DDPMSampler("large"),
}
ROWS = [f"dpm-solver:{steps}:karras" for steps in (8, 12, 16, 20, 40)]
ROWS += [f"dpm-solver:{steps}:uniform" for steps in (8, 12, 16, 20)]
ROWS += ["sde-dpm-solver:20:karras", "sde-dpm-solver:40:karras", "heun:5:karras", "heun:10:karras", "heun:20:karras"]
ROWS += ["ddim:10:uniform", "ddim:20:uniform", "ddim:50:uniform", "ddpm:50:uniform", "ddpm-large:50:uniform"]
ROWS += ["ddpm:200:uniform", "ddpm:1000:uniform"]


def row(
    name: str, model: DiffuseTreeVAE, classifier: FeatureClassifier, real: FeatureStatistics, args: argparse.Namespace
) -> dict[str, Any]:
    """One sampler at one number of steps."""
    kind, count, grid = name.split(":")
    sampler, steps = SAMPLERS[kind], int(count)
    features, seconds = [], 0.0
    for rows in tqdm(torch.arange(args.samples).split(args.batch_size), desc=name, mininterval=1.0):
        seed = torch.Generator().manual_seed(args.seed)
        settings = {"sampler": sampler, "steps": steps, "grid": grid, "guidance": args.guidance, "generator": seed}
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
            drawn = model.generate(len(rows), first_index=int(rows[0]), **settings)
        seconds += time.perf_counter() - start
        features.append(classifier.features_of(drawn.images.float()))
    found = torch.cat(features)
    low, high = frechet_bootstrap(real, found, rounds=100, generator=torch.Generator().manual_seed(args.seed))
    return {
        "sampler": kind,
        "steps": steps,
        "grid": grid,
        "calls": sampler.calls(steps),
        "distance": frechet_distance(real, found),
        "low": low,
        "high": high,
        "seconds": seconds,
    }


@torch.no_grad()
def gflop(model: DiffuseTreeVAE) -> float:
    """Floating-point operations of the network for one image, in 1e9."""
    x = torch.zeros(1, *model.tree_vae.inputs)
    with FlopCounterMode(display=False) as counter:
        model.ddpm(x, torch.ones(1), condition_of(model.tree_vae, x))
    return float(counter.get_total_flops()) / 1e9


def main() -> None:
    """One row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--model", type=Path, required=True, help="a saved pair")
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="SAMPLER:STEPS:GRID")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--holdout", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    data = load_dataset(args.data)
    images = data.train_images[-args.holdout :] if args.holdout else data.test_images[:]
    model, classifier = DiffuseTreeVAE.load(args.model).eval(), FeatureClassifier.load(args.classifier).eval()
    model.ddpm.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    with torch.no_grad():
        real = FeatureStatistics.of(torch.cat([classifier.features_of(x) for x in images.split(500)]))
        rows = []
        for name in args.rows:
            rows.append(row(name, model, classifier, real, args))
            print(json.dumps(rows[-1]), flush=True)
            about = {"samples": args.samples, "guidance": args.guidance, "seed": args.seed}
            result = json.dumps({"data": data.name, "gflop": gflop(model), **about, "rows": rows})
            if args.out:
                args.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()

"""Time a step of training on photographs: a tree of features and its second stage, beside a tree of images.

    python benchmarks/photographs_step.py --out docs/results/photographs_step.json

*Before* is a TreeVAE with residual networks that observes the images, and the second stage with its default settings.
*Now* is a TreeVAE that observes features, and a second stage of patches, as in `train_photographs.py`. Features are
computed once for all epochs, so they are no part of a step. All run alternately in one process; times are medians,
ratios are medians over the rounds. The roofline is the time that all multiplications of a step would take at the rate
of a large convolution in bfloat16, which is measured in the same rounds. Run nothing else at the same time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from treevae_step import ratio, step, take_turns, whole_tree

from treediff import LeafConditionedDDPM, TreeTopology, TreeVAE
from treediff.core.cpu import has_fast
from treediff.pipeline.conditions import condition_of


def decided(tree: TreeVAE) -> TreeVAE:
    """The tree, with routers that send each image one way, as trained routers do."""
    for bank in (tree.banks.posterior_routers, tree.banks.prior_routers):
        for node in bank.nodes:
            bank.weights_of(node).data.mul_(100.0)
    return tree


def ddpm_step(ddpm: LeafConditionedDDPM, tree: TreeVAE, images: Tensor, observed: Tensor) -> Callable[[], None]:
    """A step of the second stage under the posterior of the frozen tree."""
    ddpm.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]

    def loss(x: Tensor) -> Tensor:
        condition = condition_of(tree, observed, decode=observed is images)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
            return ddpm.loss(x, condition)

    return step(ddpm.parameters(), loss, [images])


def convolution(batch: int, size: int) -> Callable[[], None]:
    """Forward and backward of a convolution from 128 to 128 channels: what the machine can do."""
    conv = nn.Conv2d(128, 128, 3, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
    x = torch.randn(batch, 128, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x.requires_grad_()
    return lambda: conv(x).sum().backward()


def gflop(run: Callable[[], object]) -> float:
    """Floating-point operations of one call, in 1e9; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def main() -> None:
    """Build both ways, take turns, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3, help="of the tree; 3 for eight leaves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    topology, size, batch = TreeTopology.balanced(args.depth), args.size, args.batch_size
    images, observed = torch.rand(batch, 3, size, size), torch.randn(batch, 64)
    image_tree = decided(
        TreeVAE.for_images(
            size=size, channels=3, network="residual", likelihood="gaussian", latent=64, width=32, topology=topology
        )
    )
    tree = decided(TreeVAE.for_vectors(features=64, latent=8, topology=topology))
    before = LeafConditionedDDPM.for_tree(image_tree)
    now = LeafConditionedDDPM.for_tree(tree, size=size, channels=3, width=32, blocks=1, patch=2)
    tasks = {
        "tree, before": step(image_tree.parameters(), whole_tree(image_tree).loss, [images]),
        "tree, now": step(tree.parameters(), whole_tree(tree).loss, [observed]),
        "second stage, before": ddpm_step(before, image_tree, images, images),
        "second stage, now": ddpm_step(now, tree, images, observed),
        "convolution": convolution(batch, size // 2),
    }
    operations = {name: gflop(task) for name, task in tasks.items()}
    times = take_turns(tasks, args.rounds, calls=1)
    medians = {name: statistics.median(found) for name, found in times.items()}
    rates = {name: operations[name] / medians[name] for name in tasks}
    sums = {
        when: [a + b for a, b in zip(times[f"tree, {when}"], times[f"second stage, {when}"], strict=True)]
        for when in ("before", "now")
    }
    result: dict[str, Any] = {
        "size": size,
        "batch": batch,
        "leaves": len(topology.leaves),
        "threads": torch.get_num_threads(),
        "milliseconds": medians,
        "gflop": operations,
        "gflop per second of a convolution": 1e3 * rates["convolution"],
        "share of the roofline": {name: rate / rates["convolution"] for name, rate in rates.items()},
        "times faster": ratio(sums["before"], sums["now"]),
        "times faster, tree": ratio(times["tree, before"], times["tree, now"]),
        "times faster, second stage": ratio(times["second stage, before"], times["second stage, now"]),
        "parameters": {
            "before": sum(p.numel() for p in before.parameters()),
            "now": sum(p.numel() for p in now.parameters()),
        },
    }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

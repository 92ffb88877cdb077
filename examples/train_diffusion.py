"""Train the second stage on top of a saved TreeVAE: a diffusion model that draws sharp images of every cluster.

    python examples/train_treevae.py                                    # first grow the tree
    python examples/train_diffusion.py                                  # real handwritten digits, three minutes
    python examples/train_diffusion.py --tree examples/trees/fashion-mnist.safetensors --data fashion-mnist \
        --out runs/fashion-diffusion --epochs 12
    torchrun --nproc-per-node 2 examples/train_diffusion.py             # on two processes
    python examples/train_diffusion.py --resume                         # resumes an interrupted run

Everything is here: copy it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from treediff import EMA, DiffuseTreeVAE, LeafConditionedDDPM, LeafDensity, TreeVAE
from treediff.core.checkpoint import read_checkpoint, save_checkpoint
from treediff.core.cpu import has_fast
from treediff.core.distributed import World, data_parallel, start
from treediff.core.noise import combine_seeds
from treediff.data import ImageDataset, Rows, load_dataset
from treediff.diffusion import TreeCondition
from treediff.pictures import draw_tree, summarize_tree, write_html
from treediff.treevae.prior import TreeSample

Conditions = Callable[[Tensor, Tensor, torch.Generator], TreeCondition]  # of row numbers, and of the images there


def train(
    model: DiffuseTreeVAE | LeafConditionedDDPM,
    images: Rows,
    conditions: Conditions,
    args: argparse.Namespace,
    world: World,
) -> EMA:
    """A plain PyTorch loop over the second stage, with a checkpoint between two epochs; the first stage is frozen.

    `model` is the pair, or the second stage alone.
    """
    ddpm = model.ddpm if isinstance(model, DiffuseTreeVAE) else model
    steps, path = -(-len(images) // args.batch_size), args.out / "checkpoint.safetensors"
    optimizer = torch.optim.Adam(ddpm.parameters(), lr=args.learning_rate, fused=True)
    total = args.epochs * steps + 1
    rise = max(0.05, 1.5 / total)  # OneCycleLR divides by zero if that is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=total, pct_start=rise)
    ema = EMA(ddpm, decay=args.ema)
    loss_of = data_parallel(ddpm.loss, ddpm)
    parts = {"settings": settings_of(args), "images": len(images), "model": model}
    parts |= {"optimizer": optimizer, "schedule": schedule, "ema": ema}
    first = 0
    if args.resume:
        saved = read_checkpoint(path)
        first = saved["epoch"]
        saved.fill(parts | {"epoch": first})
    bar = tqdm(total=args.epochs * steps, initial=first * steps, disable=args.quiet or not world.first)
    written, running = time.monotonic(), 0.0
    for epoch in range(first, args.epochs):
        # A seed for each epoch: a resumed run draws the same as an uninterrupted run.
        order = torch.Generator().manual_seed(combine_seeds(args.seed, epoch))
        generator = world.own(order)
        torch.manual_seed(combine_seeds(args.seed, epoch, world.rank))  # of dropout
        for rows in torch.randperm(len(images), generator=order).split(args.batch_size):
            rows = world.share(rows)
            x = images[rows]
            condition = conditions(rows, x, generator)
            if args.mirror:
                x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16) and not args.float32):
                loss = loss_of(x, condition, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(ddpm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.update()
            running += 0.01 * (loss.item() - running) if running else loss.item()
            bar.update()
            bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if world.first and time.monotonic() - written >= args.save_every:
            save_checkpoint(path, parts | {"epoch": epoch + 1})
            written = time.monotonic()
    bar.close()
    return ema


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that decide the result of a run."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("out", "tree", "resume", "save_every", "quiet")
    }


def build(tree: TreeVAE, args: argparse.Namespace) -> DiffuseTreeVAE:
    """The pair; weights of the second stage come from the seed."""
    settings: dict[str, Any] = {
        "condition": args.condition,
        "condition_noise": args.condition_noise,
        "width": args.width,
        "blocks": args.blocks,
        "dropout": args.dropout,
        "patch": args.patch,
    }
    ddpm = LeafConditionedDDPM.for_tree(tree, generator=torch.Generator().manual_seed(args.seed), **settings)
    # About a tenth faster on a CPU in bfloat16.
    return DiffuseTreeVAE(tree, ddpm.to(memory_format=torch.channels_last))  # type: ignore[call-overload, unused-ignore]


def picture(model: DiffuseTreeVAE, data: ImageDataset, out: Path, seed: int) -> None:
    """The tree with samples and refined samples at every node, as a PNG and as a page to click through."""

    def refine(sample: TreeSample) -> Tensor:
        condition = model.condition_of_sample(sample)
        return model.ddpm.sample(condition, generator=torch.Generator().manual_seed(seed))

    summary = summarize_tree(
        model.tree_vae,
        data.train_images,
        data.train_labels,
        class_names=data.class_names,
        generator=torch.Generator().manual_seed(seed),
        observe=None if model.features is None else model.observe,
        refine=refine,
    )
    draw_tree(summary, out / "tree.png")
    write_html(summary, out / "tree.html", title=f"{data.name}: a tree of clusters")


@torch.no_grad()
def gflop(model: DiffuseTreeVAE) -> float:
    """Floating-point operations of the network for one image, in 1e9; a multiplication and an addition are two."""
    x = torch.zeros(1, model.ddpm.unet.out_channels, *model.ddpm.unet.size)
    condition = model.condition_of(x)
    with FlopCounterMode(display=False) as counter:
        model.ddpm(x, torch.ones(1), condition)
    return counter.get_total_flops() / 1e9


def main() -> None:
    """Read tree and data, train, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--tree", type=Path, default=Path("runs/treevae/model.safetensors"), help="a saved TreeVAE")
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="by default as many as take a few minutes on the digits")
    parser.add_argument("--condition", default="diffuse_tree_vae", help="what the network is conditioned on")
    parser.add_argument("--condition-noise", type=float, default=0.0, help="greatest noise on the tree's image")
    parser.add_argument("--prior-share", type=float, default=0.0, help="share of images with latents of the prior")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--patch", type=int, default=1, help="side of the patches of pixels that the network reads")
    parser.add_argument("--mirror", action="store_true", help="train on mirror images too, for photographs")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--float32", action="store_true", help="do not multiply in bfloat16")
    parser.add_argument("--holdout", type=int, default=0, help="leave out the last so many training images")
    parser.add_argument("--quick", action="store_true", help="one epoch, to see that it runs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--resume", action="store_true", help="resume the interrupted run in --out")
    parser.add_argument("--save-every", type=float, default=30.0, help="least seconds between two checkpoints")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    world = start()
    if not args.tree.exists():
        raise SystemExit(f"there is no tree at {args.tree}; grow one with examples/train_treevae.py, or pass --tree")

    data = load_dataset(args.data, size=args.size)
    images = data.train_images.select(slice(len(data.train_images) - args.holdout))
    args.epochs = args.epochs or (1 if args.quick else max(1, 120_000 // len(images)))
    model = build(TreeVAE.load(args.tree).eval(), args)

    def conditions(rows: Tensor, x: Tensor, generator: torch.Generator) -> TreeCondition:
        return model.condition_of(x, prior_share=args.prior_share, generator=generator)

    start_time = time.perf_counter()
    model.density = LeafDensity.fit(model.tree_vae, images, generator=torch.Generator().manual_seed(args.seed))
    ema = train(model, images, conditions, args, world)
    seconds = time.perf_counter() - start_time
    if not world.first:
        return
    model.eval()
    with ema.average():
        model.save(args.out / "model.safetensors")
        (args.out / "checkpoint.safetensors").unlink(missing_ok=True)
        picture(model, data, args.out, args.seed)
    parameters = sum(weight.numel() for weight in model.ddpm.parameters())
    about = {"data": data.name, "seconds": seconds, "parameters": parameters, "gflop": gflop(model)}
    result = settings_of(args) | about
    (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

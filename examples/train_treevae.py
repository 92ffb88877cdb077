"""Grow a TreeVAE on custom images, or on one of the named data sets.

    python examples/train_treevae.py                                    # real handwritten digits, three minutes
    python examples/train_treevae.py --data fashion-mnist --out runs/fashion
    python examples/train_treevae.py --data images/ --out runs/mine     # a folder per class, an .npz, or IDX files
    torchrun --nproc-per-node 2 examples/train_treevae.py               # on two processes, here or on two machines
    python examples/train_treevae.py --resume                           # resumes an interrupted run

Everything is here: copy it and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import kornia.augmentation as kornia
import torch
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn
from tqdm import tqdm

from treediff import Stage, TreeContrast, TreeGrowth, TreeTopology, TreeVAE
from treediff.augment import Augment, cifar_augment
from treediff.core.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from treediff.core.distributed import World, data_parallel, start
from treediff.core.noise import combine_seeds
from treediff.data import ImageDataset, Rows, load_dataset
from treediff.growth.growth import LEARNING
from treediff.layers import Deskew, GradientHistograms
from treediff.metrics import (
    cluster_accuracy,
    dendrogram_purity,
    effective_leaves,
    leaf_perplexity,
    leaf_purity,
)
from treediff.pictures import draw_tree, summarize_tree, write_html

#: What else cuts compare than the images or the model's features: shapes, for handwriting made upright before.
CUT_ON = {"gradients": GradientHistograms(), "upright": nn.Sequential(Deskew(), GradientHistograms())}


def train(
    stage: Stage,
    images: Rows,
    args: argparse.Namespace,
    augment: Augment | None,
    contrast: TreeContrast | None,
    world: World,
    parts: dict[str, Any],
    saved: Checkpoint | None,
) -> None:
    """One stage of growth: a plain PyTorch loop, with a checkpoint between two epochs."""
    batch_size = args.batch_size
    steps = -(-len(stage.rows) // batch_size)
    parameters = [*stage.parameters(), *(contrast.parameters() if contrast else ())]
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, fused=True)
    total = stage.epochs * steps + 1
    rise = max(0.1, 1.5 / total)  # OneCycleLR divides by zero if that is one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=total, pct_start=rise)
    loss_of = data_parallel(stage.loss, *[stage.model, *([contrast] if contrast else [])], unused=True)
    parts = parts | {"rows": stage.rows, "topology": stage.model.topology.to_json()}
    parts |= {"optimizer": optimizer, "schedule": schedule}
    first = 0 if saved is None else saved["epoch"]
    if saved is not None:
        saved.fill(parts | {"epoch": first})
    name = f"{stage.index} {stage.kind}{''.join(f' {node}' for node in stage.splits)}"
    bar = tqdm(total=stage.epochs * steps, initial=first * steps, desc=name, disable=args.quiet or not world.first)
    written = time.monotonic()
    for epoch in range(first, stage.epochs):
        # A seed for each epoch: a resumed run draws the same as an uninterrupted run.
        generator = world.own(torch.Generator().manual_seed(combine_seeds(args.seed, stage.index, epoch)))
        for step, rows in enumerate(stage.batches(epoch, batch_size)):
            x = images[world.share(rows)]
            view = None if contrast is None or augment is None else augment(x, generator=generator)
            weight = stage.kl_weight(epoch + step / steps)
            loss = loss_of(x, weight, view=view, contrast=contrast, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.4g}")
        if world.first and time.monotonic() - written >= args.save_every:
            save_checkpoint(args.out / "checkpoint.safetensors", parts | {"epoch": epoch + 1})
            written = time.monotonic()
    bar.close()


@torch.no_grad()
def evaluate(model: TreeVAE, images: Rows, labels: Tensor | None, seed: int) -> dict[str, float]:
    """Bounds, and clustering against labels if there are any, on images that the model was not trained on."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.cat([model.leaf_log_probs(x).exp() for x in images.split(1000)])
    elbo = torch.cat([model.elbo(x, generator=generator).elbo for x in images.split(1000)])
    result = {
        "elbo": elbo.mean().item(),
        "effective_leaves": effective_leaves(probs),
        "leaves_per_image": leaf_perplexity(probs),
    }
    if labels is not None:
        leaf = torch.tensor(model.topology.leaves)[probs.argmax(1)]
        result |= {
            "accuracy": cluster_accuracy(labels, leaf),
            "nmi": float(normalized_mutual_info_score(labels, leaf)),
            "ari": float(adjusted_rand_score(labels, leaf)),
            "dendrogram_purity": dendrogram_purity(labels, leaf, model.topology.parents),
            "leaf_purity": leaf_purity(labels, leaf),
        }
    return result


def picture(model: TreeVAE, data: ImageDataset, out: Path, seed: int) -> None:
    """The tree as a PNG and as a page to click through."""
    summary = summarize_tree(
        model,
        data.train_images,
        data.train_labels,
        class_names=data.class_names,
        generator=torch.Generator().manual_seed(seed),
    )
    draw_tree(summary, out / "tree.png")
    write_html(summary, out / "tree.html", title=f"{data.name}: a tree of clusters")


def hold_out(data: ImageDataset, rows: int) -> ImageDataset:
    """The last training images in place of the test images, to choose settings without the test images."""
    if not rows:
        return data
    labels = data.train_labels
    return dataclasses.replace(
        data,
        train_images=data.train_images.select(slice(-rows)),
        train_labels=None if labels is None else labels[:-rows],
        test_images=data.train_images.select(slice(-rows, None)),
        test_labels=None if labels is None else labels[-rows:],
    )


def schedule(rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Epochs of each kind of stage; more where an epoch has few steps."""
    effort = (0.2 if args.quick else args.effort) * max(1, min(10, 15_000 // rows))
    epochs = {"initial": 12, "settle": 3, "intermediate": 3, "final": 25}
    named = {f"{kind}_epochs": max(1, round(effort * n)) for kind, n in epochs.items()}
    return {**named, "subtree_epochs": 0, "intermediate_every": 2}


def main() -> None:
    """Read the data, grow the tree, measure it, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--out", type=Path, default=Path("runs/treevae"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leaves", type=int, default=10)
    parser.add_argument("--effort", type=float, default=1.0, help="factor on the epochs of every stage")
    parser.add_argument("--contrastive", type=float, default=0.0, metavar="WEIGHT", help="100 in TreeVAE, for colour")
    parser.add_argument("--decisions", type=float, default=0.0, metavar="WEIGHT", help="contrastive weight of routers")
    parser.add_argument(
        "--cut-on", default="inputs", choices=["inputs", "features", *CUT_ON], help="where leaves are split"
    )
    parser.add_argument(
        "--keep-cuts", default="never", choices=LEARNING, help="how long clusters stay as they were cut"
    )
    parser.add_argument("--views", type=int, default=8, help="changed copies of each image that a split compares")
    parser.add_argument("--cut-share", type=float, default=0.05, help="least share of the smaller side of a split")
    parser.add_argument("--cut-neighbours", type=int, default=10, help="that each image is joined to in a split")
    parser.add_argument("--random-start", action="store_true", help="leaves start at random, not as copies")
    parser.add_argument("--network", default="conv", choices=["conv", "mlp", "residual"])
    parser.add_argument("--likelihood", default="bernoulli", choices=["bernoulli", "gaussian", "gaussian_learned"])
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--holdout", type=int, default=0, help="measure on the last so many training images instead")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="resume the interrupted run in --out")
    parser.add_argument("--save-every", type=float, default=30.0, help="least seconds between two checkpoints")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    world = start()

    data = hold_out(load_dataset(args.data, size=args.size), args.holdout)
    images = data.train_images
    channels, *size = images.shape[1:]
    generator = torch.Generator().manual_seed(args.seed)
    model = TreeVAE.for_images(
        size=(size[0], size[1]),
        channels=channels,
        network=args.network,
        likelihood=args.likelihood,
        latent=args.latent,
        width=args.width,
        generator=generator,
    )
    moved = kornia.RandomAffine(10.0, (0.07, 0.07), shear=10.0, p=1.0)
    augment = cifar_augment((size[0], size[1])) if channels == 3 else Augment(moved)
    growth = TreeGrowth(
        model,
        max_leaves=args.leaves,
        cut_on=CUT_ON.get(args.cut_on, args.cut_on),
        augment=augment if args.views else None,
        views=args.views or 1,
        cut_share=args.cut_share,
        cut_neighbours=args.cut_neighbours,
        keep_cuts=args.keep_cuts,
        warm_start=not args.random_start,
        seed=args.seed,
        world=world,
        **schedule(len(images), args),
    )
    contrast = None
    if args.contrastive or args.decisions:
        contrast = TreeContrast(
            model, weight=args.contrastive, decision_weight=args.decisions, hidden=128, generator=generator, world=world
        )
    settings = {
        name: value for name, value in vars(args).items() if name not in ("out", "resume", "save_every", "quiet")
    }
    parts = {"settings": settings, "images": len(images), "model": model, "growth": growth}
    parts |= {} if contrast is None else {"contrast": contrast}
    start_time, checkpoint = time.perf_counter(), args.out / "checkpoint.safetensors"
    saved = read_checkpoint(checkpoint) if args.resume else None
    if saved is not None:  # the stage that was interrupted; its weights are filled in when it trains
        model.become(TreeTopology.from_json(saved["topology"]))
        growth.load_state_dict(saved["growth"])
    for stage in growth.stages(images, again=None if saved is None else saved["rows"]):
        # The last stage is for the bound alone; while children settle neither features nor posterior routers train.
        idle = stage.kind in ("settle", "final") or (stage.splits and not args.decisions)
        train(stage, images, args, augment, None if idle else contrast, world, parts, saved)
        saved = None
    seconds = time.perf_counter() - start_time
    if not world.first:
        return
    model.eval()
    model.save(args.out / "model.safetensors")
    checkpoint.unlink(missing_ok=True)
    picture(model, data, args.out, args.seed)
    result = evaluate(model, data.test_images, data.test_labels, args.seed)
    for name, value in result.items():
        print(f"{name:20s} {value:10.3f}")
    about = settings | {"data": data.name, "seconds": seconds, "tree": model.topology.to_json()}
    (args.out / "results.json").write_text(json.dumps(about | result, indent=1))
    print(json.dumps(about | result))


if __name__ == "__main__":
    main()

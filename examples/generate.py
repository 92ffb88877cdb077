"""Draw pictures with a trained pair: from a leaf, a node, one root decoded by every leaf, or a given image refined.

    python examples/generate.py --out pictures                          # every leaf from each root
    python examples/generate.py --node 3 --count 16 --out pictures      # sixteen images through node 3
    python examples/generate.py --strip --out pictures                  # how noise becomes images
    python examples/generate.py --refine digits --out pictures          # test images, refined
    torchrun --nproc-per-node 2 -- examples/generate.py --node 3        # the same pictures, on two processes

The last line printed is one JSON object that names the written file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from treediff import DiffuseTreeVAE
from treediff.core.distributed import World, start
from treediff.data import load_dataset
from treediff.diffusion import Progress
from treediff.pictures import draw_grid

Draw = Callable[[dict[str, Any], slice], Any]


def drawn(world: World, count: int, sampling: dict[str, Any], draw: Draw) -> tuple[dict[str, Tensor], Tensor]:
    """Images of both stages, and leaves, of `count` images or roots, of which each process draws some.

    An image depends on the seed and on its index, but not on the number of processes. A tree of features draws none.
    """

    def part(rows: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        first = int(rows[0])
        generator = torch.Generator().manual_seed(sampling["generator"].initial_seed())
        made = draw({**sampling, "first_index": first, "generator": generator}, slice(first, first + len(rows)))
        return made.coarse, made.images, made.leaf

    parts = [rows for rows in torch.arange(count).tensor_split(world.size) if len(rows)]
    coarse, images, leaf = zip(*world.map(part, parts), strict=True)
    trees = {} if coarse[0] is None else {"tree": torch.cat(coarse).float()}
    return trees | {"refined": torch.cat(images).float()}, torch.cat(leaf)


def load_pair(path: Path, features: str | None, components: int) -> DiffuseTreeVAE:
    """A saved pair, of images, or of features of a network of this name."""
    if features is None:
        return DiffuseTreeVAE.load(path).eval()
    from train_photographs import feature_map  # which needs the packages of its networks

    return DiffuseTreeVAE.load(path, features=feature_map(features, components)).eval()


def save(world: World, images: Tensor, path: Path, **labels: Any) -> None:  # noqa: ANN401
    """Draw the images on one process only."""
    if world.first:
        draw_grid(images, path, **labels)


def every_leaf(model: DiffuseTreeVAE, args: argparse.Namespace, sampling: dict[str, Any], path: Path) -> None:
    """Rows are roots, columns leaves; the blurry image of the tree above the refined one."""
    images, leaf = drawn(
        args.world, args.count, sampling, lambda own, rows: model.generate_tree(rows.stop - rows.start, **own)
    )
    both = torch.stack(list(images.values()), 1).flatten(0, 1)
    labels = [name if k else f"root {i}: {name}" for i in range(args.count) for k, name in enumerate(images)]
    save(args.world, both, path, row_labels=labels, column_labels=[f"leaf {each}" for each in leaf[0].tolist()])


def through_node(model: DiffuseTreeVAE, args: argparse.Namespace, sampling: dict[str, Any], path: Path) -> None:
    """Images through one node, the blurry ones above."""
    images, leaf = drawn(
        args.world,
        args.count,
        sampling,
        lambda own, rows: model.generate(rows.stop - rows.start, node=args.node, **own),
    )
    labels = [f"leaf {each}" for each in leaf.tolist()]
    save(args.world, torch.stack(list(images.values())), path, row_labels=[*images], column_labels=labels)


def strip(model: DiffuseTreeVAE, args: argparse.Namespace, sampling: dict[str, Any], path: Path) -> None:
    """Images of the chain on the way from noise, and the final images."""
    frames: list[tuple[float, Tensor]] = []

    def keep(progress: Progress) -> None:
        frames.append((progress.t, ((progress.x + 1) / 2).clamp(0, 1)))

    if not args.world.first:
        return
    model.generate(args.count, node=args.node, **sampling | {"callback": keep})
    every = -(-len(frames) // 11)
    shown = frames[:-1:every] + frames[-1:]
    draw_grid(
        torch.stack([x for _, x in shown], 1).float(), path, column_labels=[f"t = {time:.2f}" for time, _ in shown]
    )


def refined(model: DiffuseTreeVAE, args: argparse.Namespace, sampling: dict[str, Any], path: Path) -> None:
    """Given images, their reconstructions by the tree, and refined images of the same leaf."""
    x = load_dataset(args.refine, size=args.size).test_images[: args.count]
    images, leaf = drawn(args.world, len(x), sampling, lambda own, rows: model.refine(x[rows], leaf="argmax", **own))
    labels = [f"leaf {each}" for each in leaf.tolist()]
    shown = {"given": x} | images
    save(args.world, torch.stack(list(shown.values())), path, row_labels=[*shown], column_labels=labels)


def main() -> None:
    """Load, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/diffusion/model.safetensors"), help="a saved pair")
    parser.add_argument("--features", choices=["efficientnet", "contrastive"], help="of a pair of train_photographs.py")
    parser.add_argument("--components", type=int, default=64, help="of these features")
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"), help="folder for the picture")
    parser.add_argument("--node", type=int, help="id of a node or a leaf")
    parser.add_argument("--strip", action="store_true", help="show the steps from noise to image")
    parser.add_argument(
        "--refine", metavar="DATA", help="refine test images of digits, fashion-mnist, mnist, or a path"
    )
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--count", type=int, default=4, help="how many images or roots")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0, help="1 for none")
    parser.add_argument("--away-from", default="root", choices=["root", "parent", "sibling"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    args.world = start()
    args.out.mkdir(parents=True, exist_ok=True)

    model = load_pair(args.model, args.features, args.components)
    if args.strip:
        name, make = "strip", strip
    elif args.refine:
        name, make = "refined", refined
    elif args.node is not None:
        name, make = f"node-{args.node}", through_node
    else:
        name, make = "leaves", every_leaf
    chains = len(model.tree_vae.topology.leaves) if make is every_leaf else 1
    bar = tqdm(total=args.steps * chains, desc="steps", disable=args.strip or not args.world.first)
    sampling: dict[str, Any] = {
        "steps": args.steps,
        "guidance": args.guidance,
        "away_from": args.away_from,
        "generator": torch.Generator().manual_seed(args.seed),
        "callback": lambda _: bar.update(),
    }
    path = args.out / f"{name}.png"
    with torch.no_grad():
        make(model, args, sampling, path)
    bar.close()
    if not args.world.first:
        return
    print(json.dumps({"picture": str(path), "seed": args.seed, "steps": args.steps, "guidance": args.guidance}))


if __name__ == "__main__":
    main()

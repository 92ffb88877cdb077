"""Summary of a model and its data for all pictures, computed once.

Letters: `n` rows of data, `C H W` image, `S` samples, `M` members, `Y` classes, `K` leaves, `D` latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from treediff.core.modes import evaluating
from treediff.core.rows import Indexable, Rows
from treediff.pictures.layout import spans
from treediff.pictures.samples import Refine, as_images, draw_samples
from treediff.pictures.summary import Ints, NodeSummary, TreeSummary
from treediff.treevae.model import TreeVAE

__all__ = ["summarize_tree"]

Read: TypeAlias = Callable[[Tensor], Tensor]
Labels: TypeAlias = Tensor | npt.NDArray[np.integer[Any]] | Sequence[int]


@torch.no_grad()
def summarize_tree(
    model: TreeVAE,
    images: Indexable,
    labels: Labels | None = None,
    *,
    class_names: Sequence[str] | None = None,
    samples: int = 8,
    members: int = 8,
    max_rows: int = 10_000,
    batch_size: int = 1000,
    generator: torch.Generator | None = None,
    observe: Callable[[Tensor], Tensor] | None = None,
    refine: Refine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TreeSummary:
    """Summarize the generated images and the typical real images of every node of a tree.

    All images are routed once, in batches, without a decoder. A row belongs to its most probable leaf. The
    *members* of a leaf are the rows whose posterior mean at the leaf is closest to the average over the leaf's rows,
    in Euclidean distance. Every latent above the leaf is a posterior mean, too. An inner node shows the most typical
    members of the leaves below it, from left to right, in proportion to the rows of these leaves. Nodes with one child
    are left out, as nothing is decided there.

    The samples of a node are `model.sample(samples, node=node, generator=generator)`, from the same state of the
    generator for all nodes. So sample `i` starts from one root latent and is decoded through each node. A second
    stage may refine the samples, such as the second stage of a `DiffuseTreeVAE` called `pair`:
    `refine=lambda sample: pair.ddpm.sample(pair.condition_of_sample(sample))`. If the tree observes features of images,
    the images of the second stage are the samples.

    Args:
        model: a model of images, or of their features; it is evaluated in eval mode, and its mode is restored.
        images: `(n, C, H, W)`, `C` 1 or 3: a tensor in [0, 1], or anything else that `Rows` takes, read a batch at a
            time.
        labels: `(n,)` class of each image, counting from 0, for histograms; the model does not use labels.
        class_names: a name for each class; 'class 0' and so on by default.
        samples: images to draw through each node, `S`, at least 1.
        members: greatest number of real images of a node, `M`; 0 keeps real images out of the pictures.
        max_rows: latents are compared for at most about this many rows, equally many from each leaf, evenly spaced
            among the leaf's rows. Shares, counts and histograms always come from all rows.
        batch_size: images in a batch.
        generator: source of the noise of the samples.
        observe: from images to what the tree observes, such as the `observe` of a `DiffuseTreeVAE`; the images
            themselves if not given.
        refine: called once per node with the result of `model.sample`; returns images `(S, C, H, W)` in [0, 1], in
            the order of the samples. Needed if the tree observes features.
        progress: called as `progress(done, n)` after each batch that was routed.

    Returns:
        the summary of every node; equal arguments give equal summaries.

    Raises:
        TypeError: if the images are no rows of numbers, those of `refine` no float tensor, or labels no integers.
        ValueError: if the model does not make images, shapes, values or labels do not fit, a number is too small, or
            the model's probabilities are not finite.

    Examples:
        >>> from treediff import TreeTopology, TreeVAE
        >>> tree = TreeTopology.balanced(1)
        >>> model = TreeVAE.for_images(size=8, network="mlp", topology=tree)
        >>> summary = summarize_tree(model, torch.rand(20, 1, 8, 8), torch.arange(20) % 2, samples=4)
        >>> summary[0].samples.shape, summary[0].class_counts
        ((4, 1, 8, 8), array([10, 10]))
    """
    least_one = {"samples": samples, "max_rows": max_rows, "batch_size": batch_size}
    _check(model, least_one, members, draws=refine is not None and observe is not None)
    rows = Rows.of(images, dtype=model.dtype)

    def read(index: Tensor) -> Tensor:
        """Return what the tree observes of some rows."""
        images = rows[index].to(model.device)
        return images if observe is None else observe(images)

    model.check(read(torch.arange(1)))
    targets, names = _classes(labels, class_names, len(rows))
    tree, order = model.topology.contracted(), model.topology.leaves
    with evaluating(model):
        shares, leaf_of = _route(model, read, len(rows), batch_size, progress)
        typical = _typical_members(model, read, leaf_of, members, max_rows, batch_size)
        drawn = draw_samples(model, tree.ids, samples, refine, generator, features=observe is not None)
    column, counts = spans(tree), np.bincount(leaf_of, minlength=len(order))
    records = []
    for node in tree.ids:
        from_left = sorted(tree.leaves_under(node), key=lambda leaf: column[leaf])
        below = [order.index(leaf) for leaf in from_left]
        quotas = _in_proportion([int(counts[k]) for k in below], members)
        shown = np.concatenate([typical[k][:quota] for k, quota in zip(below, quotas, strict=True)])
        record = NodeSummary(
            id=node,
            parent=tree.parent(node),
            depth=tree.depth(node),
            share=float(shares[below].sum()),
            count=int(counts[below].sum()),
            samples=drawn[node][0],
            members=as_images(rows[torch.from_numpy(shown)]),
            member_rows=shown,
            member_labels=None if targets is None else targets[shown],
            class_counts=None if targets is None else _count(targets[np.isin(leaf_of, below)], len(names)),
            refined=drawn[node][1],
        )
        records.append(record)
    return TreeSummary(tree, tuple(records), len(rows), None if targets is None else names)


# --- passes over the data -----------------------------------------------------------------------------------


def _route(
    model: TreeVAE, read: Read, n: int, batch_size: int, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.float64], Ints]:
    """Return the mean probability of each leaf `(K,)`, and the rank of each row's most probable leaf `(n,)`."""
    total = torch.zeros(len(model.topology.leaves), dtype=torch.float64)
    best = []
    for index in torch.arange(n).split(batch_size):
        log_probs = model.leaf_log_probs(read(index))
        total += log_probs.cpu().double().exp().sum(0)
        best.append(log_probs.argmax(1).cpu())
        if progress is not None:
            progress(int(index[-1]) + 1, n)
    if not bool(total.isfinite().all()):
        raise ValueError(
            "the model's probabilities are not finite: its weights hold NaN or infinity, perhaps because "
            "training diverged; go back to an earlier file of the model"
        )
    return (total / n).numpy(), torch.cat(best).numpy()


def _typical_members(
    model: TreeVAE, read: Read, leaf_of: Ints, members: int, max_rows: int, batch_size: int
) -> list[Ints]:
    """Return for each leaf the rows closest to its mean latent, at most `members`."""
    leaves = model.topology.leaves
    most = max(members, max_rows // len(leaves))
    candidates = [_evenly(np.flatnonzero(leaf_of == k), most) for k in range(len(leaves))]
    if members == 0:
        return [rows[:0] for rows in candidates]
    rows = np.concatenate(candidates)
    latents = _leaf_means(model, read, rows, np.asarray(leaves)[leaf_of[rows]], batch_size)
    closest, start = [], 0
    for found in candidates:
        z = latents[start : start + len(found)]
        start += len(found)
        distance = ((z - z.mean(0)) ** 2).sum(1) if len(found) else np.zeros(0)
        closest.append(found[np.argsort(distance, kind="stable")[:members]])
    return closest


def _leaf_means(model: TreeVAE, read: Read, rows: Ints, leaf: Ints, batch_size: int) -> npt.NDArray[np.float64]:
    """Return the posterior mean of each row's latent at a leaf, `(rows, D)`; only the path to that leaf is computed."""
    zero = torch.zeros((), dtype=model.dtype, device=model.device)
    parts = []
    for start in range(0, len(rows), batch_size):
        here = torch.from_numpy(rows[start : start + batch_size])
        x = read(here)
        wanted = torch.from_numpy(leaf[start : start + batch_size]).to(model.device)
        noise = zero.expand(len(x), len(model.topology), *model.latent)
        posterior = model.posterior(x, leaf=wanted, noise=noise)
        visits = posterior.visits.at_leaves()
        means = posterior.mean[visits].cpu().double().flatten(1)
        parts.append(torch.empty_like(means).index_copy(0, posterior.visits.image[visits].cpu(), means))
    return torch.cat(parts).numpy()


# --- arithmetic ---------------------------------------------------------------------------------------------


def _count(targets: Ints, classes: int) -> Ints:
    """Count the rows of each class."""
    return np.bincount(targets, minlength=classes).astype(np.int64)


def _evenly(rows: Ints, most: int) -> Ints:
    """Return at most `most` of the rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    picked: Ints = rows[np.arange(most) * len(rows) // most]
    return picked


def _in_proportion(counts: Sequence[int], places: int) -> list[int]:
    """Share out places in proportion to counts, by largest remainders; none gets more than its count.

    Examples:
        >>> _in_proportion([90, 9, 0], 8), _in_proportion([1, 2, 0], 8)
        ([7, 1, 0], [1, 2, 0])
    """
    total = sum(counts)
    places = min(places, total)
    if not places:
        return [0] * len(counts)
    quotas = [places * count // total for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda k: -(places * counts[k] % total))
    for k in by_remainder[: places - sum(quotas)]:
        quotas[k] += 1
    return quotas


# --- checks -------------------------------------------------------------------------------------------------


def _check(model: TreeVAE, least_one: dict[str, int], members: int, *, draws: bool) -> None:
    """Refuse arguments that cannot be summarized; the model checks the values and shapes of images."""
    for name, value in least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if members < 0:
        raise ValueError(f"members must be at least 0, found {members}")
    if not draws and (len(model.inputs) != 3 or model.inputs[0] not in (1, 3)):
        raise ValueError(
            f"pictures need a model of images, (1, height, width) or (3, height, width); this model reads "
            f"observations of shape {model.inputs}; for features of images pass observe= and refine=, for other data "
            "use model.cluster(x) and model.sample(n)"
        )


def _classes(
    labels: Labels | None, class_names: Sequence[str] | None, rows: int
) -> tuple[Ints | None, tuple[str, ...]]:
    """Return labels as an array, and a name for each class; without labels None and no names."""
    if labels is None:
        if class_names is not None:
            raise ValueError("class_names name the classes of labels, but no labels were given; pass both or neither")
        return None, ()
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers counting from 0, found {array.dtype}")
    if array.shape != (rows,):
        raise ValueError(f"labels: expected one per image, shape ({rows},), found shape {array.shape}")
    if array.min() < 0:
        raise ValueError(
            f"labels: expected classes counting from 0, found {array.min()}; leave out rows without a class"
        )
    classes = int(array.max()) + 1
    names = tuple(f"class {k}" for k in range(classes)) if class_names is None else tuple(class_names)
    if len(names) < classes:
        raise ValueError(
            f"class_names: expected at least {classes} names, as labels reach {classes - 1}, found {len(names)}"
        )
    return array.astype(np.int64), names

"""Summaries for the tests of pictures: from small models, and made up; and the texts that a picture holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from models import build, louder, observations
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.pictures import NodeSummary, TreeSummary, summarize_tree

SPLIT = TreeTopology.balanced(1).split(2).split(3)


def image_model(tree: TreeTopology = SPLIT, kind: str = "mlp", seed: int = 5) -> TreeVAE:
    """Sure of itself, with routers that each send half of the images left."""
    model = louder(build(tree, kind, seed=seed, dtype=torch.float32), 30.0, only="posterior_routers")
    with torch.no_grad():
        features = model.features(observations(model, 40))
        for node in tree.routed:
            # Between the two in the middle: a row at a logit of 0 would be a tie.
            middle = model.banks.posterior_routers.module(node)(features[tree.depth(node)]).quantile(0.5)
            model.banks.posterior_routers.named_weights(node)["logit.bias"].sub_(middle)
    return model


def labels_for(n: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,), generator=seeded(8))


def summary_of(model: TreeVAE, n: int = 30, labels: bool = True, **settings: Any) -> TreeSummary:  # noqa: ANN401
    settings = {"generator": seeded(1), "samples": 5, "members": 4, **settings}
    return summarize_tree(model, observations(model, n), labels_for(n) if labels else None, **settings)


def made_up(
    tree: TreeTopology = SPLIT,
    *,
    shape: tuple[int, int, int] = (1, 8, 8),
    samples: int = 4,
    members: int = 3,
    class_names: tuple[str, ...] | None = ("cat", "dog"),
    refined: bool = False,
) -> TreeSummary:
    """Every leaf has as many rows as its id, all of the first class; pictures are of one tone, refined ones of many."""
    counts = {leaf: leaf for leaf in tree.leaves}
    rows = max(1, sum(counts.values()))
    nodes = []
    for node in tree:
        count = sum(counts[leaf] for leaf in tree.leaves_under(node))
        some = min(members, count)
        classes = None if class_names is None else np.array([count] + [0] * (len(class_names) - 1))
        record = NodeSummary(
            id=node,
            parent=tree.parent(node),
            depth=tree.depth(node),
            share=count / rows,
            count=count,
            samples=np.full((samples, *shape), (node % 7) / 7, np.float32),
            members=np.full((some, *shape), (node % 5) / 5, np.float32),
            member_rows=np.arange(some),
            member_labels=None if class_names is None else np.zeros(some, np.int64),
            class_counts=classes,
            refined=np.random.default_rng(node).random((samples, *shape), np.float32) if refined else None,
        )
        nodes.append(record)
    return TreeSummary(tree, tuple(nodes), rows, class_names)

"""The split of a leaf begins here: its rows are cut in two where they lie thin, and its router learns the cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from treediff.layers.blocks import Router
from treediff.modes import evaluating
from treediff.normalized_cut import normalized_cut
from treediff.treevae import TreeVAE

__all__ = ["Augmentation", "cut_router"]


class Augmentation(Protocol):
    """Changes that a cluster should not depend on; everything in `treediff.augment` is one."""

    def __call__(self, x: Tensor, /, *, generator: torch.Generator | None = None) -> Tensor:
        """A changed copy of every row."""
        ...


@torch.no_grad()
def cut_router(
    model: TreeVAE,
    node: int,
    x: Tensor,
    *,
    on: str = "inputs",
    augment: Augmentation | None = None,
    views: int = 8,
    min_share: float = 0.05,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> None:
    """Fit a node's posterior router to a normalised cut of some rows.

    A posterior router of a class of your own is left as it is.

    Args:
        model: the model.
        node: a node with two children.
        x: `(n, *model.inputs)`, rows that belong to the node.
        on: where they are cut, on the 'inputs' as they are or on the 'features' that the router sees.
        augment: changes that a cluster should not depend on; None for none.
        views: changed copies of each row that the cut looks at, if there is `augment`.
        min_share: the smaller side holds at least this share of the rows.
        batch_size: rows at a time.
        generator: where changes and the fit's batches come from.

    Raises:
        KeyError: if the node has no router.
        ValueError: if `on` is neither, or there are fewer than two rows; see `normalized_cut`.
    """
    if on not in ("inputs", "features"):
        raise ValueError(f"on must be 'inputs' or 'features', found {on!r}")
    router = model.posterior_routers.module(node)
    if not isinstance(router, Router):
        return
    depth = model.topology.depth(node)

    def features(rows: Tensor) -> Tensor:
        with evaluating(model):
            return torch.cat([model.features(part)[depth] for part in rows.split(batch_size)])

    def looks() -> Iterator[Tensor]:
        for change in [augment] * views if augment is not None else []:
            changed = torch.cat([change(part, generator=generator) for part in x.split(batch_size)])
            yield changed if on == "inputs" else features(changed)

    seen = features(x)
    left = normalized_cut(x if on == "inputs" else seen, views=looks(), min_share=min_share)
    router.fit(seen, left, generator=generator)
    model.posterior_routers.assign(node, router)

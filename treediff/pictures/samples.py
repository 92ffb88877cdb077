"""Samples through every node, and the same samples refined by a second stage.

Letters: `S` samples, `C H W` image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from treediff.core.noise import seed_from
from treediff.pictures.checks import check_images
from treediff.pictures.summary import Images
from treediff.treevae.model import TreeVAE
from treediff.treevae.prior import TreeSample

__all__ = ["Refine", "as_images", "draw_samples"]

Refine: TypeAlias = Callable[[TreeSample], Tensor]


def draw_samples(
    model: TreeVAE,
    nodes: Sequence[int],
    samples: int,
    refine: Refine | None,
    generator: torch.Generator | None,
    *,
    features: bool = False,
) -> dict[int, tuple[Images, Images | None]]:
    """Draw samples through nodes, all from the same state of the generator, and refine the samples by `refine`.

    If the model draws features, the images of `refine` are the samples.
    """
    source = generator or torch.Generator().manual_seed(seed_from(None))
    state, drawn = source.get_state(), {}
    for node in nodes:
        source.set_state(state)
        sample = model.sample(samples, node=node, generator=source)
        refined = None if refine is None else _refined(refine, sample, node, features=features)
        drawn[node] = (refined, None) if features and refined is not None else (as_images(sample.images), refined)
    return drawn


def as_images(images: Tensor) -> Images:
    """Return a tensor as the array that pictures show."""
    array: Images = images.detach().to("cpu", torch.float32).numpy().clip(0, 1)
    return array


def _refined(refine: Refine, sample: TreeSample, node: int, *, features: bool) -> Images:
    """Return the checked result of `refine` for a node."""
    images, wanted = refine(sample), tuple(sample.images.shape)
    check_images(images, f"what refine returned for node {node}")
    if features and len(images) == len(sample.images):
        return as_images(images)
    if tuple(images.shape) != wanted:
        raise ValueError(
            f"what refine returned for node {node}: expected one image for each sample, shape {wanted}, found shape "
            f"{tuple(images.shape)}; refine all of sample.images, in their order"
        )
    return as_images(images)

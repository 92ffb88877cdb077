"""Presets of diffusion models for images, by the kind of condition.

`diffuse_tree_vae` conditions on the leaf decoder's image and the leaf (arXiv 2407.06124), `tree_diffusion` on the path
of latents (arXiv 2410.16910).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch

from treediff.core.checks import Shape
from treediff.diffusion.conditioners import (
    Conditioner,
    Conditioners,
    LatentEmbedding,
    NodeEmbedding,
    PathEncoder,
    PathTokens,
    ReconstructionConcat,
)
from treediff.diffusion.discrete import DiscreteSchedule
from treediff.diffusion.parameterization import check_prediction
from treediff.diffusion.schedule import CosineSchedule, LinearSchedule, NoiseSchedule, SigmoidSchedule
from treediff.diffusion.unet import UNet
from treediff.diffusion.weighting import Weighting, simple
from treediff.diffusion.weighting import min_snr as min_snr_weighting
from treediff.tree.topology import TreeTopology

__all__ = ["CONDITIONS", "DEFAULTS", "SCHEDULES", "Inputs", "Settings", "image_parts"]

#: Schedules by name.
SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "sigmoid": SigmoidSchedule,
    "ddpm": DiscreteSchedule.linear,
}


class Inputs(NamedTuple):
    """Inputs of a maker of conditioners.

    Attributes:
        topology: the tree.
        channels: of the images.
        size: height and width of the images.
        latent: shape of one latent.
        width: of the vector or the tokens that the conditioner returns.
        level: width of the embedding of the condition's noise level; None for a condition without noise.
        factory: device and dtype.
    """

    topology: TreeTopology
    channels: int
    size: int | tuple[int, int]
    latent: Shape
    width: int
    level: int | None
    factory: dict[str, Any]


def _reconstruction(of: Inputs) -> Conditioner:
    return ReconstructionConcat(of.channels, of.size, of.level, **of.factory)


def _node(of: Inputs) -> Conditioner:
    return NodeEmbedding(of.topology, of.width, **of.factory)


def _latent(of: Inputs) -> Conditioner:
    return LatentEmbedding(of.topology, of.latent, of.width, **of.factory)


def _path(of: Inputs) -> Conditioner:
    return PathEncoder(of.topology, of.latent, of.width, **of.factory)


def _tokens(of: Inputs) -> Conditioner:
    return PathTokens(of.topology, of.latent, of.width, **of.factory)


#: Kinds of conditions by name, and the makers of each kind's conditioners.
CONDITIONS: dict[str, tuple[Callable[[Inputs], Conditioner], ...]] = {
    "diffuse_tree_vae": (_reconstruction, _node),
    "tree_diffusion": (_path,),
    "reconstruction": (_reconstruction,),
    "latent": (_latent,),
    "reconstruction_path": (_reconstruction, _path),
    "path_tokens": (_tokens,),
    "node": (_node,),
}


class Settings(TypedDict, total=False):
    """Settings of the factories of `LeafConditionedDDPM`, beyond shapes and tree.

    Attributes:
        condition: what the network is conditioned on, one of `CONDITIONS`; 'diffuse_tree_vae' if not given.
        width: channels of the network's first level; 32.
        multipliers: channels of each level, in units of `width`; `(1, 2, 2)`.
        blocks: layers per level; 2.
        attention: resolutions with attention, each the larger side of a level's maps; none.
        heads: number of heads of every attention; 4.
        dropout: share of activations dropped in training; 0.
        patch: side of the patches that the network's first level reads, see `UNet`; 1.
        schedule: one of `SCHEDULES`, or a schedule; 'cosine'.
        prediction: 'epsilon', 'x0' or 'v'; 'v'.
        min_snr: gamma of the min-SNR weighting; None weighs all noise levels alike.
        coarsen: see `LeafConditionedDDPM`; 0.2.
        condition_noise: see `LeafConditionedDDPM`; 0.
        shift: see `LeafConditionedDDPM`; 0.
        checkpoint: whether the network trades time for memory, see `UNet`; False.
        unet: a network in place of the network that the factory builds.
        conditioner: a conditioner in place of the conditioner that `condition` names.
        weighting: a weighting in place of the weighting that `min_snr` gives.
    """

    condition: str
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    heads: int
    dropout: float
    patch: int
    schedule: str | NoiseSchedule
    prediction: str
    min_snr: float | None
    coarsen: float
    condition_noise: float
    shift: float
    checkpoint: bool
    unet: UNet
    conditioner: Conditioner
    weighting: Weighting


#: Default values of the settings.
DEFAULTS: Settings = {
    "condition": "diffuse_tree_vae",
    "width": 32,
    "multipliers": (1, 2, 2),
    "blocks": 2,
    "attention": (),
    "heads": 4,
    "dropout": 0.0,
    "patch": 1,
    "schedule": "cosine",
    "prediction": "v",
    "min_snr": None,
    "coarsen": 0.2,
    "condition_noise": 0.0,
    "shift": 0.0,
    "checkpoint": False,
}


def image_parts(
    *,
    size: int | tuple[int, int],
    channels: int,
    latent: Shape,
    topology: TreeTopology,
    condition: str,
    width: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    heads: int,
    dropout: float,
    patch: int,
    schedule: str | NoiseSchedule,
    prediction: str,
    min_snr: float | None,
    coarsen: float,
    condition_noise: float,
    shift: float,
    checkpoint: bool,
    conditioner: Conditioner | None = None,
    unet: UNet | None = None,
    weighting: Weighting | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the arguments of `LeafConditionedDDPM`; see `Settings`.

    Raises:
        ValueError: if there is no schedule, prediction or condition of that name.
    """
    for name, found, table in (("schedule", schedule, SCHEDULES), ("condition", condition, CONDITIONS)):
        if isinstance(found, str) and found not in table:
            raise ValueError(f"{name} must be one of {', '.join(table)}; found {found!r}")
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs = Inputs(topology, channels, size, latent, 4 * width, 4 * width if condition_noise else None, factory)
    conditioner = conditioner or Conditioners(*(make(inputs) for make in CONDITIONS[condition]))
    unet = unet or UNet(
        channels + conditioner.channels,
        channels,
        size=size,
        width=width,
        multipliers=multipliers,
        blocks=blocks,
        attention=attention,
        context=conditioner.context,
        heads=heads,
        dropout=dropout,
        patch=patch,
        checkpoint=checkpoint,
        **factory,
    )
    predicted = check_prediction(prediction)
    return {
        "unet": unet,
        "conditioner": conditioner,
        "topology": topology,
        "schedule": SCHEDULES[schedule]() if isinstance(schedule, str) else schedule,
        "prediction": predicted,
        "weighting": weighting or (simple if min_snr is None else min_snr_weighting(predicted, min_snr)),
        "coarsen": coarsen,
        "condition_noise": condition_noise,
        "shift": shift,
    }

"""Good parts of a diffusion model for common images, by name of what it is told.

`diffuse_tree_vae` tells the leaf decoder's image and the leaf (arXiv 2407.06124), `tree_diffusion` the path of latents
(arXiv 2410.16910).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
from treediff.diffusion.weighting import min_snr, simple
from treediff.tree.topology import TreeTopology

__all__ = ["CONDITIONS", "SCHEDULES", "PresetParts", "preset_parts"]

#: Schedules by name.
SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "sigmoid": SigmoidSchedule,
    "ddpm": DiscreteSchedule.linear,
}

#: What the network can be told, by name, and the parts it is made of.
CONDITIONS: dict[str, tuple[str, ...]] = {
    "diffuse_tree_vae": ("reconstruction", "node"),
    "tree_diffusion": ("path",),
    "reconstruction": ("reconstruction",),
    "latent": ("latent",),
    "reconstruction_path": ("reconstruction", "path"),
    "path_tokens": ("tokens",),
    "node": ("node",),
}


@dataclass(frozen=True)
class PresetParts:
    """What a model for images is built from.

    Args:
        size: height and width, or one number for both.
        latent: shape of one latent of the tree.
        topology: the tree.
        channels: 1 for grey, 3 for colour.
        condition: what the network is told, one of `CONDITIONS`.
        width: channels of the network's first level.
        multipliers: channels of each level, in units of `width`.
        blocks: layers per level.
        attention: resolutions with attention, each the larger side of a level's maps.
        heads: of every attention.
        dropout: share of numbers dropped in training.
        schedule: one of `SCHEDULES`.
        prediction: 'epsilon', 'x0' or 'v'.
        min_snr: gamma of the min-SNR weighting; None weighs all noise levels alike.
        coarsen: see `LeafConditionedDDPM`.
        condition_noise: see `LeafConditionedDDPM`.
        shift: see `LeafConditionedDDPM`.
        checkpoint: whether the network trades time for memory, see `UNet`.
        device: where the model lives.
        dtype: of the weights.

    Raises:
        ValueError: if there is no schedule, prediction or condition of a name.
    """

    size: int | tuple[int, int]
    latent: tuple[int, ...]
    topology: TreeTopology
    channels: int = 1
    condition: str = "diffuse_tree_vae"
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    heads: int = 4
    dropout: float = 0.0
    schedule: str = "cosine"
    prediction: str = "v"
    min_snr: float | None = None
    coarsen: float = 0.2
    condition_noise: float = 0.0
    shift: float = 0.0
    checkpoint: bool = False
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, table in (("schedule", SCHEDULES), ("condition", CONDITIONS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}; found {getattr(self, name)!r}")
        check_prediction(self.prediction)

    def to_config(self) -> dict[str, Any]:
        """The settings as plain JSON, without the tree and where the model lives."""
        apart = ("topology", "device", "dtype")
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items() if key not in apart}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], topology: TreeTopology) -> PresetParts:
        """What `to_config` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            fixed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
            return cls(**fixed, topology=topology)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the configuration {config!r} does not describe a model: {error}") from error


def preset_parts(preset: PresetParts) -> dict[str, Any]:
    """The arguments of `LeafConditionedDDPM`."""
    factory: dict[str, Any] = {"device": preset.device, "dtype": preset.dtype}
    conditioner = _conditioner(preset, 4 * preset.width, factory)
    unet = UNet(
        preset.channels + conditioner.channels,
        preset.channels,
        size=preset.size,
        width=preset.width,
        multipliers=preset.multipliers,
        blocks=preset.blocks,
        attention=preset.attention,
        context=conditioner.context,
        heads=preset.heads,
        dropout=preset.dropout,
        checkpoint=preset.checkpoint,
        **factory,
    )
    prediction = check_prediction(preset.prediction)
    return {
        "unet": unet,
        "conditioner": conditioner,
        "topology": preset.topology,
        "schedule": SCHEDULES[preset.schedule](),
        "prediction": prediction,
        "weighting": simple if preset.min_snr is None else min_snr(prediction, preset.min_snr),
        "coarsen": preset.coarsen,
        "condition_noise": preset.condition_noise,
        "shift": preset.shift,
    }


def _conditioner(preset: PresetParts, embedding: int, factory: Mapping[str, Any]) -> Conditioner:
    tree, latent = preset.topology, preset.latent
    level = embedding if preset.condition_noise else None
    makers: dict[str, Callable[[], Conditioner]] = {
        "reconstruction": lambda: ReconstructionConcat(preset.channels, preset.size, level, **factory),
        "node": lambda: NodeEmbedding(tree, embedding, **factory),
        "latent": lambda: LatentEmbedding(tree, latent, embedding, **factory),
        "path": lambda: PathEncoder(tree, latent, embedding, **factory),
        "tokens": lambda: PathTokens(tree, latent, embedding, **factory),
    }
    return Conditioners(*(makers[part]() for part in CONDITIONS[preset.condition]))

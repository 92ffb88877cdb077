"""The parts of the second stage as one module, and how it is made, checked, saved and read.

Nothing here knows how to train or to draw: `DDPMNetworks` holds the U-Net, what it is told, and the schedule it works
under.

Letters: `B` batch, `C H W` image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from treediff.core.checks import check_batch
from treediff.core.hub import Pretrained
from treediff.core.io import (
    described_by,
    dtype_name,
    dtype_named,
    load_into,
    read_header,
    require_config,
    require_topology,
    save_model,
)
from treediff.core.modes import lasting
from treediff.core.noise import seed_from
from treediff.diffusion.condition import NodeIndex, TreeCondition
from treediff.diffusion.conditioners import Conditioner, Signal
from treediff.diffusion.parameterization import Prediction, check_prediction
from treediff.diffusion.presets import PresetParts, preset_parts
from treediff.diffusion.schedule import NoiseSchedule
from treediff.diffusion.unet import UNet
from treediff.diffusion.weighting import Weighting, simple
from treediff.tree.topology import TreeTopology
from treediff.treevae.banks import TreeNetworks

__all__ = ["DDPMNetworks"]


class DDPMNetworks(Pretrained, nn.Module):
    """A U-Net, a conditioner for a tree, and a noise schedule.

    Args:
        unet: the network.
        conditioner: what the network is told; its `channels` and `context` must be those the network was built for.
        topology: the tree.
        schedule: the noise schedule.
        prediction: what the network predicts: 'epsilon', 'x0' or 'v'.
        weighting: from log-SNRs to the weight of each noise level in the loss.
        coarsen: share of the rows that training tells only a node on the path to the leaf, of a depth drawn evenly; see
            `TreeCondition.coarser`. From these the model learns what a cluster at any level looks like, and from those
            at the root the unconditional one that guidance needs.
        condition_noise: greatest noise level put on the condition's image in training; 0 for none.
        shift: weight of the condition's image in what the network sees, `x_t + shift image`: 1 is formulation 2 of
            DiffuseVAE (Pandey et al., arXiv 2201.00308), 0 is formulation 1.

    Raises:
        ValueError: if network and conditioner do not fit, a share is out of range, there is no such prediction, or
            noise is to be predicted under a schedule at whose end nothing of the image is left.
    """

    def __init__(
        self,
        *,
        unet: UNet,
        conditioner: Conditioner,
        topology: TreeTopology,
        schedule: NoiseSchedule,
        prediction: Prediction = "v",
        weighting: Weighting = simple,
        coarsen: float = 0.2,
        condition_noise: float = 0.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.prediction = check_prediction(prediction)
        _check_parts(unet, conditioner)
        for name, share in (("coarsen", coarsen), ("condition_noise", condition_noise)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {share}")
        if prediction == "epsilon" and schedule.ends_in_noise:
            raise ValueError(
                "at t = 1 this schedule has nothing of the image left, where predicted noise says nothing of it; "
                "predict 'v' or 'x0', or choose a schedule that stops before"
            )
        self.unet, self.conditioner, self.index = unet, conditioner, NodeIndex(topology, unet.out.weight.device)
        self.schedule, self.weighting = schedule, weighting
        self.coarsen, self.condition_noise, self.shift = coarsen, condition_noise, shift
        self.config: dict[str, Any] | None = None

    @classmethod
    def for_images(cls, *, generator: torch.Generator | None = None, **settings: Any) -> Self:  # noqa: ANN401
        """A model with parts chosen for you.

        Args:
            generator: gives the seed of the initial weights; without one they come from PyTorch's default generator.
            **settings: see `treediff.diffusion.presets.PresetParts`.

        Examples:
            >>> from treediff import LeafConditionedDDPM
            >>> seed, tree = torch.Generator().manual_seed(0), TreeTopology.balanced(1)
            >>> model = LeafConditionedDDPM.for_images(size=8, latent=(4,), topology=tree, width=16, generator=seed)
            >>> model.unet.stem.weight.shape
            torch.Size([16, 2, 3, 3])
        """
        preset = PresetParts(**settings)
        # Layers draw their weights as they are built, from the default generator and no other.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(seed_from(generator))
            model = cls(**preset_parts(preset))
        model.config = preset.to_config()
        return model

    @classmethod
    def for_tree(cls, tree: TreeNetworks, **settings: Any) -> Self:  # noqa: ANN401
        """A model for the images, latents and tree of a TreeVAE; settings as for `for_images`.

        Raises:
            ValueError: if the TreeVAE is not one of images.
        """
        if len(tree.inputs) != 3:
            raise ValueError(f"expected a tree of images (C, H, W), found one of inputs of shape {tree.inputs}")
        channels, *size = tree.inputs
        known: dict[str, Any] = {"size": tuple(size), "channels": channels, "latent": tree.latent}
        return cls.for_images(**known, topology=tree.topology, device=tree.device, dtype=tree.dtype, **settings)

    # --- running -------------------------------------------------------------------------------------------

    def forward(self, x_t: Tensor, t: Tensor, condition: TreeCondition) -> Tensor:
        """What the network says of `x_t` (from -1 to 1, with noise) at times `(B,)`: noise, image or velocity."""
        return self.told(x_t, t, condition, self.conditioner(condition))

    def told(self, x_t: Tensor, t: Tensor, condition: TreeCondition, signal: Signal) -> Tensor:
        """The same with what the conditioner says already at hand."""
        if self.shift and condition.image is not None:
            known = condition.is_known()[:, None, None, None]
            x_t = x_t + self.shift * torch.where(known, 2 * condition.image - 1, 0).to(x_t.dtype)
        if signal.image is not None:
            x_t = torch.cat([x_t, signal.image.to(x_t.dtype)], 1)
        output: Tensor = self.unet(x_t, t, signal.vector, signal.tokens, signal.mask)
        return output

    def check(self, x: Tensor, condition: TreeCondition) -> None:
        """Raise unless images suit the model, and there is a place for each; values are looked at on a CPU only.

        Raises:
            TypeError: if `x` is no floating-point tensor, or of another dtype than the weights.
            ValueError: if it has another shape, is not finite or leaves [0, 1], or has another number of rows.
        """
        shape = (self.unet.out_channels, *self.unet.size)
        check_batch(x, shape, self.unet.out.weight.dtype, (0.0, 1.0), "images")
        if len(condition) != len(x):
            raise ValueError(f"expected a place in the tree for each of the {len(x)} images, found {len(condition)}")

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, tree and configuration to one safetensors file; see `treediff.core.io`."""
        save_model(self, path, self.header())

    def header(self) -> dict[str, Any]:
        """What a file says of the model besides its weights."""
        topology = json.loads(self.index.topology.to_json())
        return {"config": self.config, "topology": topology, "dtype": dtype_name(self.unet.out.weight.dtype)}

    @classmethod
    @lasting()
    def load(cls, path: str | os.PathLike[str], *, model: Self | None = None) -> Self:
        """Read what `save` wrote; every tensor is bit-equal.

        Args:
            path: the file.
            model: a model on the same tree to fill, for one built from parts of your own. It stays as it was if the
                file does not fit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, foreign, of another version, or does not fit; or if it was saved from a
                model built from parts and none is given.
        """
        header = read_header(path, cls.__name__)
        if model is None:
            model = cls.from_header(header, path)
        else:
            model.check_tree(header, path)
        load_into(model, path)
        return model

    def check_tree(self, header: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
        """Raise ValueError if a header tells of another tree, whose weights may have the same shapes."""
        found = require_topology(header, path)
        if found != self.index.topology:
            raise ValueError(
                f"the model in {os.fspath(path)!r} is on another tree, {found}, than the given one, "
                f"{self.index.topology}; build one on the tree of the file"
            )

    @classmethod
    def from_header(cls, header: Mapping[str, Any], path: str | os.PathLike[str]) -> Self:
        """The model that a file's header describes, without its weights; the path is for messages.

        Raises:
            ValueError: if it was built from parts, which no header describes, or the header is damaged.
        """
        config = require_config(header, path)
        topology, dtype = require_topology(header, path), dtype_named(header.get("dtype", "float32"), path)
        with described_by(path, config):
            settings: dict[str, Any] = vars(replace(PresetParts.from_config(config, topology), dtype=dtype))
            return cls.for_images(**settings, generator=torch.Generator().manual_seed(0))


def _check_parts(unet: UNet, conditioner: Conditioner) -> None:
    if unet.in_channels != unet.out_channels + conditioner.channels:
        raise ValueError(
            f"the network must take the {unet.out_channels} channels of the image and the {conditioner.channels} of "
            f"the conditioner, found {unet.in_channels}"
        )
    if unet.context != conditioner.context:
        raise ValueError(
            f"the network reads tokens of width {unet.context}, the conditioner gives some of width "
            f"{conditioner.context}; build the network with context={conditioner.context}"
        )

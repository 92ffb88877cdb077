"""Good parts for common data, and the factories that put them together."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, Self

import torch
from torch import nn

from treediff.core.checks import Shape, check_positive, check_shape, check_size
from treediff.layers.decoders import MLPDecoder, PatchDecoder, ResidualDecoder
from treediff.layers.encoders import ConvEncoder, MLPEncoder, ResidualEncoder
from treediff.layers.heads import BottomUpBlock, GaussianHead, LatentTransition
from treediff.layers.init import initialize
from treediff.layers.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood
from treediff.layers.router import Router
from treediff.tree.topology import TreeTopology
from treediff.treevae.banks import TreeNetworks

__all__ = ["PresetNetworks", "image_parts", "vector_parts"]


class PresetNetworks(TreeNetworks):
    """Networks of a tree with factories for images and for vectors."""

    @classmethod
    def for_images(
        cls,
        *,
        size: int | tuple[int, int],
        channels: int = 1,
        latent: int | tuple[int, ...] = 8,
        width: int = 128,
        max_depth: int = 8,
        network: str = "conv",
        likelihood: str = "bernoulli",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model for images in [0, 1] with parts chosen for you.

        Args:
            size: height and width, or one number for both.
            channels: 1 for grey, 3 for colour.
            latent: width of a latent vector, or `(channels, h, w)` for latents that are maps.
            width: width of features and hidden layers; what a residual network's channels are in proportion to.
            max_depth: greatest depth the tree may grow to.
            network: 'conv' for small images, 'mlp' for tiny ones, 'residual' for colour.
            likelihood: 'bernoulli', 'gaussian' (variance 1/2) or 'gaussian_learned'.
            topology: the tree to start with; a lone root by default, which growth splits.
            generator: where initial weights come from; PyTorch's default generator if not given.
            device: where the model lives.
            dtype: what weights are stored as.

        Examples:
            >>> from treediff import TreeVAE
            >>> model = TreeVAE.for_images(size=28, topology=TreeTopology.balanced(1))
            >>> model.elbo(torch.rand(4, 1, 28, 28)).elbo.shape
            torch.Size([4])
        """
        size = (size, size) if isinstance(size, int) else check_size("size", size)
        latent = (latent,) if isinstance(latent, int) else check_shape("latent", latent)
        config: dict[str, Any] = {
            "size": list(size),
            "channels": channels,
            "latent": list(latent),
            "width": width,
            "max_depth": max_depth,
            "network": network,
            "likelihood": likelihood,
        }
        settings: dict[str, Any] = {**config, "size": size, "latent": latent}
        parts = image_parts(**settings, generator=generator, device=device, dtype=dtype)
        model = cls(topology=topology or TreeTopology.balanced(0), **parts)
        model.config = {"for_images": config}
        return model

    @classmethod
    def for_vectors(
        cls,
        features: int,
        *,
        latent: int = 8,
        width: int = 128,
        max_depth: int = 8,
        likelihood: str = "gaussian_learned",
        topology: TreeTopology | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A model for vectors of `features` numbers: tables, text features; other arguments as for `for_images`.

        Examples:
            >>> from treediff import TreeVAE
            >>> model = TreeVAE.for_vectors(5)
            >>> model.cluster(torch.randn(3, 5))
            tensor([0, 0, 0])
        """
        config: dict[str, Any] = {
            "features": features,
            "latent": latent,
            "width": width,
            "max_depth": max_depth,
            "likelihood": likelihood,
        }
        settings: dict[str, Any] = {**config, "latent": (latent,) if isinstance(latent, int) else latent}
        parts = vector_parts(**settings, generator=generator, device=device, dtype=dtype)
        model = cls(topology=topology or TreeTopology.balanced(0), **parts)
        model.config = {"for_vectors": config}
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The untrained model that `model.config` describes; global random state is left alone.

        Raises:
            ValueError: if it is not what a factory of this class wrote.
        """
        factories = ("for_images", "for_vectors")
        entries = list(config.items()) if isinstance(config, Mapping) else []
        if len(entries) != 1 or entries[0][0] not in factories or not isinstance(entries[0][1], Mapping):
            raise ValueError(
                f"expected a configuration {{name: arguments}} of {' or '.join(factories)}, found {config!r}"
            )
        factory, arguments = entries[0]
        fixed = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
        try:
            model: Self = getattr(cls, factory)(**fixed, generator=torch.Generator().manual_seed(0))
        except TypeError as error:
            raise ValueError(f"the configuration {config!r} does not fit {factory}: {error}") from error
        return model


def image_parts(
    *,
    channels: int,
    size: tuple[int, int],
    latent: Shape,
    width: int,
    max_depth: int,
    network: str,
    likelihood: str,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Parts for images; see `TreeVAE.for_images`."""
    check_positive(width=width, channels=channels)
    features = (width, *check_shape("latent", latent)[1:])
    outputs = (channels, *check_size("size", size))
    with torch.device("meta"):
        encoder: nn.Module
        decoder: nn.Module
        if network == "mlp":
            encoder, decoder = MLPEncoder(outputs, features, (2 * width,)), MLPDecoder(latent, outputs)
        elif network == "conv":
            encoder, decoder = ConvEncoder(channels, size, features), PatchDecoder(latent, channels, size)
        elif network == "residual":
            encoder = ResidualEncoder(channels, size, features, max(1, width // 4), 2 * width)
            decoder = ResidualDecoder(latent, channels, size, max(1, width // 8))
        else:
            raise ValueError(f"network must be 'conv', 'mlp' or 'residual', found {network!r}")
    parts = _tree_parts(encoder, features, latent, width, max_depth, generator, device, dtype)
    parts.update(decoder=decoder, likelihood=_likelihood(likelihood, device, dtype), inputs=outputs)
    return parts


def vector_parts(
    *,
    features: int,
    latent: Shape,
    width: int,
    max_depth: int,
    likelihood: str,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Parts for vectors; see `TreeVAE.for_vectors`."""
    check_positive(features=features, width=width)
    if len(check_shape("latent", latent)) != 1:
        raise ValueError(f"latents of vectors are vectors: latent must be one number, found {latent}")
    with torch.device("meta"):
        encoder = MLPEncoder((features,), (width,), (2 * width,))
        decoder = MLPDecoder(latent, (features,), (width, width))
    parts = _tree_parts(encoder, (width,), latent, width, max_depth, generator, device, dtype)
    found = _likelihood(likelihood, device, dtype, data_range=None)
    return {**parts, "decoder": decoder, "likelihood": found, "inputs": (features,)}


def _tree_parts(
    encoder: nn.Module,
    features: Shape,
    latent: Shape,
    width: int,
    max_depth: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The encoder and the ladder with weights; the node networks as templates without."""
    if not isinstance(max_depth, Integral):
        raise TypeError(f"max_depth must be a whole number, found {max_depth!r}")
    if max_depth < 0:
        raise ValueError(f"max_depth must be at least 0, found {max_depth}")
    with torch.device("meta"):
        bottom_up = nn.ModuleList(BottomUpBlock(features) for _ in range(max_depth))
        templates = {
            "head": GaussianHead(features, latent[0]),
            "transition": LatentTransition(latent, (width,)),
            "posterior_router": Router(features, (max(1, width // 2),)),
            "prior_router": Router(latent, (max(1, width // 2),)),
        }
    for shared in (encoder, bottom_up):
        shared.to_empty(device=device or "cpu").to(dtype)
        initialize(shared, generator=generator)
    return {
        **templates,
        "encoder": encoder,
        "bottom_up": list(bottom_up),
        "latent": latent,
        "generator": generator,
        "device": device or "cpu",
        "dtype": dtype,
    }


def _likelihood(
    name: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    data_range: tuple[float, float] | None = (0.0, 1.0),
) -> Likelihood:
    if name == "bernoulli":
        return BernoulliLikelihood()
    if name in ("gaussian", "gaussian_learned"):
        learned = name == "gaussian_learned"
        return GaussianLikelihood(learned=learned, data_range=data_range, device=device, dtype=dtype)
    raise ValueError(f"likelihood must be 'bernoulli', 'gaussian' or 'gaussian_learned', found {name!r}")

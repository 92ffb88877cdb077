"""Presets of a TreeVAE for common data: functions that return arguments of its constructor."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypedDict

import torch
from torch import nn

from treediff.core.checks import Shape, check_positive, check_shape
from treediff.layers.decoders import MLPDecoder, PatchDecoder, ResidualDecoder
from treediff.layers.encoders import ConvEncoder, MLPEncoder, ResidualEncoder
from treediff.layers.heads import BottomUpBlock, GaussianHead, LatentTransition
from treediff.layers.init import initialize
from treediff.layers.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood
from treediff.layers.router import Router

__all__ = ["TreeParts", "image_parts", "latent_shape", "vector_parts"]


class TreeParts(TypedDict, total=False):
    """Parts of a `TreeVAE` that may replace the parts chosen by a factory; see the arguments of `TreeVAE`.

    The features of a factory's encoder have the shape `(width,)`, or `(width, h, w)` if latents are maps.
    """

    encoder: nn.Module
    bottom_up: Sequence[nn.Module]
    head: nn.Module
    transition: nn.Module
    posterior_router: nn.Module
    prior_router: nn.Module
    decoder: nn.Module


def image_parts(
    *,
    channels: int,
    size: tuple[int, int],
    latent: Shape,
    width: int,
    max_depth: int,
    network: str,
    likelihood: str | Likelihood,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the parts of a model for images; see `TreeVAE.for_images`."""
    check_positive(width=width, channels=channels)
    features, outputs = (width, *latent[1:]), (channels, *size)
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
    latent: int | Shape,
    width: int,
    max_depth: int,
    likelihood: str | Likelihood,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return the parts of a model for vectors; see `TreeVAE.for_vectors`."""
    check_positive(features=features, width=width)
    latent = latent_shape(latent)
    if len(latent) != 1:
        raise ValueError(f"latents of vectors are vectors: latent must be one number, found {latent}")
    with torch.device("meta"):
        encoder = MLPEncoder((features,), (width,), (2 * width,))
        decoder = MLPDecoder(latent, (features,), (width, width))
    parts = _tree_parts(encoder, (width,), latent, width, max_depth, generator, device, dtype)
    found = _likelihood(likelihood, device, dtype, data_range=None)
    return {**parts, "decoder": decoder, "likelihood": found, "inputs": (features,)}


def latent_shape(latent: int | Shape) -> Shape:
    """Return the shape of a latent; a single number is the width of a vector."""
    return check_shape("latent", (latent,) if isinstance(latent, int | Integral) else latent)


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
    """Return the encoder and the ladder with weights, and the node networks as templates without weights."""
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
    generator = generator or torch.Generator(device or "cpu").manual_seed(0)
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
    name: str | Likelihood,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    data_range: tuple[float, float] | None = (0.0, 1.0),
) -> Likelihood:
    if not isinstance(name, str):
        return name
    if name == "bernoulli":
        return BernoulliLikelihood()
    if name in ("gaussian", "gaussian_learned"):
        learned = name == "gaussian_learned"
        return GaussianLikelihood(learned=learned, data_range=data_range, device=device, dtype=dtype)
    raise ValueError(f"likelihood must be 'bernoulli', 'gaussian' or 'gaussian_learned', found {name!r}")

"""Small models with weights from a seed, and data and noise that suit them."""

from __future__ import annotations

import torch
from hypothesis import settings
from strategies import quick
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE

# One of each way in which models differ: kind of data, networks, latents and likelihood.
KINDS = ("vectors", "mlp", "conv", "maps", "colour")
GROWN = TreeTopology.balanced(1).split(2).split(3)
PRUNED = TreeTopology.balanced(2).split(4).prune(3).prune(5)  # pass-throughs at 1 and 2


few = settings(quick, max_examples=20)  # each example builds a model or two


def build(
    tree: TreeTopology = GROWN, kind: str = "vectors", *, seed: int = 0, dtype: torch.dtype | None = torch.float64
) -> TreeVAE:
    """A model of one of the `KINDS`, small enough for hundreds of them in a second or two."""
    generator, depth = seeded(seed), max(tree.max_depth, 4)
    if kind == "vectors":
        return TreeVAE.for_vectors(
            features=3, latent=2, width=5, max_depth=depth, topology=tree, generator=generator, dtype=dtype
        )
    size, channels, latent, network, likelihood = {
        "mlp": ((4, 3), 1, 2, "mlp", "bernoulli"),
        "conv": (6, 1, 3, "conv", "gaussian"),
        "maps": ((5, 6), 1, (2, 2, 2), "conv", "bernoulli"),
        "colour": (8, 3, (2, 2, 2), "residual", "gaussian_learned"),
    }[kind]
    return TreeVAE.for_images(
        size=size,  # type: ignore[arg-type]
        channels=channels,
        latent=latent,  # type: ignore[arg-type]
        width=8,
        max_depth=depth,
        network=network,
        likelihood=likelihood,
        topology=tree,
        generator=generator,
        dtype=dtype,
    )


def louder(model: TreeVAE, factor: float, *, only: str = "") -> TreeVAE:
    """The same model with larger weights: sure routers, far-off latents, extreme variances."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.mul_(factor)
    return model


def observations(model: TreeVAE, n: int, seed: int = 1) -> Tensor:
    """Rows that the model takes: in [0, 1] for images, normal for vectors."""
    draw = torch.rand if model.likelihood.data_range else torch.randn
    return draw(n, *model.inputs, generator=seeded(seed), dtype=torch.float64).to(model.dtype)


def noise_for(model: TreeVAE, n: int, seed: int = 2) -> Tensor:
    """What `noise=` takes: one draw per row and node."""
    shape = (n, len(model.topology), *model.latent)
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(model.dtype)

"""Tiny second stages with weights away from where they start, conditions for them, and pairs with a first stage."""

from __future__ import annotations

from typing import Any

import torch
from models import GROWN, build
from torch import Tensor, nn
from unet_cases import perturb
from worlds import seeded

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, TreeCondition, TreeTopology

TINY: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "blocks": 1}


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    """All weights from the seed, whatever the constructor drew from global state."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            drawn = torch.randn(parameter.shape, generator=seeded(1000 * seed + i), dtype=torch.float64)
            scale = 0.5 if parameter.ndim < 2 else (0.5 * parameter[0].numel()) ** -0.5
            parameter.copy_(scale * drawn)
    return perturb(module, seed)


def small(tree: TreeTopology = GROWN, seed: int = 0, **settings: Any) -> LeafConditionedDDPM:  # noqa: ANN401
    """A second stage for grey images of 8 x 8 pixels."""
    chosen: dict[str, Any] = {"size": 8, "latent": (2,), "topology": tree, **TINY, **settings}
    with torch.random.fork_rng(devices=[]):
        model = LeafConditionedDDPM.for_images(**chosen)
    filled(model, seed)
    return model


def images(n: int, seed: int = 1, dtype: torch.dtype | None = None, size: tuple[int, ...] = (1, 8, 8)) -> Tensor:
    return torch.rand(n, *size, generator=seeded(seed), dtype=torch.float64).to(dtype or torch.float32)


def conditions(
    tree: TreeTopology = GROWN,
    n: int = 4,
    seed: int = 2,
    *,
    latent: tuple[int, ...] = (2,),
    size: tuple[int, ...] = (1, 8, 8),
    dtype: torch.dtype | None = None,
    anywhere: bool = False,
) -> TreeCondition:
    """Leaves (or any nodes) in turn, with every detail."""
    nodes = tree.ids if anywhere else tree.leaves
    generator, dtype = seeded(seed), dtype or torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return TreeCondition(
        torch.tensor([nodes[i % len(nodes)] for i in range(n)], dtype=torch.int64),
        z=draw(n, tree.max_depth + 1, *latent),
        image=images(n, seed + 1, dtype, size),
        weights=draw(n, len(tree.leaves)).softmax(1),
    )


def half_known(condition: TreeCondition) -> TreeCondition:
    """The same with details of every other row only."""
    known = torch.arange(len(condition)) % 2 == 0
    return TreeCondition(condition.node, condition.z, condition.image, condition.weights, known)


def pair(
    tree: TreeTopology = GROWN,
    kind: str = "conv",
    *,
    condition: str = "reconstruction_path",
    dtype: torch.dtype = torch.float64,
    **settings: Any,  # noqa: ANN401
) -> DiffuseTreeVAE:
    """Both stages."""
    tree_vae = build(tree, kind, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        ddpm = LeafConditionedDDPM.for_tree(tree_vae, condition=condition, **{**TINY, **settings})
    filled(ddpm)
    return DiffuseTreeVAE(tree_vae, ddpm)

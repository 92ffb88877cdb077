"""Checks of maps from node id to numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def require_nodes(name: str, found: Mapping[int, object], expected: Iterable[int]) -> None:
    if set(found) != set(expected):
        raise KeyError(f"{name} needs one entry for each of the nodes {list(expected)}, found {list(found)}")


def checked_copies(
    name: str, values: Mapping[int, Tensor | float], nodes: Iterable[int], shape: tuple[int, ...]
) -> dict[int, Tensor]:
    """Return private float64 copies, after checks of nodes, shapes and numbers."""
    require_nodes(name, values, nodes)
    copies = {node: torch.as_tensor(values[node], dtype=torch.float64).detach().clone() for node in nodes}
    for node, value in copies.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} of node {node} must have the shape {shape}, found {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{name} of node {node} must be finite, found {value.tolist()}")
    return copies

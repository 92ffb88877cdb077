"""Inputs of `treediff.metrics`: ids, tables, probabilities and trees, checked and converted to one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Counts: TypeAlias = npt.NDArray[np.int64]
Ids: TypeAlias = torch.Tensor | npt.NDArray[np.integer[Any]] | Sequence[int]

SUM_TOLERANCE = 1e-3


def as_ids(values: Ids, name: str) -> npt.NDArray[np.integer[Any]]:
    array = as_array(values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one integer per point, shape (N,), found shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name}: expected at least one point, found an empty array")
    if array.dtype.kind in "UOS":
        raise TypeError(
            f"{name}: expected integers, found {array.dtype}; number them, as "
            "numpy.unique(labels, return_inverse=True)[1] does"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: expected integers, found {array.dtype}; convert ids with .long() or .astype(int), "
            f"probabilities with .argmax(1)"
        )
    return array


def count_pairs(labels: Ids, clusters: Ids, name: str) -> tuple[Counts, Counts, Counts]:
    """Return class, cluster and number of points of every pair that occurs; classes and clusters by rank."""
    rows, columns = as_ids(labels, "labels"), as_ids(clusters, name)
    if len(rows) != len(columns):
        raise ValueError(
            f"labels and {name}: expected one of each per point, found {len(rows)} labels and {len(columns)} "
            f"{name}; pass both for the same points in the same order"
        )
    row, column = (np.unique(ids, return_inverse=True)[1].astype(np.int64) for ids in (rows, columns))
    many = int(column.max()) + 1
    pairs, counts = np.unique(row * many + column, return_counts=True)
    return pairs // many, pairs % many, counts.astype(np.int64)


def count_table(labels: Ids, clusters: Ids, name: str) -> Counts:
    """Return the number of points of every class in every cluster, `(C, K)`, both in ascending order of ids."""
    row, column, counts = count_pairs(labels, clusters, name)
    table = np.zeros((int(row.max()) + 1, int(column.max()) + 1), np.int64)
    table[row, column] = counts
    return table


def as_probabilities(probs: torch.Tensor | npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = as_array(probs)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"probs: expected real numbers, found {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"probs: expected leaf probabilities of shape (B, K), found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("probs: expected finite probabilities, found NaN or infinity")
    if array.min() < 0:
        raise ValueError(
            f"probs: expected probabilities, found {array.min():.4g}; take .exp() of log-probabilities, "
            f"the softmax of logits"
        )
    p: npt.NDArray[np.float64] = array.astype(np.float64)
    sums = p.sum(1, keepdims=True)
    worst = float(sums.flat[np.abs(sums - 1).argmax()])
    if abs(worst - 1) > SUM_TOLERANCE:
        raise ValueError(
            f"probs: expected rows that sum to 1 over the leaves (within {SUM_TOLERANCE}), found a sum of "
            f"{worst:.4g}; give all leaves, computed in float32 or better"
        )
    # Float32 rows miss 1 by rounding; division by the sums keeps the perplexity inside [1, K].
    p /= sums
    return p


def children_first(leaves: Iterable[int], parent: Mapping[int, int | None]) -> list[int]:
    """Return every node at or above `leaves`, each before its parent."""
    if not isinstance(parent, Mapping):
        raise TypeError(
            f"parent: expected a mapping from node id to parent id (None for the root), found "
            f"{type(parent).__name__}; make one with dict(enumerate(...))"
        )
    inner = set(parent.values())
    depth: dict[int, int] = {}
    for leaf in leaves:
        if leaf in inner:
            raise ValueError(
                f"leaves: expected ids of nodes without children, found {leaf}, which has children; pass node "
                f"ids, not columns: tree.leaves[column]"
            )
        path: dict[int, None] = {}
        node: int | None = leaf
        while node is not None and node not in depth:
            if node in path:
                raise ValueError(f"parent: found node {node} above itself; expected None for the root")
            if node not in parent:
                raise ValueError(
                    f"parent: expected an entry for every node up to the root, whose parent is None; found "
                    f"none for node {node}, at or above leaf {leaf}"
                )
            path[node] = None
            node = parent[node]
        top = 0 if node is None else depth[node] + 1
        depth.update({node: top + step for step, node in enumerate(reversed(path))})
    roots = sorted(node for node, level in depth.items() if level == 0)
    if len(roots) > 1:
        raise ValueError(f"parent: expected one root, found {roots}; join them under a new node")
    return sorted(depth, key=depth.__getitem__, reverse=True)


def as_array(values: torch.Tensor | npt.ArrayLike) -> npt.NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)

"""Hierarchies of the clusters that a flat clustering has found, to compare trees with.

Letters: `N` rows, `K` clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treediff.tree.topology import TreeTopology

__all__ = ["logits_to_hierarchy", "topology_of_merges"]


def topology_of_merges(merges: Sequence[tuple[int, int]]) -> TreeTopology:
    """Return the tree of clusters that were merged two by two, from `K - 1` merges.

    The leaves have the numbers of the clusters, `0` to `K - 1`; merge `i` makes node `K + i`, as in
    `scipy.cluster.hierarchy`.

    Raises:
        ValueError: if a merge names a cluster that is not there, or no more.

    Examples:
        >>> topology_of_merges([(0, 2), (3, 1)])
        TreeTopology(4(3(0 2) 1), next_id=5)
    """
    clusters = len(merges) + 1
    there = set(range(clusters))
    for i, pair in enumerate(merges):
        if len(set(pair)) != 2 or not there.issuperset(pair):
            raise ValueError(f"merge {i} joins {tuple(pair)}, expected two of the clusters {sorted(there)}")
        there = there - set(pair) | {clusters + i}
    children: dict[int, tuple[int | None, int | None]] = {clusters + i: pair for i, pair in enumerate(merges)}
    return TreeTopology.from_children(children, root=2 * clusters - 2, next_id=2 * clusters - 1)


def logits_to_hierarchy(logits: Tensor) -> TreeTopology:
    r"""Build a tree of clusters from the logits of a flat clustering, bottom up (L2H).

    Row `n` belongs to cluster `c_n = argmax_k l_nk`, with probability `p_n = max_k softmax(l_n)_k`. In each step the
    group `g` of clusters with the least score `sum_{c in g} mean_{n: c_n = c} p_n` is merged. Its rows are assigned to
    the clusters outside of `g`, by the softmax over these alone, with probabilities `q_n`. The group whose clusters
    get the greatest mean of `sum q_n` is merged with `g`. A cluster without rows has the score 0.

    Args:
        logits: `(N, K)`, such as log-probabilities of a mixture, or of a classifier.

    Returns:
        the tree; its leaves have the numbers of the clusters, see `topology_of_merges`.

    Raises:
        TypeError: if the logits are not floating point.
        ValueError: if there is no row or no cluster, or a logit is not finite.

    Cost: `K - 1` steps over the rows of one group.

    Source: Palumbo et al., "From Logits to Hierarchies" (arXiv 2410.07858), Algorithm 1.

    Examples:
        >>> logits_to_hierarchy(torch.tensor([[4.0, 3.0, 0.0], [3.0, 4.0, 0.0], [0.0, 1.0, 9.0]]))
        TreeTopology(4(2 3(0 1)), next_id=5)
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"expected logits as a float tensor (N, K), found {getattr(logits, 'dtype', type(logits))}")
    if logits.ndim != 2 or not logits.numel() or not bool(logits.isfinite().all()):
        raise ValueError(f"expected finite logits (N, K) of at least one row, found shape {tuple(logits.shape)}")
    logits = logits.detach().double()
    clusters = logits.shape[1]
    prob, own = logits.softmax(1).max(1)
    scores = _sums(own, prob, clusters) / own.bincount(minlength=clusters).clamp_min(1)
    group, merges = torch.arange(clusters), []  # the node that each cluster is part of
    for node in range(clusters, 2 * clusters - 1):
        there = group.unique()
        total = _sums(group, scores, node)[there]
        least = int(there[total.argmin()])
        inside = group == least
        q, moved = logits[inside[own]].masked_fill(inside, -torch.inf).softmax(1).max(1)
        gained = _sums(group, _sums(moved, q, clusters), node) / group.bincount(minlength=node).clamp_min(1)
        others = there[there != least]
        best = int(others[gained[others].argmax()])
        merges.append((least, best))
        group[inside | (group == best)] = node
    return topology_of_merges(merges)


def _sums(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sum of values by index, `(size,)`."""
    return values.new_zeros(size).index_add_(0, index, values)

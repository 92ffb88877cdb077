"""Clustering metrics: pure functions over arrays.

The module has only metrics that no library has; for NMI and ARI use scikit-learn. Each function takes tensors, arrays
or sequences and computes exactly (integer counts, float64). The docstring of a function states the range and which end
is best. A *label* is the true class of a point, and a *cluster* or *leaf* is the assignment of the point by a model.
Only equality of ids matters, never their order or size.

Shape letters: `N` points, `C` classes, `K` clusters or leaves, `B` images.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from treediff.metrics._inputs import Counts, Ids, as_ids, as_probabilities, children_first, count_pairs, count_table

__all__ = [
    "cluster_accuracy",
    "dendrogram_purity",
    "effective_leaves",
    "leaf_perplexity",
    "leaf_purity",
]


def cluster_accuracy(labels: Ids, clusters: Ids) -> float:
    """Return the share of points that are right under the best one-to-one matching of clusters to classes.

    `max_m (1/N) sum_k n_{m(k), k}` over injective maps `m`, found exactly by scipy's solver. With more
    clusters than classes, or the reverse, the points of unmatched clusters or classes count as wrong.

    Args:
        labels: class of each point, integers `(N,)`.
        clusters: cluster of each point, integers `(N,)`.

    Returns:
        A share in (0, 1]; 1 is best.

    Raises:
        ImportError: scipy is missing.
        ValueError: an input is empty or not 1-D, or their lengths differ.
        TypeError: an input does not hold integers.

    Source: Yang et al., "Image clustering using local discriminant models and global integration", IEEE
    Transactions on Image Processing 2010.

    Examples:
        >>> cluster_accuracy([0, 0, 1, 1], [5, 5, 5, 2])
        0.75
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f"{error}; cluster_accuracy needs scipy: pip install 'treediff[metrics]'") from None
    table = count_table(labels, clusters, "clusters")
    return int(table[linear_sum_assignment(table, maximize=True)].sum()) / int(table.sum())


def leaf_purity(labels: Ids, leaves: Ids) -> float:
    """Return the share of points in the commonest class of their leaf, `sum_l (n_l / N) max_c n_cl / n_l`.

    Args:
        labels: class of each point, integers `(N,)`.
        leaves: leaf of each point, integers `(N,)`.

    Returns:
        A share in (0, 1]; 1 is best. Purity never falls when a leaf is split, so compare trees of equal size.

    Raises:
        ValueError: an input is empty or not 1-D, or their lengths differ.
        TypeError: an input does not hold integers.

    Source: Manduchi et al., "Tree Variational Autoencoders", NeurIPS 2023 (LP in its tables).

    Examples:
        >>> leaf_purity([0, 0, 1, 1], [4, 4, 4, 6])
        0.75
    """
    _, columns, counts = count_pairs(labels, leaves, "leaves")
    most = np.zeros(int(columns.max()) + 1, np.int64)
    np.maximum.at(most, columns, counts)
    return int(most.sum()) / int(counts.sum())


def dendrogram_purity(labels: Ids, leaves: Ids, parent: Mapping[int, int | None]) -> float:
    """Return the mean purity of the lowest common ancestor, over all pairs of distinct points of the same class.

    `(1/|P|) sum_{(i, j) in P} n_c(v) / n(v)`. `P` holds the unordered pairs `i != j` of the same class `c`. `v` is the
    lowest common ancestor of the leaves of a pair (the leaf itself if they are equal). `n(v)` counts the points under
    `v`, and `n_c(v)` the points of class `c` under `v`. A pair (i, i) does not count. A class with one point has no
    pairs and so no term, but its point still dilutes the nodes above the point.

    Counts replace pairs, so the cost is nodes x classes, plus one pass over the points.

    Args:
        labels: class of each point, integers `(N,)`.
        leaves: node id of each point's leaf, integers `(N,)`.
        parent: parent id of every node, None for the root, as in `TreeTopology.parents`. A node may have
            any number of children; pass-through nodes (one child) change nothing.

    Returns:
        A share in (0, 1]; 1 is best (every class is exactly one sub-tree).

    Raises:
        ValueError: an input is empty or not 1-D, their lengths differ, no class has two points, a leaf has
            children, or `parent` misses a node, has a cycle or has two roots.
        TypeError: an input does not hold integers, or `parent` is not a mapping.

    Source: Heller and Ghahramani, "Bayesian hierarchical clustering", ICML 2005; Kobren et al., "A
    hierarchical algorithm for extreme clustering", KDD 2017.

    Examples:
        >>> parent = {0: None, 1: 0, 2: 0, 3: 2, 4: 2}
        >>> dendrogram_purity([0, 0, 1, 1], [1, 1, 3, 4], parent)
        1.0
        >>> dendrogram_purity([0, 1, 0, 1], [1, 1, 3, 4], parent)
        0.5
    """
    table = count_table(labels, leaves, "leaves")
    all_pairs = int(_pairs(table.sum(1)).sum())
    if all_pairs == 0:
        raise ValueError(
            f"dendrogram purity is a mean over pairs of the same class: expected a class with at least two "
            f"points, found {len(table)} with one each; score more points"
        )
    leaf_ids = np.unique(as_ids(leaves, "leaves")).tolist()
    nodes = children_first(leaf_ids, parent)
    under = {node: np.zeros(len(table), np.int64) for node in nodes}
    pairs_below = {node: np.zeros(len(table), np.int64) for node in nodes}
    for leaf, counts in zip(leaf_ids, table.T, strict=True):
        under[leaf] += counts
    purity = 0.0
    for node in nodes:
        counts, pairs = under[node], _pairs(under[node])
        purity += float((pairs - pairs_below[node]) @ (counts / counts.sum()))
        above = parent[node]
        if above is not None:
            under[above] += counts
            pairs_below[above] += pairs
    return purity / all_pairs


def effective_leaves(probs: torch.Tensor | npt.ArrayLike, *, min_share: float = 0.01) -> int:
    """Count the leaves that are in use, `|{l : (1/B) sum_i P(l | x_i) >= min_share}|`.

    Args:
        probs: leaf probabilities `P(l | x_i)`, `(B, K)`, each row summing to one (within 0.001).
        min_share: smallest mean probability of a leaf in use, in [0, 1]. The default is TreeVAE's 1 %.

    Returns:
        A count in 0..K. No end is best: `K` means that no leaf is empty, less means that some leaves could be pruned.

    Raises:
        ValueError: `probs` is not `(B, K)` probabilities, or `min_share` lies outside [0, 1].
        TypeError: `probs` does not hold real numbers.

    Source: Manduchi et al., "Tree Variational Autoencoders", NeurIPS 2023 (the stopping rule of its growth).

    Examples:
        >>> effective_leaves([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
        2
    """
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share: expected a share of the images, in [0, 1], found {min_share}")
    shares = as_probabilities(probs).mean(0)
    # In float32, a leaf that holds exactly min_share counts, however the mean was rounded.
    return int(np.count_nonzero(shares.astype(np.float32) >= np.float32(min_share)))


def leaf_perplexity(probs: torch.Tensor | npt.ArrayLike) -> float:
    """Return the effective leaves per image, the mean perplexity of `P(leaf | x)`: `(1/B) sum_i exp(H(P(. | x_i)))`.

    Args:
        probs: leaf probabilities `P(l | x_i)`, `(B, K)`, each row summing to one (within 0.001).

    Returns:
        A number of leaves in [1, K]. 1: every image goes to one leaf (routers are sharp); K: all leaves are
        equally likely for every image. Low is best for clustering, if `effective_leaves` stays high.

    Raises:
        ValueError: `probs` is not `(B, K)` probabilities.
        TypeError: `probs` does not hold real numbers.

    Source: Hill, "Diversity and evenness", Ecology 1973 (the number of order 1).

    Examples:
        >>> leaf_perplexity([[1.0, 0.0], [0.5, 0.5]])
        1.5
    """
    p = as_probabilities(probs)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)
    return float(np.exp(entropy).mean())


def _pairs(counts: Counts) -> Counts:
    return counts * (counts - 1) // 2

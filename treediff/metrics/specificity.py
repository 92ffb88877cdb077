"""Specificity of clusters: how well generated images match the cluster they were drawn from.

The metrics take images with a known leaf, from which they were drawn. `cluster_specificity` measures whether a
classifier trained on real images predicts one class per leaf. `return_rate` measures whether the tree itself assigns
the encoded images to their leaf again.

Letters: `n` images, `K` leaves, `C` classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from treediff.core.checks import check_positive
from treediff.metrics._inputs import SUM_TOLERANCE, Ids, as_array, as_ids

__all__ = ["ClusterSpecificity", "ReturnRate", "cluster_specificity", "return_rate"]

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClusterSpecificity:
    """Classes predicted for the images of each leaf; see `cluster_specificity`.

    A leaf without images has rows and numbers of 0 here and is left out of the means.

    Args:
        counts: `(K,)` int64, images per leaf; rows of few images are unreliable.
        histogram: `(K, C)` share of each class among the images of a leaf; rows sum to 1.
        entropy: `(K,)` nats in [0, log C]; 0 means that all images of a leaf are of one class. Lower is better.
        purity: `(K,)` largest share, in [1/C, 1]. Higher is better.
        mean_entropy: mean over leaves, in [0, log C] nats. Lower is better.
        mean_purity: mean over leaves, in [1/C, 1]. Higher is better.
        mutual_information: between leaf and class, in [0, log min(K, C)] nats. Higher is better; 0 means that
            the class does not depend on the leaf.
    """

    counts: npt.NDArray[np.int64]
    histogram: Floats
    entropy: Floats
    purity: Floats
    mean_entropy: float
    mean_purity: float
    mutual_information: float


@dataclass(frozen=True)
class ReturnRate:
    """Share of samples that are assigned to their leaf again; see `return_rate`.

    Args:
        overall: over all samples, in [0, 1]. Higher is better.
        per_leaf: share of each leaf that has samples, by the id of the leaf, in ascending order of ids.
    """

    overall: float
    per_leaf: dict[int, float]


def cluster_specificity(
    leaf: Ids,
    predicted: Ids | npt.ArrayLike,
    *,
    leaves: Ids,
    classes: int,
    weights: torch.Tensor | npt.ArrayLike | None = None,
) -> ClusterSpecificity:
    """Compare the classes of images drawn from different leaves.

    With `h_l` the mean class distribution of the images of leaf `l`, and `w_l` the weight of the leaf,

        H_l = -sum_c h_lc log h_lc        purity_l = max_c h_lc
        I(leaf; class) = H(sum_l w_l h_l) - sum_l w_l H_l

    A class may be split between leaves at no cost; a leaf that mixes classes costs. Few images make entropies too small
    and the information too large, by about (K - 1)(C - 1) / (2n) nats.

    Args:
        leaf: id of the leaf that each image was drawn from, integers `(n,)`.
        predicted: class that a classifier of real images predicts for each, integers `(n,)` from 0 to C - 1, or its
            class probabilities `(n, C)`. With probabilities, uncertainty about single images counts as mixing too.
        leaves: ids of all leaves, integers `(K,)` without duplicates, in the order of the rows of the result, such as
            `tree.leaves`.
        classes: number of classes `C`.
        weights: probability of each leaf, `(K,)`, such as the mean prior probability; scaled to sum to 1 over the
            leaves that have images. By default each leaf's share of the images.

    Returns:
        Histogram, entropy and purity of each leaf, and their means; `ClusterSpecificity` states directions and ranges.

    Raises:
        TypeError: if ids or the number of classes are not integers, or probabilities not real numbers.
        ValueError: if lengths or shapes do not fit, there is no image, an id is unknown or listed twice, a class is out
            of range, rows of probabilities do not sum to 1 (within 0.001), or weights are negative or all 0.

    Source: the histograms per leaf of TreeDiffusion (arXiv 2410.16910, fig. 5); the numbers are from information
    theory, Cover and Thomas, "Elements of information theory", 2006, chapter 2.

    Examples:
        >>> found = cluster_specificity([3, 3, 4, 4], [0, 0, 0, 1], leaves=[3, 4], classes=2)
        >>> found.histogram
        array([[1. , 0. ],
               [0.5, 0.5]])
        >>> found.mean_purity, round(found.mutual_information, 4)
        (0.75, 0.2158)
    """
    check_positive(classes=classes)
    row = _rows(as_ids(leaf, "leaf"), as_ids(leaves, "leaves"))
    counts = np.bincount(row, minlength=len(leaves)).astype(np.int64)
    totals = _class_totals(row, predicted, len(leaves), classes)
    histogram = totals / np.maximum(counts, 1)[:, None]
    entropy, purity = _entropy(histogram), histogram.max(1)
    w = _weights(counts, weights)
    mean_entropy = float(w @ entropy)
    return ClusterSpecificity(
        counts=counts,
        histogram=histogram,
        entropy=entropy,
        purity=purity,
        mean_entropy=mean_entropy,
        mean_purity=float(w @ purity),
        # Independence may miss 0 by rounding.
        mutual_information=max(0.0, float(_entropy(w @ histogram)) - mean_entropy),
    )


def return_rate(leaf: Ids, encoded: Ids) -> ReturnRate:
    """Return the share of samples that are encoded to the leaf they were drawn from. No labels are needed.

    `(1/n) |{i : encoded_i = leaf_i}|`, over all samples and over the samples of each leaf. Real images were not drawn
    from a leaf, and so give no reference. Compare with chance, the share of encoded images in a leaf.

    Args:
        leaf: id of the leaf that each sample was drawn from, integers `(n,)`.
        encoded: id of the leaf that the model assigns each sample to, integers `(n,)`, such as `model.cluster(images)`.

    Returns:
        Shares in [0, 1]; 1 is best.

    Raises:
        TypeError: if an input does not hold integers.
        ValueError: if an input is empty or not 1-D, or their lengths differ.

    Examples:
        >>> return_rate([3, 3, 4, 4], [3, 4, 4, 4])
        ReturnRate(overall=0.75, per_leaf={3: 0.5, 4: 1.0})
    """
    drawn, back = as_ids(leaf, "leaf"), as_ids(encoded, "encoded")
    _check_length(len(drawn), len(back), "encoded leaves")
    same = drawn == back
    ids, column = np.unique(drawn, return_inverse=True)
    rates = np.bincount(column, weights=same) / np.bincount(column)
    return ReturnRate(float(same.mean()), dict(zip(ids.tolist(), rates.tolist(), strict=True)))


def _rows(leaf: npt.NDArray[np.integer[Any]], leaves: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.intp]:
    """Return the position of each image's leaf among the leaves."""
    order = np.argsort(leaves)
    ids = leaves[order]
    if (ids[1:] == ids[:-1]).any():
        raise ValueError(f"leaves: expected every leaf once, found {leaves.tolist()}; remove the duplicates")
    place = np.searchsorted(ids, leaf).clip(max=len(ids) - 1)
    unknown = ids[place] != leaf
    if unknown.any():
        raise ValueError(
            f"leaf: expected ids among leaves, {leaves.tolist()}, found {leaf[unknown][0]}; pass node ids, not "
            "columns: tree.leaves[column]"
        )
    rows: npt.NDArray[np.intp] = order[place]
    return rows


def _class_totals(row: npt.NDArray[np.intp], predicted: Any, leaves: int, classes: int) -> Floats:  # noqa: ANN401
    """Count the images, or add up the probability, of each class in each leaf, `(K, C)`."""
    if np.ndim(predicted) == 2:
        probs = _class_probabilities(predicted, len(row), classes)
        totals: Floats = (np.arange(leaves)[:, None] == row).astype(np.float64) @ probs
        return totals
    found = as_ids(predicted, "predicted").astype(np.int64)
    _check_length(len(row), len(found), "predictions")
    if found.min() < 0 or found.max() >= classes:
        wrong = found.min() if found.min() < 0 else found.max()
        raise ValueError(
            f"predicted: expected classes from 0 to {classes - 1}, found {wrong}; is classes={classes} right?"
        )
    cells = np.bincount(row * classes + found, minlength=leaves * classes)
    return cells.reshape(leaves, classes).astype(np.float64)


def _class_probabilities(predicted: Any, images: int, classes: int) -> Floats:  # noqa: ANN401
    p = _as_floats(predicted)
    if p.shape != (images, classes):
        raise ValueError(
            f"predicted: expected probabilities of {classes} classes for each of {images} images, found shape {p.shape}"
        )
    sums = p.sum(1, keepdims=True)
    # Written so that NaN is refused as well.
    if not ((p >= 0).all() and (abs(sums - 1) <= SUM_TOLERANCE).all()):
        raise ValueError(
            f"predicted: expected rows of probabilities that sum to 1 (within {SUM_TOLERANCE}), found values from "
            f"{p.min():.4g} to {p.max():.4g} and sums from {sums.min():.4g} to {sums.max():.4g}; take the softmax of "
            "logits in float32 or better"
        )
    p /= sums
    return p


def _weights(counts: npt.NDArray[np.int64], weights: torch.Tensor | npt.ArrayLike | None) -> Floats:
    """Return weights of the leaves that have images, summing to 1."""
    w: Floats = counts.astype(np.float64)
    if weights is not None:
        w = _as_floats(weights)
        if w.shape != counts.shape or not (np.isfinite(w).all() and (w >= 0).all()):
            raise ValueError(
                f"weights: expected one finite number of at least 0 per leaf, ({len(counts)},), found {w} of shape "
                f"{w.shape}; take .exp() of log-probabilities"
            )
        w = np.where(counts > 0, w, 0)
    total = w.sum()
    if total == 0:
        raise ValueError("weights: expected a leaf with images and a weight above 0, found none; draw from more leaves")
    w = w / total
    return w


def _entropy(p: Floats) -> Floats:
    """Compute entropies in nats over the last axis; 0 log 0 is 0."""
    # Subtracted from 0, since a minus sign would give -0 for leaves of one class.
    entropy: Floats = 0.0 - (p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return entropy


def _as_floats(values: Any) -> Floats:  # noqa: ANN401
    return np.array(as_array(values), np.float64)


def _check_length(images: int, found: int, what: str) -> None:
    if images != found:
        raise ValueError(
            f"expected one of each per image, found {images} leaves and {found} {what}; pass both for the same images "
            "in the same order"
        )

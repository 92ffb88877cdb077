"""Metrics of clustering and of generation. Each docstring states the range and which end is best.

`clustering` compares leaves with labels. `frechet` measures how far generated images are from real images, and
`specificity` how well generated images match the leaf they were drawn from. Both use the features or predictions of a
network such as the `FeatureClassifier` here, trained on the real images.
"""

from treediff.metrics.classifier import FeatureClassifier
from treediff.metrics.clustering import (
    cluster_accuracy,
    dendrogram_purity,
    effective_leaves,
    leaf_perplexity,
    leaf_purity,
)
from treediff.metrics.frechet import FeatureStatistics, frechet_bootstrap, frechet_distance
from treediff.metrics.specificity import ClusterSpecificity, ReturnRate, cluster_specificity, return_rate

__all__ = [
    "ClusterSpecificity",
    "FeatureClassifier",
    "FeatureStatistics",
    "ReturnRate",
    "cluster_accuracy",
    "cluster_specificity",
    "dendrogram_purity",
    "effective_leaves",
    "frechet_bootstrap",
    "frechet_distance",
    "leaf_perplexity",
    "leaf_purity",
    "return_rate",
]

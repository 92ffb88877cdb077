"""Structure learning: how a tree of clusters grows, stage by stage."""

from treediff.growth.annealing import KLAnnealing
from treediff.growth.growth import TreeGrowth
from treediff.growth.hierarchy import logits_to_hierarchy, topology_of_merges
from treediff.growth.policy import LeafStatistics
from treediff.growth.stage import Stage

__all__ = ["KLAnnealing", "LeafStatistics", "Stage", "TreeGrowth", "logits_to_hierarchy", "topology_of_merges"]

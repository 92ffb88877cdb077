"""Trees as data: topology, index tables, visits, and the algebra of path probabilities. No parameters."""

from treediff.tree.plan import TreePlan
from treediff.tree.topology import TreeTopology
from treediff.tree.visits import Visits, descend

__all__ = ["TreePlan", "TreeTopology", "Visits", "descend"]

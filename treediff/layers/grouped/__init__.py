"""Networks of nodes, one per node, computed together."""

from treediff.layers.grouped.bank import NodeBank
from treediff.layers.grouped.call import grouped_call, grouped_linear

__all__ = ["NodeBank", "grouped_call", "grouped_linear"]

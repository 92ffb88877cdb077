"""Networks of nodes, one per node, computed together.

`bank` stores the weights of each node and stacks those of the queried nodes; `call` runs a template layer by layer;
`_steps` computes a layer for all groups, with the products in `_products` and the geometry in `_conv`. Autograd records
all of it, so gradients have gradients. A layer without a step runs in a plain loop over groups (`call._each_group`),
which is also the oracle of the tests.
"""

from treediff.layers.grouped.bank import NodeBank
from treediff.layers.grouped.call import grouped_call, grouped_linear

__all__ = ["NodeBank", "grouped_call", "grouped_linear"]

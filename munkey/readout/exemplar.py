"""A transformer that reads the input beside the value of each neighbour, and its training.

Letters: `B` inputs, `k` neighbours, `V` width of a value, `n` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from munkey.readout.aggregate import Aggregation, Attend, Ensemble, Retrieved
from munkey.readout.base import Memory, Query, Readout, with_no_opinion
from munkey.readout.transformer import ExemplarTransformer
from munkey.task import Classification, Task
from treediff.core.checks import check_positive

__all__ = ["ExemplarReadout"]


class ExemplarReadout(Readout):
    """The predictions of a transformer beside the values of the neighbours, combined by an aggregation.

    There are two pathways, the input and the exemplar. Each has a learned null, which replaces a pathway that is
    dropped in training or switched off.

    In training an instance reads its own value, or the value of a neighbour. A value of a neighbour is read without its
    gradient: only the loss of an instance itself changes its value, so that no value learns anything of another
    instance.

    Deletion: a deleted row has no value and is no neighbour. The weights stay; see the modes of `KeyMemoryTransformer`.

    Args:
        network: the transformer.
        task: kind of label; one of `network.outputs` classes if not given.
        aggregation: combines several neighbours into one prediction; `Ensemble` if not given.
        neighbours: `k`.
        own_token_probability: share of the instances in training that read their own value. All others read values of
            their neighbours, without their own.
        drop_input: share of the instances whose input is hidden in training.
        drop_exemplar: share of the instances whose exemplar is hidden; input and exemplar are never both hidden.
        stop_gradient: whether values of neighbours are read without their gradient. If False, a value also learns from
            instances nearby, which forgets less: see docs/results/munkey.md.
        sparse: whether gradients of values are sparse, for optimisers like SparseAdam, whose cost follows the batch.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a share is out of range, or network and task do not fit.

    Attributes:
        known: `(n,)` classes that were trained on; all, unless `KeyMemoryTransformer.fit_readout` found some that were
            not. Of others the transformer has no opinion in a mixture, so that new classes can be learned by others.

    Source: MUNKEY (arXiv 2603.15033); reading neighbours in training, without gradient, is ours.
    """

    deletion = "weights"
    known: Tensor

    def __init__(
        self,
        network: ExemplarTransformer,
        *,
        task: Task | None = None,
        aggregation: Aggregation | None = None,
        neighbours: int = 4,
        own_token_probability: float = 1.0,
        drop_input: float = 0.2,
        drop_exemplar: float = 0.2,
        stop_gradient: bool = True,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_positive(neighbours=neighbours)
        self.task = Classification(network.outputs) if task is None else task
        if self.task.outputs != network.outputs:
            raise ValueError(
                f"the task {self.task} needs a network of {self.task.outputs} outputs, found {network.outputs}"
            )
        shares = {"own_token_probability": own_token_probability}
        shares |= {"drop_input": drop_input, "drop_exemplar": drop_exemplar}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {share}")
        if drop_input + drop_exemplar > 1:
            raise ValueError(
                f"drop_input and drop_exemplar must add up to 1 at most, found {drop_input} and {drop_exemplar}"
            )
        self.own_token_probability = float(own_token_probability)
        self.drop_input, self.drop_exemplar = float(drop_input), float(drop_exemplar)
        self.neighbours, self.stop_gradient, self.sparse = int(neighbours), bool(stop_gradient), bool(sparse)
        self.network, self.aggregation = network, aggregation or Ensemble()
        self.register_buffer("known", torch.ones(network.outputs, dtype=torch.bool, device=network.start.device))

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs of the network."""
        self.network.tokens.check(x)

    def forward(self, query: Query) -> Tensor:
        """Return outputs `(B, n)`; a pathway that the query switches off is replaced by its null."""
        network, x, memory = self.network, query.inputs, query.memory
        inputs = network.tokens(x) if query.use_input else network.null_input.expand(len(x), -1, -1)
        if not query.use_memory:
            outputs: Tensor = network(inputs, memory.null.expand(len(x), 1, -1)).squeeze(1)
        else:
            found = query.retrieved(self.neighbours)
            outputs = self.aggregation(found, lambda *values: network(inputs, *values), self.task.average)
        return with_no_opinion(outputs, self.known)

    def loss(
        self, memory: Memory, x: Tensor, targets: Tensor, ids: list[int], *, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean loss of the task, a scalar; arguments are those of `KeyMemoryTransformer.loss`, checked."""
        uniform = torch.rand(4, len(x), generator=generator, device=x.device)
        hidden, alone = uniform[0] < self.drop_input, uniform[0] >= 1 - self.drop_exemplar
        network = self.network
        inputs = torch.where(hidden[:, None, None], network.null_input, network.tokens(x))
        values, there = self._values(memory, ids, uniform, alone)
        mask = Attend.read(there)[:, None] if isinstance(self.aggregation, Attend) else None
        return self.task.losses(network(inputs, values[:, None], mask).squeeze(1), targets).mean()

    def nulls(self) -> Iterator[Tensor]:
        """Return the learned tokens, which are vectors although some have two dimensions."""
        yield from (self.network.start, self.network.null_input)

    def _values(self, memory: Memory, ids: list[int], uniform: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values `(B, j, V)` that each instance is trained with, and which of them there are `(B, j)`.

        A hidden exemplar, and a value that there is not, is the null token.

        Only rows in use are read, since a sparse optimiser changes every row that was read.
        """
        rows = memory.store.one_row_of_each(ids, uniform[2])
        if self.own_token_probability == 1:
            rows = torch.where(alone, -1, rows)[:, None]
            return memory.read(rows, sparse=self.sparse), rows >= 0
        near, scores = memory.neighbours_of_rows(rows, self.neighbours)
        own = (uniform[1] < self.own_token_probability) & ~alone
        if isinstance(self.aggregation, Ensemble):
            pick = self.aggregation.pick(near >= 0, uniform[3])
            near, scores = near.gather(1, pick[:, None]), scores.gather(1, pick[:, None])
        near = torch.where((own | alone)[:, None], -1, near)
        tokens = memory.read(near, sparse=self.sparse, frozen=self.stop_gradient)
        found = Retrieved(tokens, scores.masked_fill(near < 0, -torch.inf), near)
        theirs = tokens if isinstance(self.aggregation, Ensemble) else self.aggregation.one(found, uniform[3])
        mine = F.pad(rows[:, None], (0, theirs.shape[1] - 1), value=-1)
        read = memory.read(torch.where(own[:, None], mine, -1), sparse=self.sparse)
        there = torch.where(own[:, None], mine >= 0, near[:, : theirs.shape[1]] >= 0)
        return torch.where(own[:, None, None], read, theirs), there

"""A transformer that keeps what is particular to an instance in a memory, from where it can be deleted.

It follows the published description of MUNKEY (arXiv 2603.15033): a frozen encoder gives each training instance a key,
the instance owns a value, and the classifier reads values of nearest keys beside the tokens of the input. Forgetting an
instance deletes its key, value and label from the memory; no weight changes. What the paper leaves open is a parameter.

Letters: `B` batch, `C H W` image, `D` width of a key, `V` width of a value, `k` neighbours, `n` classes, `S` tokens of
an input, `W` their width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.encoders.base import KeyEncoder
from munkey.memory import KeyValueMemory
from munkey.modes import check_exact, check_mode, check_shares
from munkey.presets import Presets
from munkey.readout.aggregate import Aggregation, Ensemble, Retrieved
from munkey.readout.transformer import ExemplarTransformer
from munkey.saved import Saved
from munkey.sharded import ShardedKeyStore
from munkey.sharded.ranks import Ranks
from munkey.store.checks import check_labels, check_width, ordered_ids
from munkey.store.receipts import Receipt
from treediff import EMA

__all__ = ["KeyMemoryTransformer"]


class KeyMemoryTransformer(Presets, Saved, nn.Module):
    """A classifier with a pathway for the input and one for the memory.

    The transformer sees a class token, the tokens of the input, and one exemplar token, the projected value of a
    neighbour. Both pathways have a learned null, which stands in where one is dropped in training or switched off.

    There are two ways to train, which promise different things:

    - *paper*: weights and values learn together on all instances. Deleting an instance leaves the same weights beside a
      memory that never held it; the weights have seen it, and what they kept must be measured.
    - *exact*: weights learn on instances that stay for good; any other one gets its value written from key and label.
      Deleting it leaves a model that is equal, bit for bit, to one that never saw it. The encoder must not have been
      fitted to it either.

    Args:
        key_encoder: from inputs to keys, frozen.
        memory: keys and values of instances; with a writer in exact mode.
        network: the transformer.
        mode: 'paper' or 'exact'.
        aggregation: what is made of several neighbours.
        neighbours: `k`, how many are asked.
        own_token_probability: how often in training an instance is given its own value, rather than its neighbours',
            itself left out; in exact mode always 0, as its value holds its label.
        drop_input: share of the instances whose input is hidden in training.
        drop_exemplar: share whose exemplar is hidden; never both.
        sparse: whether gradients of values are sparse, for optimisers like SparseAdam, whose cost follows the batch.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if encoder, memory and network do not fit together, a share is out of range, or exact mode would not
            be exact.
    """

    def __init__(
        self,
        *,
        key_encoder: KeyEncoder,
        memory: KeyValueMemory,
        network: ExemplarTransformer,
        mode: str = "paper",
        aggregation: Aggregation | None = None,
        neighbours: int = 4,
        own_token_probability: float | None = None,
        drop_input: float = 0.2,
        drop_exemplar: float = 0.2,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_width(neighbours=neighbours)
        if key_encoder.width != memory.store.widths[0]:
            raise ValueError(
                f"the encoder gives keys of width {key_encoder.width}, the memory has {memory.store.widths[0]}"
            )
        if network.value_width != memory.store.widths[1]:
            raise ValueError(
                f"the network reads values of width {network.value_width}, the memory has {memory.store.widths[1]}"
            )
        self.mode = check_mode(mode, key_encoder, memory)
        own = (1.0 if mode == "paper" else 0.0) if own_token_probability is None else own_token_probability
        check_shares(mode, own_token_probability=own, drop_input=drop_input, drop_exemplar=drop_exemplar)
        self.neighbours, self.sparse = neighbours, sparse
        self.own_token_probability, self.drop_input, self.drop_exemplar = own, drop_input, drop_exemplar
        self.key_encoder = key_encoder.requires_grad_(False)
        self.memory, self.network, self.aggregation = memory, network, aggregation or Ensemble()
        self.config = None

    # --- running ------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        use_input: bool = True,
        use_memory: bool = True,
        exclude_ids: Iterable[int] | Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """`(B, n)` logits.

        Args:
            x: `(B, ...)` inputs.
            use_input: whether the transformer sees the input; without it, the memory pathway alone.
            use_memory: whether it sees neighbours; without them, the input pathway alone.
            exclude_ids: `(B,)` for each input an id whose rows are not to be found, such as its own.
            keys: `(B, D)` what the key encoder makes of the inputs, if it is at hand.

        Raises:
            TypeError: if the inputs are no floating-point tensor, or `exclude_ids` has no order, as a set.
            ValueError: if they have another shape than the model was built for, or are not finite.
        """
        self.network.tokens.check(x)
        inputs = self.network.tokens(x) if use_input else self.network.null_input.expand(len(x), -1, -1)
        if not use_memory:
            nothing: Tensor = self.network(inputs, self.memory.null.expand(len(x), 1, -1))
            return nothing.squeeze(1)
        if self.mode == "exact" and self.training and torch.is_grad_enabled():
            check_exact(self.memory.store)
        own = None if exclude_ids is None else ordered_ids(exclude_ids)
        queries = self.key_encoder(x) if keys is None else keys
        found = self.memory(queries, self.neighbours, exclude_ids=own)
        logits: Tensor = self.aggregation(found, lambda values: self.network(inputs, values))
        return logits

    # --- training -----------------------------------------------------------------------------------------

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        ids: Iterable[int] | Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats, a scalar, each instance beside its own value or beside its neighbours'.

        Args:
            x: `(B, ...)` inputs.
            labels: `(B,)` int64, from 0 to `n - 1`.
            ids: `(B,)` what each of them is in the memory.
            generator: decides which pathways are dropped, and whose value is read; `dropout` inside of blocks, if there
                is any, draws from PyTorch's global generator.

        Raises:
            KeyError: if an id is not in the memory.
            TypeError: as for `forward`, or if labels are no int64 tensor, or ids have no order, as a set.
            ValueError: as for `forward`, or if a label is out of range; in exact mode also if the memory holds
                something that can be forgotten.
        """
        self.network.tokens.check(x)
        wanted = ordered_ids(ids)
        if len(wanted) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(wanted)}")
        if not wanted:
            raise ValueError("a loss is the mean over instances; found none")
        check_labels(labels, len(x), self.network.num_classes)
        if self.mode == "exact":
            check_exact(self.memory.store)
        uniform = torch.rand(4, len(x), generator=generator, device=x.device)
        hidden, alone = uniform[0] < self.drop_input, uniform[0] >= 1 - self.drop_exemplar
        inputs = torch.where(hidden[:, None, None], self.network.null_input, self.network.tokens(x))
        values = self._values(wanted, uniform, alone)
        return F.cross_entropy(self.network(inputs, values[:, None]).squeeze(1), labels)

    def _values(self, wanted: list[int], uniform: Tensor, alone: Tensor) -> Tensor:
        """`(B, V)` the value each instance is trained beside; the null token where it is alone.

        Only rows that are used are read, since a sparse optimiser moves all that were.
        """
        memory, store = self.memory, self.memory.store
        rows = store.one_row_of_each(wanted, uniform[2])
        if self.own_token_probability == 1:
            return memory.read(torch.where(alone, -1, rows), sparse=self.sparse)
        near, scores = memory.neighbours_of_rows(rows, self.neighbours)
        own = uniform[1] < self.own_token_probability
        if isinstance(self.aggregation, Ensemble):
            pick = self.aggregation.pick(near >= 0, uniform[3])
            rows = torch.where(own, rows, near.gather(1, pick[:, None]).squeeze(1))
            return memory.read(torch.where(alone, -1, rows), sparse=self.sparse)
        theirs = torch.where((own | alone)[:, None], -1, near)
        tokens = memory.read(theirs, sparse=self.sparse)
        found = Retrieved(tokens, scores.masked_fill(theirs < 0, -torch.inf), theirs)
        mine = memory.read(torch.where(own & ~alone, rows, -1), sparse=self.sparse)
        return torch.where((own & ~alone)[:, None], mine, self.aggregation.one(found, uniform[3]))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All trained weights but the values, for an optimiser: matrices with decay, vectors and nulls without.

        Values are trained by an optimiser of their own: decay would move rows that no instance of the batch owns, and
        `SparseAdam([model.memory.store.values])`, with `sparse=True`, costs no more than the rows of a batch.

        Args:
            weight_decay: of the matrices.
        """
        values = self.memory.store.values
        trained = [weight for weight in self.parameters() if weight.requires_grad and weight is not values]
        nulls = (self.network.start, self.network.null_input, self.memory.null)
        plain = [weight for weight in trained if weight.ndim < 2 or any(weight is null for null in nulls)]
        decayed = [weight for weight in trained if all(weight is not other for other in plain)]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

    def shard(self, group: dist.ProcessGroup | None = None) -> None:
        """Spread the memory over the ranks of a group, all of which have the same model; see `KeyValueMemory.shard`.

        It is saved as a folder from then on, which any number of ranks can load; one rank has an ordinary memory again.

        Raises:
            ValueError: as there, and if ranks have other key encoders.
        """
        Ranks(group).same("fingerprint of the key encoder", self.key_encoder.fingerprint())
        self.memory.shard(group)

    def attach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Tell the memory what else keeps something of its values; see `KeyStore.attach`."""
        self.memory.store.attach(*holders)

    # --- remembering and forgetting -----------------------------------------------------------------------

    def remember(
        self,
        ids: Iterable[int] | Tensor,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        permanent: bool = False,
        keys: Tensor | None = None,
    ) -> None:
        """Give instances a row each; errors as for `KeyStore.add` and `loss`.

        Args:
            ids: `(B,)` int64, new ones.
            x: `(B, ...)` inputs.
            labels: `(B,)` int64, kept beside the keys; in exact mode they are needed.
            permanent: whether they are there for good: in exact mode, whether weights may be trained on them.
            keys: `(B, D)` what `key_encoder.keys` makes of the inputs, if it is at hand.
        """
        store = self.memory.store
        if isinstance(store, ShardedKeyStore):  # an error of one rank is raised on all, which would wait for it
            wanted, found = store.ranks.agree(lambda: self._to_remember(ids, x, labels, keys))
        else:
            wanted, found = self._to_remember(ids, x, labels, keys)
        try:
            self.memory.remember(wanted, found, labels, permanent=permanent)
        finally:
            if keys is None:
                found.zero_()  # a copy of rows that may be forgotten later

    def _to_remember(
        self, ids: Iterable[int] | Tensor, x: Tensor, labels: Tensor | None, keys: Tensor | None
    ) -> tuple[list[int], Tensor]:
        """Ids and keys, once all is as it must be."""
        self.network.tokens.check(x)
        if labels is not None:
            check_labels(labels, len(x), self.network.num_classes)
        elif self.mode == "exact":
            raise ValueError("in exact mode a value is written from key and label; pass labels")
        wanted = ordered_ids(ids)
        if len(wanted) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(wanted)}")
        return wanted, self.key_encoder.keys(x) if keys is None else keys

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Delete instances from the memory, at once and without their data; see `KeyStore.forget`.

        Afterwards the model is what it would be had it never stored them: the same weights beside a memory without
        them. Only in exact mode are those weights what they would be, too.
        """
        return self.memory.forget(ids, missing=missing)

    def find_near_duplicates(
        self, ids: Iterable[int] | Tensor, threshold: float = 0.99
    ) -> dict[int, list[tuple[int, float]]]:
        """Twins that would still answer for instances once these are forgotten; see `KeyValueMemory`."""
        return self.memory.find_near_duplicates(ids, threshold)

"""A transformer that keeps what is particular to an instance in a memory, from which an instance can be deleted.

The model follows the published description of MUNKEY (arXiv 2603.15033). A frozen encoder computes a key for each
training instance, and the instance owns a value. The classifier reads the values of the nearest keys beside the tokens
of the input. Forgetting an instance deletes its key, value and label from the memory; no weight changes. Choices that
the paper leaves open are parameters.

Letters: `B` batch, `C H W` image, `D` width of a key, `V` width of a value, `k` neighbours, `n` classes, `S` tokens of
an input, `W` their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from munkey import io
from munkey.encoders.base import KeyEncoder, check_encoder
from munkey.encoders.identity import Identity
from munkey.memory import KeyValueMemory
from munkey.presets import DEFAULTS, OF_NETWORK, Settings, feature_parts, model_parts, patch_for
from munkey.readout.aggregate import Aggregation, Ensemble, Retrieved
from munkey.readout.base import Query, Readout
from munkey.readout.mixture import Mixture, fitted_weights
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.readout.transformer import ExemplarTransformer
from munkey.search.exact import Search
from munkey.sharded import ShardedKeyStore
from munkey.sharded.ranks import Ranks
from munkey.store.checks import ordered_ids
from munkey.store.receipts import Receipt
from munkey.store.store import KeyStore
from munkey.task import Classification, Task
from treediff.core.checks import check_batch, check_positive, check_size
from treediff.core.ema import EMA
from treediff.core.io import Path, record
from treediff.core.noise import drawing_from

__all__ = ["KeyMemoryTransformer"]


class KeyMemoryTransformer(nn.Module):
    """A classifier with a pathway for the input and a pathway for the memory.

    The transformer reads a class token, the tokens of the input, and one exemplar token, the projected value of a
    neighbour. Each pathway has a learned null, which replaces a pathway that is dropped in training or switched off.

    In place of the transformer a model may have a readout that learns nothing, such as votes of neighbours and a linear
    head on exact sums; see `for_features` and `munkey.readout`.

    There are two modes of training, with different guarantees:

    - *paper*: weights and values are trained together on all instances. Deleting an instance leaves the same weights
      beside a memory that never held the instance. The weights were trained on the instance; what the weights kept
      must be measured.
    - *exact*: weights are trained on permanent instances only. Every other instance gets a value computed from its key
      and label. Deleting the instance leaves a model that is equal, bit for bit, to a model that never had the
      instance. The encoder must not have been fitted to the instance either.

    Args:
        key_encoder: from inputs to keys, frozen.
        memory: keys and values of instances; with a writer in exact mode.
        network: the transformer.
        readout: prediction from key and neighbours, in place of the transformer.
        task: kind of label that is predicted; one of `network.outputs` classes if not given.
        mode: 'paper' or 'exact'.
        aggregation: combines several neighbours into one prediction; `Ensemble` if not given.
        neighbours: `k`, number of retrieved rows.
        own_token_probability: share of the instances in training that read their own value. All others read values of
            their neighbours, without their own. Always 0 in exact mode, where a value holds the label.
        drop_input: share of the instances whose input is hidden in training.
        drop_exemplar: share of the instances whose exemplar is hidden; input and exemplar are never both hidden.
        sparse: whether gradients of values are sparse, for optimisers like SparseAdam, whose cost follows the batch.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if encoder, memory, network and task do not fit together, a share is out of range, or exact mode
            would not be exact.

    Attributes:
        config: arguments of the factory that built the model; None for a model that was built from parts.
    """

    #: Warning of the model card.
    card_note: ClassVar[str] = (
        "The file holds the memory: keys, values, labels and ids of the instances that the model was given, and the "
        "secret of its store. What is deleted from the memory later stays in the history of this repository."
    )

    def __init__(
        self,
        *,
        key_encoder: KeyEncoder,
        memory: KeyValueMemory,
        network: ExemplarTransformer | None = None,
        readout: Readout | None = None,
        task: Task | None = None,
        mode: str = "paper",
        aggregation: Aggregation | None = None,
        neighbours: int = 4,
        own_token_probability: float | None = None,
        drop_input: float = 0.2,
        drop_exemplar: float = 0.2,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        check_positive(neighbours=neighbours)
        check_encoder(key_encoder)
        if key_encoder.width != memory.store.widths[0]:
            raise ValueError(
                f"the encoder gives keys of width {key_encoder.width}, the memory has {memory.store.widths[0]}"
            )
        if (network is None) == (readout is None):
            raise ValueError("give network= or readout=, one of both")
        if network is not None and network.value_width != memory.store.widths[1]:
            raise ValueError(
                f"the network reads values of width {network.value_width}, the memory has {memory.store.widths[1]}"
            )
        self.task = _task_of(network, readout, task)
        labels = memory.store.settings()
        outputs = self.task.outputs if network is None else network.outputs
        if (self.task.outputs, self.task.label_shape) != (outputs, labels["label_shape"]):
            raise ValueError(
                f"the task {self.task} needs a network of {self.task.outputs} outputs and a memory of labels of shape "
                f"{self.task.label_shape}, found {outputs} outputs and labels of shape {labels['label_shape']}"
            )
        self.mode = _check_mode(mode, key_encoder, memory, readout)
        own = (1.0 if mode == "paper" else 0.0) if own_token_probability is None else own_token_probability
        _check_shares(mode, own_token_probability=own, drop_input=drop_input, drop_exemplar=drop_exemplar)
        self.neighbours, self.sparse = int(neighbours), bool(sparse)
        shares = own, drop_input, drop_exemplar
        self.own_token_probability, self.drop_input, self.drop_exemplar = map(float, shares)
        self.key_encoder = key_encoder.requires_grad_(False)
        self.memory, self.network, self.readout = memory, network, readout
        self.aggregation = aggregation or Ensemble()
        self.config: dict[str, Any] | None = None

    @classmethod
    def for_images(
        cls,
        *,
        size: int | tuple[int, int],
        channels: int = 1,
        classes: int | None = None,
        task: Task | None = None,
        key_encoder: KeyEncoder,
        patch: int | None = None,
        search: Callable[[KeyStore], Search] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """Build a small model for images.

        Args:
            size: height and width, or one number for both.
            channels: 1 for grey, 3 for colour.
            classes: `n`, short for `task=Classification(n)`.
            task: kind of label that is predicted.
            key_encoder: from images to keys.
            patch: height and width of a patch; must divide the size; about a quarter of the size if not given.
            search: builds the search for nearest rows from the memory's store, such as `FaissSearch`; exact if not
                given.
            generator: draws the seed of the initial weights; seed 0 if not given.
            device: of the model.
            dtype: of weights and memory.
            **settings: see `munkey.presets.Settings`. A file of the model only names modules among the settings; pass
                these modules to `load` again.

        Raises:
            TypeError: if a setting is unknown, or a number is not whole.
            ValueError: if a setting is out of range, not one of `classes` and `task` is given, or exact mode would not
                be exact.
        """
        height, width = check_size("size", size)
        inputs = {"channels": channels, "size": (height, width)}
        inputs["patch"] = patch_for(height, width) if patch is None else patch
        factory = {"device": device, "dtype": dtype}
        parts = ImageTokens, inputs, _task(classes, task), key_encoder, settings, search, generator, factory
        return cls._recorded("for_images", inputs, *parts)

    @classmethod
    def for_vectors(
        cls,
        *,
        features: int,
        classes: int | None = None,
        task: Task | None = None,
        key_encoder: KeyEncoder,
        tokens: int = 8,
        search: Callable[[KeyStore], Search] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """Build a small model for vectors: rows of a table, features of texts; other arguments as for `for_images`.

        Args:
            features: dimensions of a vector.
            classes: `n`, short for `task=Classification(n)`.
            task: kind of label that is predicted.
            key_encoder: from vectors to keys.
            tokens: number of tokens of a vector.
            search: builds the search for nearest rows from the memory's store; exact if not given.
            generator: draws the seed of the initial weights; seed 0 if not given.
            device: of the model.
            dtype: of weights and memory.
            **settings: see `munkey.presets.Settings`.

        Raises:
            TypeError: as for `for_images`.
            ValueError: as for `for_images`.
        """
        inputs = {"features": features, "count": tokens}
        factory = {"device": device, "dtype": dtype}
        parts = VectorTokens, inputs, _task(classes, task), key_encoder, settings, search, generator, factory
        return cls._recorded("for_vectors", {"features": features, "tokens": tokens}, *parts)

    @classmethod
    def for_features(
        cls,
        *,
        features: int,
        classes: int | None = None,
        task: Task | None = None,
        key_encoder: KeyEncoder | None = None,
        neighbours: int = 32,
        temperature: float = 0.1,
        shrinkage: float = 0.6,
        metric: str = "cosine",
        search: Callable[[KeyStore], Search] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build a classifier for features of a frozen network, which learns nothing and forgets exactly.

        The prediction is a mixture of votes of neighbours and a linear head: a discriminant for classes, ridge
        regression for other labels. There is nothing to train: `remember` takes instances and new classes at once. With
        features that a `Projection.whitening` of permanent instances maps to keys, and weights of the mixture that
        `fit_readout` chose on these, it is about as accurate as logistic regression on the same features; see
        docs/results/readouts.md.

        Args:
            features: dimensions of an input.
            classes: `n`, short for `task=Classification(n)`.
            task: kind of label that is predicted.
            key_encoder: from features to keys; the features themselves if not given.
            neighbours: `k`, number of neighbours that vote.
            temperature: of the votes; see `NeighbourVote`.
            shrinkage: of the linear head; see `DiscriminantReadout`.
            metric: 'cosine' or 'dot'.
            search: builds the search for nearest rows from the memory's store; exact if not given.
            device: of the model.
            dtype: of the memory.

        Raises:
            TypeError: if a number is not whole.
            ValueError: if a setting is out of range, not one of `classes` and `task` is given, or the encoder was
                fitted to instances that can be forgotten.

        Examples:
            >>> model = KeyMemoryTransformer.for_features(features=3, classes=2)
            >>> model.remember([7, 8], torch.eye(3)[:2], torch.tensor([0, 1]))
            >>> model(torch.eye(3)[:2]).argmax(1)
            tensor([0, 1])
        """
        encoder = Identity(features) if key_encoder is None else key_encoder
        kind = _task(classes, task)
        settings = {"neighbours": neighbours, "temperature": temperature, "shrinkage": shrinkage, "metric": metric}
        parts = feature_parts(kind, encoder, **settings, device=device, dtype=dtype)  # type: ignore[arg-type]
        model = cls(**parts)
        if search is not None:
            model.memory.search = search(model.memory.store)
        model.config = record("for_features", {"features": features, **settings, "task": kind.config()}, {})
        return model

    @classmethod
    def _recorded(
        cls,
        factory: str,
        shapes: dict[str, Any],
        tokens: type[ImageTokens | VectorTokens],
        inputs: dict[str, Any],
        task: Task,
        key_encoder: KeyEncoder,
        given: Settings,
        search: Callable[[KeyStore], Search] | None,
        generator: torch.Generator | None,
        placed: dict[str, Any],
    ) -> Self:
        """Build a model from parts, some of which may be custom, and record its configuration."""
        settings: dict[str, Any] = {**DEFAULTS, **given}
        unknown = sorted(settings.keys() - Settings.__annotations__.keys())
        if unknown:
            raise TypeError(f"there are no settings {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
        with drawing_from(generator):  # layers draw their weights when they are built
            model = cls(**model_parts(tokens, inputs, task=task, key_encoder=key_encoder, **settings, **placed))
        if search is not None:
            model.memory.search = search(model.memory.store)
        own: dict[str, Any] = {name: part for name, part in settings.items() if isinstance(part, nn.Module)}
        settings["own_token_probability"] = model.own_token_probability
        arguments = {**shapes, **settings, "task": task.config()}
        replaced = (*own, *(OF_NETWORK if "network" in own else ()))
        model.config = record(factory, {name: arguments[name] for name in arguments if name not in replaced}, own)
        return model

    # --- files --------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write weights, memory and, if its class is part of the library, the key encoder to one file.

        Forgotten rows leave no trace in the file: the same content gives the same bytes. An earlier file at the path
        stays whole until the new file is complete, and is then overwritten.

        Raises:
            OSError: if the file cannot be written; an earlier file stays whole.
        """
        io.save(self, path)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        key_encoder: KeyEncoder | None = None,
        model: Self | None = None,
        receipts: Path | Literal[False] | None = None,
        **parts: Any,  # noqa: ANN401 - custom modules, named by the file
    ) -> Self:
        """Read a model from a file that `save` wrote.

        Args:
            path: the file.
            key_encoder: the encoder that computed the keys; needed unless its class is part of the library.
            model: a model to fill, built from parts in the same way.
            receipts: a log; instances named in the log are forgotten again, see `KeyStore.keep_receipts`. A model whose
                memory kept a log is loaded with this log, or with False to load it without a log.
            **parts: custom parts that were passed to the factory: `aggregation=`, `network=`, `writer=`, `task=`, and a
                `search=` that is not part of the library.

        Raises:
            FileNotFoundError: if there is no such file, or no such log.
            ValueError: if the file is damaged, of another kind, or does not fit; if its keys are from another encoder;
                or if a log or a part is missing.
        """
        return io.load(cls, path, key_encoder, model, receipts, parts)

    def check_sharing(self) -> None:
        """Raise ValueError if the model cannot be saved as one file; see `treediff.core.hub`."""
        if isinstance(self.memory.store, ShardedKeyStore):
            raise ValueError(
                "the memory is spread over ranks and saved as a folder of many files, expected one file; call "
                "save(folder) on all ranks, and share load(folder) in one process"
            )

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
        """Return outputs `(B, n)`: logits, or the outputs that the task defines.

        Args:
            x: `(B, ...)` inputs.
            use_input: whether the transformer reads the input; if False, the memory pathway alone is used.
            use_memory: whether the transformer reads neighbours; if False, the input pathway alone is used.
            exclude_ids: `(B,)` one id for each input, whose rows are excluded from the search, such as its own id.
            keys: `(B, D)` precomputed keys of the inputs, as the key encoder returns them.

        Raises:
            TypeError: if the inputs are no floating-point tensor, or `exclude_ids` has no order, such as a set.
            ValueError: if the inputs have another shape than the model was built for, or are not finite.
        """
        if self.readout is not None and use_input and use_memory:
            return self._read_out(self.readout, x, exclude_ids, keys)
        network = self.transformer
        network.tokens.check(x)
        inputs = network.tokens(x) if use_input else network.null_input.expand(len(x), -1, -1)
        if not use_memory:
            nothing: Tensor = network(inputs, self.memory.null.expand(len(x), 1, -1))
            return nothing.squeeze(1)
        if self.mode == "exact" and self.training and torch.is_grad_enabled():
            _check_exact(self.memory.store)
        own = None if exclude_ids is None else ordered_ids(exclude_ids)
        queries = self.key_encoder(x) if keys is None else keys
        found = self.memory(queries, self.neighbours, exclude_ids=own)
        logits: Tensor = self.aggregation(found, lambda values: network(inputs, values), self.task.average)
        return logits

    @property
    def transformer(self) -> ExemplarTransformer:
        """The transformer; raise ValueError if the model has none."""
        if self.network is None:
            raise ValueError(
                "this model has a readout in place of a transformer: it learns nothing, and has one pathway; build it "
                "with for_images or for_vectors to train a transformer"
            )
        return self.network

    def _check_inputs(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs."""
        if self.network is not None:
            self.network.tokens.check(x)
        elif isinstance(self.key_encoder, Identity):
            check_batch(x, (self.key_encoder.width,), self.memory.store.values.dtype, None, "features")

    def _read_out(
        self, readout: Readout, x: Tensor, exclude_ids: Iterable[int] | Tensor | None, keys: Tensor | None
    ) -> Tensor:
        """Return the outputs of the readout."""
        self._check_inputs(x)
        query = self._query(x, keys, exclude_ids=exclude_ids)
        with self.memory.store.lock:  # all parts read the same rows
            outputs: Tensor = readout(query)
        return outputs

    def _query(self, x: Tensor, keys: Tensor | None, **about: Any) -> Query:  # noqa: ANN401
        found = self.key_encoder(x) if keys is None else keys
        return Query(self.memory, x, found, max(1, self.readout.neighbours), **about)  # type: ignore[union-attr]

    @torch.no_grad()
    def fit_readout(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        ids: Iterable[int] | Tensor | None = None,
        folds: int = 5,
        keys: Tensor | None = None,
    ) -> Mixture:
        """Choose the weights of a mixture of readouts: those with the least mean loss on some instances.

        With `ids`, the instances are in the memory, and no instance is predicted with its own row: neighbours leave out
        its id, and sums leave out its fold, as in cross-validation. Without `ids`, the instances are held out: none of
        them may be in the memory.

        Weights are not changed by a deletion. So in exact mode instances in the memory have to be permanent.

        Args:
            x: `(B, ...)` inputs.
            labels: `(B, ...)`, as the task defines them.
            ids: `(B,)` id of each instance in the memory.
            folds: number of parts of the instances for cross-validation.
            keys: `(B, D)` precomputed keys of the inputs.

        Returns:
            the mixture.

        Raises:
            KeyError: if an id is not in the memory.
            TypeError: if the readout is no mixture, or a number is not whole.
            ValueError: if there is no instance, an id can be forgotten in exact mode, or there are more folds than
                instances.
        """
        if not isinstance(self.readout, Mixture):
            raise TypeError(f"only a Mixture has weights to fit, found {type(self.readout).__name__}")
        self._check_inputs(x)
        targets = self.task.check(labels, len(x)).to(x.device)
        if ids is None:
            outputs = self.readout.outputs(self._query(x, keys))
        else:
            outputs = self._left_out(x, ordered_ids(ids), folds, keys)
        weights = fitted_weights(self.task, outputs, targets)
        self.readout.set_weights(dict(zip(self.readout.readouts, weights.tolist(), strict=True)))
        return self.readout

    def _left_out(self, x: Tensor, ids: list[int], folds: int, keys: Tensor | None) -> Tensor:
        """Return the outputs `(m, B, n)` of all parts, for instances without their own rows."""
        if len(ids) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(ids)}")
        store = self.memory.store
        if self.mode == "exact" and not bool(store.get(ids).permanent.all()):
            raise ValueError(
                "weights that were fitted to instances do not forget them; in exact mode pass ids of permanent "
                "instances, or held-out instances without ids"
            )
        check_positive(folds=folds)
        if not 2 <= folds <= len(ids):
            raise ValueError(f"folds must be from 2 to the number of instances, {len(ids)}; found {folds}")
        parts = []
        for fold in torch.arange(len(ids)).chunk(folds):
            own = [ids[i] for i in fold.tolist()]
            query = self._query(
                x[fold], None if keys is None else keys[fold], exclude_ids=own, without=store.rows_of(own)
            )
            parts.append(self.readout.outputs(query))  # type: ignore[union-attr,operator]
        return torch.cat(parts, 1)

    # --- training -----------------------------------------------------------------------------------------

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        ids: Iterable[int] | Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the mean loss of the task, a scalar; each instance reads its own value or values of its neighbours.

        Args:
            x: `(B, ...)` inputs.
            labels: `(B, ...)`, as the task defines them.
            ids: `(B,)` id of each instance in the memory.
            generator: draws which pathways are dropped, and which values are read. `dropout` inside of blocks, if there
                is any, draws from PyTorch's global generator.

        Raises:
            KeyError: if an id is not in the memory.
            TypeError: as for `forward`, or if labels are of another kind, or ids have no order, such as a set.
            ValueError: as for `forward`, or if a label is out of range; in exact mode also if the memory holds
                something that can be forgotten.
        """
        network = self.transformer
        network.tokens.check(x)
        wanted = ordered_ids(ids)
        if len(wanted) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(wanted)}")
        if not wanted:
            raise ValueError("a loss is the mean over instances; found none")
        targets = self.task.check(labels, len(x)).to(x.device)
        if self.mode == "exact":
            _check_exact(self.memory.store)
        uniform = torch.rand(4, len(x), generator=generator, device=x.device)
        hidden, alone = uniform[0] < self.drop_input, uniform[0] >= 1 - self.drop_exemplar
        inputs = torch.where(hidden[:, None, None], network.null_input, network.tokens(x))
        values = self._values(wanted, uniform, alone)
        return self.task.losses(network(inputs, values[:, None]).squeeze(1), targets).mean()

    def _values(self, wanted: list[int], uniform: Tensor, alone: Tensor) -> Tensor:
        """Return the value `(B, V)` that each instance is trained with; the null token for a hidden exemplar.

        Only rows in use are read, since a sparse optimiser changes every row that was read.
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
        """Return groups of all trained weights except the values: matrices with decay, vectors and nulls without.

        Values need a separate optimiser, since decay would change rows that no instance of the batch owns.
        `SparseAdam([model.memory.store.values])`, with `sparse=True`, costs no more than the rows of a batch.

        Args:
            weight_decay: of the matrices.
        """
        values = self.memory.store.values
        trained = [weight for weight in self.parameters() if weight.requires_grad and weight is not values]
        nulls = (self.transformer.start, self.transformer.null_input, self.memory.null)
        plain = [weight for weight in trained if weight.ndim < 2 or any(weight is null for null in nulls)]
        decayed = [weight for weight in trained if all(weight is not other for other in plain)]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]

    def shard(self, group: dist.ProcessGroup | None = None) -> None:
        """Spread the memory over the ranks of a group, all of which have the same model; see `KeyValueMemory.shard`.

        From then on the model is saved as a folder, which any number of ranks can load. A single rank loads an ordinary
        memory again.

        Raises:
            ValueError: as for `KeyValueMemory.shard`, and if ranks have different key encoders.
        """
        Ranks(group).same("fingerprint of the key encoder", self.key_encoder.fingerprint())
        self.memory.shard(group)

    def attach(self, *holders: torch.optim.Optimizer | EMA) -> None:
        """Attach optimisers and averages that hold state of the memory's values; see `KeyStore.attach`."""
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
        """Store one row for each instance; errors as for `KeyStore.add` and `loss`.

        Args:
            ids: `(B,)` int64, none of them in the memory yet.
            x: `(B, ...)` inputs.
            labels: `(B, ...)`, as the task defines them, kept beside the keys; required in exact mode.
            permanent: whether `forget` refuses these instances; in exact mode, whether weights may be trained on them.
            keys: `(B, D)` precomputed keys of the inputs, as `key_encoder.keys` returns them.
        """
        store = self.memory.store
        if isinstance(store, ShardedKeyStore):  # an error of one rank is raised on all ranks, which would wait
            wanted, found, targets = store.ranks.agree(lambda: self._to_remember(ids, x, labels, keys))
        else:
            wanted, found, targets = self._to_remember(ids, x, labels, keys)
        try:
            self.memory.remember(wanted, found, targets, permanent=permanent)
        finally:
            if keys is None:
                found.zero_()  # a copy of rows that may be forgotten later

    def _to_remember(
        self, ids: Iterable[int] | Tensor, x: Tensor, labels: Tensor | None, keys: Tensor | None
    ) -> tuple[list[int], Tensor, Tensor | None]:
        """Return the checked ids, keys and labels."""
        self._check_inputs(x)
        targets = None if labels is None else self.task.check(labels, len(x))
        if labels is None and self.mode == "exact":
            raise ValueError("in exact mode a value is written from key and label; pass labels")
        wanted = ordered_ids(ids)
        if len(wanted) != len(x):
            raise ValueError(f"expected one id for each of {len(x)} inputs, found {len(wanted)}")
        return wanted, self.key_encoder.keys(x) if keys is None else keys, targets

    def forget(self, ids: Iterable[int] | Tensor, *, missing: str = "raise") -> Receipt:
        """Delete instances from the memory immediately, by their ids alone; see `KeyStore.forget`.

        Afterwards the memory is equal to a memory that never stored these instances, and the weights are unchanged.
        Only in exact mode the weights, too, are equal to the weights of a model that never had these instances.
        """
        return self.memory.forget(ids, missing=missing)

    def find_near_duplicates(
        self, ids: Iterable[int] | Tensor, threshold: float = 0.99
    ) -> dict[int, list[tuple[int, float]]]:
        """Find near duplicates, which would be retrieved in place of forgotten instances; see `KeyValueMemory`."""
        return self.memory.find_near_duplicates(ids, threshold)


def _task_of(network: ExemplarTransformer | None, readout: Readout | None, task: Task | None) -> Task:
    """Return the task of a model; a readout has its own."""
    if network is not None:
        return Classification(network.outputs) if task is None else task
    own: Task = readout.task  # type: ignore[union-attr]
    if task is not None and task != own:
        raise ValueError(f"the readout predicts {own}, and task is {task}; leave task out")
    return own


def _task(classes: int | None, task: Task | None) -> Task:
    if (classes is None) == (task is None):
        raise ValueError(f"give classes= or task=, one of both; found classes={classes!r} and task={task!r}")
    return Classification(classes) if task is None else task  # type: ignore[arg-type]


_MODES = ("paper", "exact")


def _check_mode(mode: str, key_encoder: KeyEncoder, memory: KeyValueMemory, readout: Readout | None) -> str:
    """Return `mode` if encoder, memory and readout allow it.

    Raises:
        ValueError: if there is no such mode, or exact mode would not be exact.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be 'paper' or 'exact', found {mode!r}")
    if mode == "paper":
        return mode
    if memory.writer is None and readout is None:
        raise ValueError(
            "mode='exact' needs KeyValueMemory(writer=ValueWriter(...)); the writer computes values of instances that "
            "were not trained on"
        )
    if memory.store.values.requires_grad or memory.store.scale:
        raise ValueError(
            "in exact mode values are written, not learned; make the store with scale=0.0, and its values with "
            "store.values.requires_grad_(False)"
        )
    if key_encoder.fitted_on == "forgettable":
        raise ValueError(
            "in exact mode the encoder must not have seen what can be forgotten; fit it to other data or to the "
            "permanent split, or use mode='paper'"
        )
    return mode


def _check_exact(store: KeyStore) -> None:
    """Raise ValueError if weights would be trained on instances that can be forgotten."""
    if store.forgettable:
        raise ValueError(
            f"in exact mode weights are trained on permanent instances, but the memory holds {store.forgettable} rows "
            "that can be forgotten; train first, on instances remembered with permanent=True, and remember others "
            "afterwards"
        )


def _check_shares(mode: str, **shares: float) -> None:
    """Raise ValueError if shares are out of range, or do not fit together."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, found {share}")
    drop_input, drop_exemplar = shares["drop_input"], shares["drop_exemplar"]
    if drop_input + drop_exemplar > 1:
        raise ValueError(
            f"drop_input and drop_exemplar must add up to 1 at most, found {drop_input} and {drop_exemplar}"
        )
    if mode == "exact" and shares["own_token_probability"]:
        raise ValueError(
            "own_token_probability must be 0 in exact mode, where a written value holds the label of its instance; "
            f"found {shares['own_token_probability']}"
        )

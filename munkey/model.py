"""A classifier that keeps what is particular to an instance in a memory, from which an instance can be deleted.

A frozen encoder computes a key for each training instance. The memory holds key, label and value of the instance.
Readouts predict from the nearest keys and from sums over all rows. Forgetting an instance deletes its row; no weight
changes. The paper's model (MUNKEY, arXiv 2603.15033), a transformer that reads the values of the nearest keys beside
the tokens of the input, is one of the readouts. Choices that the paper leaves open are parameters.

Letters: `B` batch, `C H W` image, `D` width of a key, `V` width of a value, `k` neighbours, `n` classes, `S` tokens of
an input, `W` their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from munkey import io
from munkey.encoders.base import KeyEncoder, check_encoder
from munkey.encoders.identity import Identity
from munkey.fitting import fit_mixture
from munkey.memory import KeyValueMemory
from munkey.presets import OF_NETWORK, Settings, check_mode, completed, feature_parts, model_parts, patch_for
from munkey.readout.base import Query, Readout
from munkey.readout.exemplar import ExemplarReadout
from munkey.readout.mixture import Mixture
from munkey.readout.module import ModuleReadout
from munkey.readout.tokens import ImageTokens, VectorTokens
from munkey.search.exact import Search
from munkey.sharded import ShardedKeyStore
from munkey.sharded.ranks import Ranks
from munkey.store.checks import ids_of_inputs
from munkey.store.receipts import Receipt
from munkey.store.store import KeyStore
from munkey.task import Classification, Task
from treediff.core.checks import check_size
from treediff.core.ema import EMA
from treediff.core.io import Path, record
from treediff.core.noise import drawing_from
from treediff.core.rows import Indexable, Rows

__all__ = ["KeyMemoryTransformer"]

_BATCH = 1024  # rows of a data set that are read at a time


class KeyMemoryTransformer(nn.Module):
    """A classifier that reads a memory: a frozen encoder from inputs to keys, the memory, and a readout.

    A readout predicts from the input, its key and the nearest rows: votes of neighbours, a linear head on exact sums, a
    transformer that reads the input beside values, or a `Mixture` of such readouts; see `munkey.readout`.

    There are two modes, with different guarantees:

    - *exact*: weights are trained on permanent instances only. Every other instance gets a value computed from its key
      and label. Deleting the instance leaves a model that is equal, bit for bit, to a model that never had the
      instance. The encoder must not have been fitted to the instance either.
    - *paper*: weights and values of a transformer are trained together on all instances. Deleting an instance leaves
      the same weights beside a memory that never held the instance. The weights were trained on the instance; what the
      weights kept must be measured.

    Args:
        key_encoder: from inputs to keys, frozen.
        memory: keys and values of instances; with a writer if a transformer reads them in exact mode.
        readout: prediction from input, key and neighbours.
        mode: 'exact' or 'paper'.

    Raises:
        ValueError: if encoder, memory and readout do not fit together, or exact mode would not be exact.

    Attributes:
        task: kind of label that is predicted.
        config: arguments of the factory that built the model; None for a model that was built from parts.
    """

    #: Warning of the model card.
    card_note: ClassVar[str] = (
        "The file holds the memory: keys, values, labels and ids of the instances that the model was given, and the "
        "secret of its store. What is deleted from the memory later stays in the history of this repository."
    )

    def __init__(
        self, *, key_encoder: KeyEncoder, memory: KeyValueMemory, readout: Readout, mode: str = "exact"
    ) -> None:
        super().__init__()
        check_encoder(key_encoder)
        if key_encoder.width != memory.store.widths[0]:
            raise ValueError(
                f"the encoder gives keys of width {key_encoder.width}, the memory has {memory.store.widths[0]}"
            )
        self.task, self.mode = readout.task, mode
        labels = memory.store.settings()
        if self.task.label_shape != labels["label_shape"]:
            raise ValueError(
                f"the task {self.task} needs a memory of labels of shape {self.task.label_shape}, found labels of "
                f"shape {labels['label_shape']}"
            )
        _check_readout(mode, key_encoder, memory, readout)
        self.key_encoder = key_encoder.requires_grad_(False)
        self.memory, self.readout = memory, readout
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
        balance: float = 0.0,
        metric: str = "cosine",
        readouts: Mapping[str, Readout] | None = None,
        search: Callable[[KeyStore], Search] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build a classifier for features of a frozen network, which learns nothing and forgets exactly.

        The prediction is a mixture of votes of neighbours and a linear head: a discriminant for classes, ridge
        regression for other labels. There is nothing to train: `remember` takes instances and new classes at once. With
        features that a `Projection.whitening` of permanent instances maps to keys, and weights of the mixture that
        `fit_readout` chose on these, it is about as accurate as logistic regression on the same features; see
        docs/results/readouts.md. A network that was trained on permanent instances can join it as a `ModuleReadout`.

        Args:
            features: dimensions of an input.
            classes: `n`, short for `task=Classification(n)`.
            task: kind of label that is predicted.
            key_encoder: from features to keys; the features themselves if not given.
            neighbours: `k`, number of neighbours that vote.
            temperature: of the votes; see `NeighbourVote`.
            shrinkage: of the linear head; see `DiscriminantReadout`.
            balance: from 0, where frequent classes are predicted more often, to 1, where all classes are alike; see
                `NeighbourVote`. Above 0, a new class is predicted after fewer examples.
            metric: 'cosine' or 'dot'.
            readouts: others that join the mixture by name; their weight is 0 until `fit_readout` chose the weights.
                They are passed to `load` again, as `readouts=`.
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
        settings: dict[str, Any] = {"neighbours": neighbours, "temperature": temperature, "shrinkage": shrinkage}
        settings |= {"balance": balance, "metric": metric}
        others = dict(readouts or {})
        parts = feature_parts(kind, encoder, others, **settings, device=device, dtype=dtype)
        model = cls(**parts)
        if search is not None:
            model.memory.search = search(model.memory.store)
        own = {"readouts": nn.ModuleDict(others)} if others else {}
        model.config = record("for_features", {"features": features, **settings, "task": kind.config()}, own)
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
        settings = completed(given)
        with drawing_from(generator):  # layers draw their weights when they are built
            model = cls(**model_parts(tokens, inputs, task=task, key_encoder=key_encoder, **settings, **placed))
        if search is not None:
            model.memory.search = search(model.memory.store)
        own: dict[str, Any] = {name: part for name, part in settings.items() if isinstance(part, nn.Module)}
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
        self.check(x)
        readout = self.readout if use_input and use_memory else self.exemplar_readout
        if self.mode == "exact" and self.training and torch.is_grad_enabled() and self.has_transformer:
            _check_exact(self.memory.store)
        query = self.query(x, keys, exclude_ids=exclude_ids, use_input=use_input, use_memory=use_memory)
        outputs: Tensor = readout(query)
        return outputs

    @property
    def has_transformer(self) -> bool:
        """True if a readout has a transformer: weights that are trained, and pathways that can be switched off."""
        return bool(_transformers(self.readout))

    @property
    def exemplar_readout(self) -> ExemplarReadout:
        """The readout with a transformer, alone or as part of a mixture; raise ValueError if there is none."""
        if found := _transformers(self.readout):
            return found[0]
        raise ValueError(
            "this model has no transformer: it learns nothing, and has one pathway; build it with for_images or "
            "for_vectors to train a transformer"
        )

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs."""
        self.key_encoder.check(x)
        self.readout.check(x)

    def query(self, x: Tensor, keys: Tensor | None = None, **about: Any) -> Query:  # noqa: ANN401
        """Return what a readout reads: inputs, their keys, and the search for neighbours; see `Query`.

        Args:
            x: `(B, ...)` inputs.
            keys: `(B, D)` precomputed keys of the inputs.
            **about: other fields of the query.
        """
        found = (lambda: self.key_encoder(x)) if keys is None else keys
        return Query(self.memory, x, found, max(1, self.readout.neighbours), **about)

    @torch.no_grad()
    def fit_readout(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        ids: Iterable[int] | Tensor | None = None,
        folds: int = 5,
        keys: Tensor | None = None,
        outputs: Mapping[str, Tensor] | None = None,
    ) -> Mixture:
        """Choose the weights of a mixture of readouts: those with the least mean loss on some instances.

        With `ids`, the instances are in the memory, and no instance is predicted with its own row: neighbours leave out
        its id, and sums leave out its fold, as in cross-validation. Without `ids`, the instances are held out: none of
        them may be in the memory.

        Weights are not changed by a deletion. So in exact mode instances in the memory have to be permanent. If weights
        of a readout are trained, they should not have been trained on these instances, which they know too well. With a
        memory on several ranks, each rank gives other instances, and all ranks get the same weights. A warning says if
        the transformer predicts better with the input alone than the mixture does.

        Args:
            x: `(B, ...)` inputs.
            labels: `(B, ...)`, as the task defines them.
            ids: `(B,)` id of each instance in the memory.
            folds: number of parts of the instances for cross-validation, at most one for each instance.
            keys: `(B, D)` precomputed keys of the inputs.
            outputs: `(B, n)` by the name of a part, in place of its own outputs; such as of networks that are averaged,
                each of which learned other folds of the instances (cross-fitting).

        Returns:
            the mixture.

        Raises:
            KeyError: if an id is not in the memory.
            TypeError: if the readout is no mixture, or a number is not whole.
            ValueError: if there is no instance, or one only with an id, an id can be forgotten in exact mode, there
                are fewer than two folds, or outputs are of no part, or of another shape.
        """
        if not isinstance(self.readout, Mixture):
            raise TypeError(f"only a Mixture has weights to fit, found {type(self.readout).__name__}")
        self.check(x)
        targets = self.task.check(labels, len(x)).to(x.device)
        wanted = None if ids is None else ids_of_inputs(ids, x)
        fit_mixture(
            self.readout,
            self.query,
            self.memory.store,
            x,
            targets,
            exact=self.mode == "exact",
            ids=wanted,
            folds=folds,
            keys=keys,
            outputs=outputs,
        )
        return self.readout

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
        readout = self.exemplar_readout
        self.check(x)
        wanted = ids_of_inputs(ids, x)
        if not wanted:
            raise ValueError("a loss is the mean over instances; found none")
        targets = self.task.check(labels, len(x)).to(x.device)
        if self.mode == "exact":
            _check_exact(self.memory.store)
        return readout.loss(self.memory, x, targets, wanted, generator=generator)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all trained weights except the values: matrices with decay, vectors and nulls without.

        Values need a separate optimiser, since decay would change rows that no instance of the batch owns.
        `SparseAdam([model.memory.store.values])`, with `sparse=True`, costs no more than the rows of a batch.

        Args:
            weight_decay: of the matrices.
        """
        values = self.memory.store.values
        trained = [weight for weight in self.parameters() if weight.requires_grad and weight is not values]
        nulls = (*self.exemplar_readout.nulls(), self.memory.null)
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
        x: Tensor | Indexable,
        labels: Tensor | None = None,
        *,
        permanent: bool = False,
        keys: Tensor | None = None,
    ) -> None:
        """Store one row for each instance; errors as for `KeyStore.add` and `loss`.

        In paper mode the value of an instance that comes after the training is noise until `munkey.fit_values` fits it.

        Args:
            ids: `(B,)` int64, none of them in the memory yet.
            x: `(B, ...)` inputs: a tensor, or anything else that `treediff.data.Rows` takes, such as a memory map of
                images, which is read a batch at a time.
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
        self, ids: Iterable[int] | Tensor, x: Tensor | Indexable, labels: Tensor | None, keys: Tensor | None
    ) -> tuple[list[int], Tensor, Tensor | None]:
        """Return the checked ids, keys and labels."""
        if isinstance(x, Tensor):
            self.check(x)
        else:
            x = Rows.of(x, dtype=self.memory.store.values.dtype)
        targets = None if labels is None else self.task.check(labels, len(x))
        if labels is None and self.mode == "exact":
            raise ValueError("in exact mode a value is written from key and label; pass labels")
        wanted = ids_of_inputs(ids, x)
        if keys is not None:
            return wanted, keys, targets
        return wanted, self.key_encoder.keys(x) if isinstance(x, Tensor) else self._keys_of(x), targets

    def _keys_of(self, rows: Rows) -> Tensor:
        """Return the keys of rows, which are read and checked a batch at a time."""
        values = self.memory.store.values
        keys, start = values.new_empty(len(rows), self.key_encoder.width, dtype=self.key_encoder.dtype), 0
        for part in rows.split(_BATCH):
            x = part.to(values.device)
            self.check(x)
            found = self.key_encoder.keys(x)
            keys[start : start + len(x)] = found
            found.zero_()  # a copy of rows that may be forgotten later
            start += len(x)
        return keys

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


def _task(classes: int | None, task: Task | None) -> Task:
    if (classes is None) == (task is None):
        raise ValueError(f"give classes= or task=, one of both; found classes={classes!r} and task={task!r}")
    return Classification(classes) if task is None else task  # type: ignore[arg-type]


def _transformers(readout: Readout) -> list[ExemplarReadout]:
    """Return all readouts with a transformer."""
    return [part for part in readout.modules() if isinstance(part, ExemplarReadout)]


def _check_readout(mode: str, key_encoder: KeyEncoder, memory: KeyValueMemory, readout: Readout) -> None:
    """Raise ValueError if there is no such mode, the parts do not fit, or exact mode would not be exact."""
    transformers = _transformers(readout)
    check_mode(mode)
    if len(transformers) > 1:
        raise ValueError(f"values belong to one transformer, found {len(transformers)} readouts with a transformer")
    for transformer in transformers:
        if (wanted := transformer.network.value_width) != memory.store.widths[1]:
            raise ValueError(f"the network reads values of width {wanted}, the memory has {memory.store.widths[1]}")
    if mode == "paper":
        return
    if transformers and memory.writer is None:
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
    for part in readout.modules():
        if isinstance(part, ModuleReadout) and part.fitted_on == "forgettable":
            raise ValueError(
                "in exact mode a module must not have been trained on what can be forgotten; train it on the permanent "
                "split, or use mode='paper'"
            )
    for transformer in transformers:
        if transformer.own_token_probability:
            raise ValueError(
                "own_token_probability must be 0 in exact mode, where a written value holds the label of its instance; "
                f"found {transformer.own_token_probability}"
            )


def _check_exact(store: KeyStore) -> None:
    """Raise ValueError if weights would be trained on instances that can be forgotten."""
    if store.forgettable:
        raise ValueError(
            f"in exact mode weights are trained on permanent instances, but the memory holds {store.forgettable} rows "
            "that can be forgotten; train first, on instances remembered with permanent=True, and remember others "
            "afterwards"
        )

"""Fitting of the weights of a mixture of readouts, on instances that stay; see `KeyMemoryTransformer.fit_readout`.

Letters: `m` readouts of a mixture, `B` instances, `n` outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from munkey.readout.base import Query
from munkey.readout.exemplar import ExemplarReadout
from munkey.readout.mixture import Mixture, fitted_weights
from munkey.sharded import ShardedKeyStore
from munkey.store.store import KeyStore
from munkey.task import Classification, Task
from treediff.core.checks import check_positive

__all__ = ["fit_mixture"]


def fit_mixture(
    mixture: Mixture,
    query: Callable[..., Query],
    store: KeyStore | ShardedKeyStore,
    x: Tensor,
    targets: Tensor,
    *,
    exact: bool,
    ids: list[int] | None = None,
    folds: int = 5,
    keys: Tensor | None = None,
    outputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit the weights of a mixture; other arguments and errors as for `KeyMemoryTransformer.fit_readout`.

    Args:
        mixture: of one readout with a transformer at most.
        query: makes the query of inputs and keys, with fields of `Query` as keywords.
        store: the rows.
        x: `(B, ...)` inputs.
        targets: `(B, ...)` labels.
        exact: whether no weight may depend on what can be forgotten.
        ids: of the instances in the store.
        folds: number of parts of the instances.
        keys: `(B, D)` of the inputs.
        outputs: `(B, n)` by the name of a readout, in place of its own outputs.
    """
    task, exemplar = mixture.task, next((part for part in mixture.parts if isinstance(part, ExemplarReadout)), None)
    ranks = store.ranks if isinstance(store, ShardedKeyStore) else None
    check_positive(folds=folds)
    if exact and exemplar is not None and isinstance(task, Classification):
        exemplar.known.copy_(_permanent_classes(store, task))
    if ids is None:
        found = mixture.outputs(query(x, keys))
    else:
        if exact and not bool(store.get(ids).permanent.all()):
            raise ValueError(
                "weights that were fitted to instances do not forget them; in exact mode pass ids of permanent "
                "instances, or held-out instances without ids"
            )
        counts = [len(x)] if ranks is None else ranks.gather(len(x))
        found = _left_out(mixture, query, store, x, ids, min(folds, *counts), keys)
    _put(outputs or {}, found, list(mixture.readouts))
    if exemplar is not None:  # with the input alone, to compare
        plain = exemplar(query(x, keys, use_memory=False))
        found = torch.cat([found, plain[None].to(found.dtype)])
    if ranks is not None:  # all ranks fit the same weights
        every = ranks.gather((found, targets))
        found, targets = torch.cat([one for one, _ in every], 1), torch.cat([other for _, other in every])
    mixed, alone = found[: len(mixture.parts)], found[len(mixture.parts) :]
    weights = fitted_weights(task, mixed, targets)
    mixture.set_weights(dict(zip(mixture.readouts, weights.tolist(), strict=True)))
    if len(alone):
        _warn_if_worse(task, weights, mixed, alone, targets)


def _permanent_classes(store: KeyStore | ShardedKeyStore, task: Classification) -> Tensor:
    """Return which classes have a permanent row, `(n,)`; all if none has."""
    local = store.local if isinstance(store, ShardedKeyStore) else store
    every, rows = torch.arange(task.outputs, device=local.labels.device), slice(0, local.used)
    found = torch.isin(every, local.labels[rows][local.permanent[rows]])
    if isinstance(store, ShardedKeyStore):
        found = torch.stack(store.ranks.gather(found)).any(0)
    return found | ~found.any()


def _left_out(
    mixture: Mixture,
    query: Callable[..., Query],
    store: KeyStore | ShardedKeyStore,
    x: Tensor,
    ids: list[int],
    folds: int,
    keys: Tensor | None,
) -> Tensor:
    """Return the outputs `(m, B, n)` of all readouts, for instances without their own rows."""
    if folds < 2:
        raise ValueError(f"expected at least two folds and two instances, found {folds} folds of {len(ids)}")
    parts = []
    for fold in torch.arange(len(ids)).tensor_split(folds):
        own = [ids[i] for i in fold.tolist()]
        known = None if keys is None else keys[fold]
        parts.append(mixture.outputs(query(x[fold], known, exclude_ids=own, without=store.rows_of(own))))
    return torch.cat(parts, 1)


def _put(outputs: Mapping[str, Tensor], found: Tensor, names: list[str]) -> None:
    """Put given outputs of some readouts into the outputs `(m, B, n)` of all."""
    for name, tensor in outputs.items():
        if name not in names or tensor.shape != found.shape[1:]:
            raise ValueError(
                f"outputs= takes outputs of shape {tuple(found.shape[1:])} of {', '.join(names)}; found "
                f"{tuple(tensor.shape)} of {name!r}"
            )
        found[names.index(name)] = tensor


def _warn_if_worse(task: Task, weights: Tensor, mixed: Tensor, alone: Tensor, targets: Tensor) -> None:
    """Warn if the input alone predicts better than the mixture, by two standard errors."""
    pairs = (weights, mixed), (fitted_weights(task, alone, targets), alone)
    found, plain = (task.losses(torch.tensordot(w, outputs.double(), 1), targets) for w, outputs in pairs)
    worse = found - plain
    if float(worse.mean()) > 2 * float(worse.std(correction=0)) / len(worse) ** 0.5:
        warnings.warn(
            f"on these instances the input alone predicts better, with a mean loss of {float(plain.mean()):.3g}, than "
            f"with the memory, {float(found.mean()):.3g}; use another key encoder, or train a network without memory "
            "on permanent instances, and give it to for_features as a ModuleReadout",
            stacklevel=5,
        )

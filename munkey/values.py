"""Fitting of the values of instances that a model remembers after its training.

Letters: `B` instances, `V` width of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from munkey.model import KeyMemoryTransformer
from munkey.sharded import ShardedKeyStore
from munkey.store.checks import ids_of_inputs
from munkey.store.erase import wipe
from treediff.core.checks import check_positive

__all__ = ["fit_values"]


def fit_values(
    model: KeyMemoryTransformer,
    ids: Iterable[int] | Tensor,
    x: Tensor,
    labels: Tensor,
    *,
    steps: int = 30,
    batch_size: int = 256,
    learning_rate: float = 0.02,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> None:
    """Fit the values of instances of a model in paper mode, which were remembered after its training.

    Each value is fitted by itself, `min_v loss(f(x_i, v), y_i)`, by Adam from the value that the store has; in every
    second step the input is hidden, so that a value is also of use beside other inputs. Weights and all other values
    stay. So the weights never learn from these instances, nothing of them is left once they are deleted, and what is
    fitted to one of them does not depend on the others, up to rounding.

    Args:
        model: in paper mode, without a writer.
        ids: `(B,)` id of each instance in the memory.
        x: `(B, ...)` inputs.
        labels: `(B, ...)`, as the task defines them.
        steps: of Adam for each instance.
        batch_size: instances at a time.
        learning_rate: of Adam.
        progress: wraps the batches, such as `tqdm`.

    Raises:
        KeyError: if an id is not in the memory.
        TypeError: if a number is not whole, or as for `KeyMemoryTransformer.loss`.
        ValueError: if values are not trained in this model, the memory is on several ranks, there is not one id for
            each input, or as for `KeyMemoryTransformer.loss`.

    Source: the paper (arXiv 2603.15033) trains values with the weights; values beside frozen weights are ours.

    Examples:
        >>> from munkey import Identity, KeyMemoryTransformer
        >>> model = KeyMemoryTransformer.for_vectors(features=3, classes=2, key_encoder=Identity(3), mode="paper")
        >>> model.remember([7, 8], torch.eye(3)[:2], torch.tensor([0, 1]))
        >>> noise = model.memory.store.get([7, 8]).values
        >>> fit_values(model, [7, 8], torch.eye(3)[:2], torch.tensor([0, 1]))
        >>> torch.equal(model.memory.store.get([7, 8]).values, noise)
        False
    """
    check_positive(steps=steps, batch_size=batch_size)
    store = model.memory.store
    if isinstance(store, ShardedKeyStore):
        raise ValueError("values of a memory on several ranks are fitted by a training; see examples/train_munkey.py")
    if model.mode != "paper" or not store.values.requires_grad:
        raise ValueError("only values of paper mode are fitted; in exact mode a writer computes them")
    wanted = ids_of_inputs(ids, x)
    model.exemplar_readout.check(x)
    targets = model.task.check(labels, len(x)).to(x.device)
    with store.lock:
        own = torch.arange(len(x)).repeat_interleave(store.row_counts(wanted))
        rows = store.rows_of(wanted)
        for part in progress(torch.arange(len(rows)).split(batch_size)):
            _fit(model, rows[part], x[own[part]], targets[own[part]], steps, learning_rate)


def _fit(model: KeyMemoryTransformer, rows: Tensor, x: Tensor, targets: Tensor, steps: int, rate: float) -> None:
    """Fit the values of some rows."""
    network, store = model.exemplar_readout.network, model.memory.store
    with torch.no_grad():
        values, inputs = store.values[rows], network.tokens(x)
    hidden = network.null_input.detach().expand_as(inputs)
    value = values.requires_grad_()
    optimizer = torch.optim.Adam([value], lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            outputs = network(hidden if step % 2 else inputs, value[:, None]).squeeze(1)
            loss = model.task.losses(outputs, targets).sum()  # a sum, so that each row learns by itself
            (value.grad,) = torch.autograd.grad(loss, value)
            optimizer.step()
    with torch.no_grad():
        store.values[rows] = value
    for copy in (value.detach(), *(s for s in optimizer.state[value].values() if isinstance(s, Tensor) and s.ndim)):
        wipe(copy)

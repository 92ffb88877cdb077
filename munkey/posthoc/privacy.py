"""Noise on the gradients of the shared weights (experimental), so that they reveal little of a forgotten instance.

After the row of an instance is deleted, only the shared weights keep traces of the instance. Here the gradients of
these weights are clipped for each instance, and noise is added (DP-SGD, Abadi et al., arXiv 1607.00133). Values are
trained on their own instances without noise, and are deleted with them. The claim, and its assumptions:

*Claim.* Let `theta` be the shared weights, nulls included, at all steps, and `v_j` the values. For an instance `i`
that is chosen before training, the joint distribution of (`theta`, all `v_j` with `j != i`) is `(epsilon,
delta)`-close to the distribution of a training without `i`, with the `epsilon` of DP-SGD, here `epsilon(...)`.

*Why.* Fix everything that is independent of `i`: initial values, and the batches of each other instance. Given `theta`
up to a step, each other value is then a function of its own instance. Hence the sum of the other clipped gradients is
fixed. With `i` the step is a mixture: with probability `q` a vector of length `clip` at most is added. The vector
depends on `v_i`, and so on the earlier batches of `i`. A mixture over such vectors is no easier to distinguish from the
step without `i` than the worst vector, since these divergences are convex. So each step, given the steps before, is
dominated by the subsampled Gaussian mechanism, and steps compose. All `v_j` are functions of `theta` and of the fixed
quantities.

*Assumptions.* Each instance is trained with its own value only (`own_token_probability` 1, paper mode), and has one
row. The encoder was not fitted on these instances, and layers do not mix instances. Each instance is in a batch with
probability `q`, independently of all others (`poisson_batches`), and at most once. Divisor, number of steps and
learning rate do not depend on the number of instances. Nothing is tuned or stopped by instances that may be forgotten,
nor by the returned loss or errors. The state of optimisers of values belongs to rows (SparseAdam). Sums are in float32
or float64; the effect of an instance on the rounding of others is neglected. A set of `s` instances has about `s` times
the `epsilon`. A forget set that is chosen with knowledge of the model is not covered. Noise comes from PyTorch's
generator, which is not cryptographic.

Letters: `B` batch, `P` shared weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from munkey.model import KeyMemoryTransformer
from munkey.sharded import ShardedKeyStore
from munkey.store.checks import ids_of_inputs, some
from treediff.core.checks import check_positive

__all__ = ["epsilon", "poisson_batches", "private_backward"]


def poisson_batches(total: int, *, sample_rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of each batch: each row with the same probability, independently; a batch may be empty.

    Args:
        total: number of instances.
        sample_rate: `q`, the probability, above 0, at most 1.
        steps: number of batches.
        generator: draws the batches. Its seed must be secret, since `epsilon` assumes that the batches are unknown.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is out of range.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> [len(rows) for rows in poisson_batches(100, sample_rate=0.1, steps=3, generator=generator)]
        [9, 14, 8]
    """
    check_positive(total=total, steps=steps)
    _check_rate(sample_rate)
    # Uniform numbers of float32 have 24 bits: rounded down, so that no row is drawn more often than `sample_rate`.
    share = math.floor(sample_rate * 2**24) / 2**24
    for _ in range(steps):
        yield (torch.rand(total, generator=generator) < share).nonzero().squeeze(1)


def private_backward(
    model: KeyMemoryTransformer,
    x: Tensor,
    labels: Tensor,
    *,
    ids: Iterable[int] | Tensor,
    clip: float,
    noise_multiplier: float,
    expected_batch_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Set gradients in place of `model.loss(...).backward()`; the mean loss that is returned is not private.

        g = (sum_i g_i min(1, clip / |g_i|) + noise_multiplier clip N(0, 1)) / expected_batch_size

    for the shared weights together. Each value gets the plain gradient of its own loss, over `expected_batch_size`. A
    gradient `g_i` that is not finite counts as 0, and so does the gradient of its value. All other weights are left
    without a gradient, so that no gradient of an earlier loss is applied. All steps are in the precision of the
    weights, without autocast.

    Args:
        model: in paper mode, with `own_token_probability` 1 and one row for each instance.
        x: `(B, ...)` inputs of a batch, which may be empty.
        labels: `(B,)` int64, from 0 to `n - 1`.
        ids: `(B,)` id of each instance in the memory, all different.
        clip: greatest length of an instance's gradient, above 0.
        noise_multiplier: standard deviation of the noise in units of `clip`, at least 0.
        expected_batch_size: `q` times the planned number of instances.
        generator: draws pathways and noise. Use one generator with a secret seed for all steps of a training: the same
            noise twice would cancel in the difference of two steps.

    Raises:
        KeyError: if an id is not in the memory.
        TypeError: as for `KeyMemoryTransformer.loss`, or if weights are neither float32 nor float64.
        ValueError: as for `KeyMemoryTransformer.loss`, or if a number is out of range, an id is repeated, or the model
            is trained in a way for which the claim does not hold.
    """
    _check_model(model)
    for name, number in (("clip", clip), ("expected_batch_size", expected_batch_size)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0, found {number}")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be at least 0, found {noise_multiplier}")
    wanted, labels = _check_batch(model, x, labels, ids)
    alone = _Alone(model)
    weights = {name: weight for name, weight in alone.named_parameters() if weight.requires_grad}
    _check_precision(weights)
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    losses, store, readout = x.new_zeros(0), model.memory.store, model.exemplar_readout
    for weight in model.parameters():
        weight.grad = None
    if len(x):
        rows = store.rows_of(wanted)
        uniform = torch.rand(2, len(x), generator=generator, device=x.device)
        hidden, null = uniform[0] < readout.drop_input, uniform[0] >= 1 - readout.drop_exemplar
        with torch.autocast(x.device.type, enabled=False):
            slopes, own, losses = _slopes(alone, weights, store.values.detach()[rows], x, labels, hidden, null)
        totals = _clipped_sums(slopes, clip)
        if store.values.requires_grad:
            own = torch.where(own.isfinite().all(1, keepdim=True), own, 0)
            store.values.grad = _rows_grad(store.values, rows[~null], own[~null] / expected_batch_size, readout.sparse)
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        weight.grad = (totals[name] + noise_multiplier * clip * noise) / expected_batch_size
    return losses.mean() if len(x) else x.new_zeros(())


def epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Return the `epsilon` of `steps` steps of DP-SGD, by Opacus' accountant of Renyi divergences (extra `privacy`).

    Args:
        noise_multiplier: as for `private_backward`, above 0.
        sample_rate: `q` of `poisson_batches`.
        steps: number of steps.
        delta: from 0 to 1; well below 1 over the number of instances.

    Raises:
        ImportError: if Opacus is missing.
        TypeError: if `steps` is not whole.
        ValueError: if a number is out of range.
    """
    check_positive(steps=steps)
    _check_rate(sample_rate)
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be above 0, found {noise_multiplier}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, found {delta}")
    try:
        from opacus.accountants import RDPAccountant  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{error}; to account for privacy: pip install 'treediff[privacy]'") from error
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return max(0.0, float(accountant.get_epsilon(delta)))  # the bound falls below 0 where delta is large


class _Alone(nn.Module):
    """The loss of one instance beside its own value, with all shared weights as parameters."""

    def __init__(self, model: KeyMemoryTransformer) -> None:
        super().__init__()
        self.network, self.null, self.task = model.exemplar_readout.network, model.memory.null, model.task

    def forward(self, value: Tensor, x: Tensor, label: Tensor, hidden: Tensor, null: Tensor) -> Tensor:
        inputs = torch.where(hidden, self.network.null_input, self.network.tokens(x[None]))
        values = torch.where(null, self.null, value)
        return self.task.losses(self.network(inputs, values[None, None])[:, 0], label[None])[0]


def _slopes(alone: _Alone, weights: Mapping[str, Tensor], *given: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return, for each instance, the gradients of the shared weights and of its value, and its loss."""

    def loss(shared: dict[str, Tensor], *instance: Tensor) -> Tensor:
        found: Tensor = functional_call(alone, shared, instance)
        return found

    shared = {name: weight.detach() for name, weight in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no rule for a batch of gradients
        one = grad_and_value(loss, argnums=(0, 1))
        by_both = vmap(one, in_dims=(None, *[0] * len(given)), randomness="different")
        (slopes, own), losses = by_both(shared, *given)
    return slopes, own, losses


def _clipped_sums(slopes: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Return `sum_i g_i min(1, clip / |g_i|)`, without gradients that are not finite.

    Lengths are in float64, where squares of float32 do not overflow. A matrix product could be in lower precision, so
    none is used.
    """
    lengths = [
        torch.linalg.vector_norm(slope.reshape(len(slope), -1), dim=1, dtype=torch.float64) for slope in slopes.values()
    ]
    length = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
    factor = torch.where(length.isfinite(), (clip / length).clamp(max=1.0), 0)

    def clipped(slope: Tensor) -> Tensor:
        shares = factor.to(slope.dtype).view(-1, *[1] * (slope.ndim - 1))
        return torch.where(shares > 0, slope * shares, 0).sum(0)

    return {name: clipped(slope) for name, slope in slopes.items()}


def _rows_grad(values: Tensor, rows: Tensor, own: Tensor, sparse: bool) -> Tensor:
    """Return a gradient that is zero except in some rows."""
    found = torch.sparse_coo_tensor(rows[None], own, values.shape, check_invariants=False).coalesce()
    return found if sparse else found.to_dense()


def _check_model(model: KeyMemoryTransformer) -> None:
    own = model.exemplar_readout.own_token_probability
    if model.mode != "paper" or own != 1:
        raise ValueError(
            "the claim needs paper mode with own_token_probability=1, so that a value depends on its instance only; "
            f"found mode={model.mode!r}, own_token_probability={own}"
        )
    if model.key_encoder.fitted_on == "forgettable":
        raise ValueError("the claim needs an encoder that has not seen what can be forgotten")
    store = model.memory.store
    if model.memory.writer is not None:
        raise ValueError("the claim needs values that are their rows alone, found a memory with a writer")
    if isinstance(store, ShardedKeyStore):
        raise ValueError("gradients of a memory that is spread over ranks are not private; train in one process")
    if len(store) != store.used:
        raise ValueError(f"the claim needs one row for each instance, found {store.used} rows of {len(store)}")

    for module in model.exemplar_readout.network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            raise ValueError(
                f"the claim needs layers that do not mix instances, found a {type(module).__name__}, which keeps "
                "statistics of batches; use LayerNorm"
            )


def _check_batch(
    model: KeyMemoryTransformer, x: Tensor, labels: Tensor, ids: Iterable[int] | Tensor
) -> tuple[list[int], Tensor]:
    """Return the checked ids and labels."""
    wanted = ids_of_inputs(ids, x)
    twice = [instance for instance, count in Counter(wanted).items() if count > 1]
    if twice:
        raise ValueError(
            f"ids {some(twice)} are repeated in a batch, expected each once: their gradients together would be longer "
            "than clip; draw batches with poisson_batches"
        )
    if len(x):
        with torch.autocast(x.device.type, enabled=False):
            model.exemplar_readout.network.tokens.check(x)
    return wanted, model.task.check(labels, len(x)).to(x.device)


def _check_precision(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the claim needs weights of float32 or float64, in which rounding is small beside the noise; found "
                f"{name} of {weight.dtype}; use model.float()"
            )
    if not weights:
        raise ValueError("no shared weight is trained, expected some; call requires_grad_() on the network")


def _check_rate(sample_rate: float) -> None:
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be above 0 and at most 1, found {sample_rate}")

"""Noise on shared gradients: against loops over instances, closed forms, and the fixed parts of the claim."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from classifiers import filled, images, labels, model
from stores import seeded
from torch import Tensor

from munkey import KeyMemoryTransformer, Projection
from munkey.posthoc.privacy import epsilon, poisson_batches, private_backward

COUNT = 7
NO_NOISE = {"noise_multiplier": 0.0, "expected_batch_size": 1}
QUIET = {"clip": 1e9, "noise_multiplier": 0.0, "expected_batch_size": COUNT}


def undropped(**settings: object) -> KeyMemoryTransformer:
    built = filled(COUNT, drop_input=0.0, drop_exemplar=0.0, **settings)
    built.attach(torch.optim.SGD([built.memory.store.values], 0.1))
    return built


def vectors() -> KeyMemoryTransformer:
    """For inputs of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = KeyMemoryTransformer.for_vectors(
            classes=3,
            features=5,
            key_encoder=Projection.random((5,), 5),
            width=8,
            heads=2,
            value_width=4,
            mode="paper",
            own_token_probability=1.0,
            drop_input=0.0,
            drop_exemplar=0.0,
        )
    built.remember(range(4), torch.rand(4, 5, generator=seeded()), labels(4))
    return built


def grads(built: KeyMemoryTransformer) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in built.named_parameters() if weight.grad is not None}
    return {name: grad.to_dense() for name, grad in found.items()}


def test_without_clipping_and_noise_it_is_the_gradient_of_the_loss() -> None:
    for sparse in (False, True):
        one, other = undropped(sparse=sparse), undropped(sparse=sparse)
        loss = other.loss(images(COUNT), labels(COUNT), ids=range(COUNT))
        loss.backward()
        got = private_backward(one, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
        torch.testing.assert_close(got, loss.detach())
        expected = grads(other)
        for name, grad in grads(one).items():
            torch.testing.assert_close(grad, expected.get(name, torch.zeros_like(grad)), msg=name)
        assert one.memory.store.values.grad is not None and one.memory.store.values.grad.is_sparse == sparse


def test_each_instance_is_clipped_by_itself_and_its_value_is_not() -> None:
    built, total, values = undropped(), {}, torch.zeros(COUNT, 4)
    for n in range(COUNT):
        one = undropped()
        one.loss(images(COUNT)[n : n + 1], labels(COUNT)[n : n + 1], ids=[n]).backward()
        own = grads(one)
        values[n] = own.pop("memory.store.values")[n]
        length = torch.cat([grad.flatten() for grad in own.values()]).norm()
        assert length > 0.5, "else there is nothing to clip"
        for name, grad in own.items():
            total[name] = total.get(name, 0) + grad * min(1.0, 0.5 / float(length))
    private_backward(
        built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **{**QUIET, "clip": 0.5}
    )
    found = grads(built)
    torch.testing.assert_close(found.pop("memory.store.values")[:COUNT], values / COUNT)
    for name, grad in found.items():
        torch.testing.assert_close(grad, total.get(name, torch.zeros_like(grad)) / COUNT, atol=1e-6, rtol=1e-4)


def test_noise_is_normal_on_all_shared_weights_and_on_no_value() -> None:
    built = undropped()
    draws = []
    for seed in range(40):
        private_backward(
            built,
            images(0),
            labels(0),
            ids=[],
            clip=0.5,
            noise_multiplier=3.0,
            expected_batch_size=10,
            generator=seeded(seed),
        )
        found = grads(built)
        assert "memory.store.values" not in found and "memory.null" in found and "readout.network.null_input" in found
        draws.append(torch.cat([grad.flatten() for grad in found.values()]))
    noise = torch.cat(draws) / (0.5 * 3 / 10)
    assert abs(noise.mean()) < 4 / math.sqrt(len(noise)) and abs(noise.std() - 1) < 4 / math.sqrt(2 * len(noise))
    assert abs((noise.abs() < 1).double().mean() - 0.6827) < 4 * math.sqrt(0.6827 * 0.3173 / len(noise))


def test_others_learn_the_same_whoever_else_is_in_the_batch() -> None:
    """Given the shared weights, a value is a function of its own instance: what the claim fixes."""
    values = []
    for rows in (list(range(COUNT)), list(range(1, COUNT))):
        built = undropped()
        private_backward(built, images(COUNT)[rows], labels(COUNT)[rows], ids=rows, generator=seeded(), **QUIET)
        values.append(grads(built)["memory.store.values"][1:COUNT])
    torch.testing.assert_close(values[0], values[1])


def test_pathways_are_dropped() -> None:
    built = filled(COUNT, drop_input=0.0, drop_exemplar=1.0)
    private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
    found = grads(built)
    assert found["memory.store.values"].abs().max() == 0 and found["memory.null"].abs().max() > 0
    built = filled(COUNT, drop_input=1.0, drop_exemplar=0.0)
    private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
    assert (
        grads(built)["readout.network.tokens.embed.weight"].abs().max() == 0
        and grads(built)["readout.network.null_input"].abs().max() > 0
    )


def test_the_same_generator_gives_the_same_gradients() -> None:
    found = []
    for seed in (1, 1, 2):
        built = filled(COUNT)
        options = {**QUIET, "noise_multiplier": 1.0, "clip": 1.0}
        private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(seed), **options)
        found.append(grads(built)["readout.network.head.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_learns_and_forgets() -> None:
    built, x, y = filled(60), images(60), labels(60)
    optimizers = [
        torch.optim.AdamW(built.parameter_groups(0.0), lr=1e-2),
        torch.optim.Adam([built.memory.store.values], lr=5e-2),
    ]
    built.attach(optimizers[1])
    noise = seeded(7)
    first = built.loss(x, y, ids=range(60), generator=seeded(0)).detach()
    for rows in poisson_batches(60, sample_rate=0.5, steps=100, generator=seeded()):
        for optimizer in optimizers:
            optimizer.zero_grad()
        private_backward(
            built,
            x[rows],
            y[rows],
            ids=rows,
            clip=1.0,
            noise_multiplier=0.03,
            expected_batch_size=30,
            generator=noise,
        )
        for optimizer in optimizers:
            optimizer.step()
    assert built.loss(x, y, ids=range(60), generator=seeded(0)) < 0.8 * first
    assert built.forget([3]).rows == 1


def test_batches_hold_each_instance_by_itself() -> None:
    drawn = torch.zeros(2000, 40)
    for step, rows in enumerate(poisson_batches(40, sample_rate=0.3, steps=2000, generator=seeded(0))):
        drawn[step, rows] = 1
    assert (drawn.mean(0) - 0.3).abs().max() < 4.5 * math.sqrt(0.21 / 2000)
    assert abs(drawn.sum(1).var() - 40 * 0.21) < 5 * 40 * 0.21 * math.sqrt(2 / 2000), "independent: variances add up"
    assert len(list(poisson_batches(3, sample_rate=1.0, steps=2, generator=seeded()))[1]) == 3


def test_nobody_is_in_a_batch_more_often_than_was_said() -> None:
    """A uniform number of float32 is a whole multiple of `2 ** -24`; one of these is 0 among so many."""
    generator, total = seeded(3), 2**22
    uniform = torch.cat([torch.rand(total, generator=generator) for _ in range(16)])
    assert (uniform == 0).any()
    assert all(len(rows) == 0 for rows in poisson_batches(total, sample_rate=2.0**-25, steps=16, generator=seeded(3)))


def test_epsilon_is_not_below_zero() -> None:
    pytest.importorskip("opacus")
    assert epsilon(noise_multiplier=1000.0, sample_rate=0.001, steps=1, delta=0.5) == 0.0


def test_epsilon_of_whole_batches_in_closed_form() -> None:
    """At `q = 1` the Renyi divergence of order `a` is `steps a / (2 s^2)`; the best order gives epsilon."""
    pytest.importorskip("opacus")
    from opacus.accountants import RDPAccountant

    noise, steps, delta = 5.0, 10, 1e-5
    found = [
        steps * a / (2 * noise**2) - (math.log(delta) + math.log(a)) / (a - 1) + math.log((a - 1) / a)
        for a in RDPAccountant.DEFAULT_ALPHAS
    ]
    got = epsilon(noise_multiplier=noise, sample_rate=1.0, steps=steps, delta=delta)
    assert got == pytest.approx(min(found), rel=1e-6)


def test_epsilon_falls_with_noise_and_rises_with_steps_and_share() -> None:
    pytest.importorskip("opacus")
    usual = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 1000, "delta": 1e-5}
    middle = epsilon(**usual)  # type: ignore[arg-type]
    assert epsilon(**{**usual, "noise_multiplier": 2.0}) < middle  # type: ignore[arg-type]
    assert epsilon(**{**usual, "steps": 2000}) > middle  # type: ignore[arg-type]
    assert epsilon(**{**usual, "sample_rate": 0.02}) > middle  # type: ignore[arg-type]


def test_without_the_accountant_it_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ImportError, match=re.escape("to account for privacy: pip install 'treediff[privacy]'")):
        epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=1, delta=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be above 0, found 0.0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0, found -1.0"),
        ({"expected_batch_size": math.inf}, "expected_batch_size must be above 0, found inf"),
        ({"ids": [1]}, "expected one id for each of 2 inputs, found 1"),
        ({"ids": [1, 1]}, "ids [1] are repeated in a batch, expected each once: their gradients together would be"),
        ({"labels": torch.tensor([0, -100])}, "a label is at least 0, found -100; leave out inputs that have no label"),
        ({"labels": torch.tensor([0, 3])}, "expected labels below 3, found 3"),
        ({"labels": torch.tensor([0])}, "expected one label for each of 2 inputs, found (1,)"),
        ({"ids": {0, 1}}, "ids must come in the order of the inputs, found a set, which has none"),
        ({"labels": torch.rand(2, 3)}, "labels must be int64, found torch.float32"),
    ],
)
def test_bad_calls(options: dict[str, object], message: str) -> None:
    built = undropped()
    usual = {"ids": [0, 1], "x": images(2), "labels": labels(2), "generator": seeded(), **QUIET}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        private_backward(built, **{**usual, **options})  # type: ignore[arg-type]
    assert not grads(built)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_refused(dtype: torch.dtype) -> None:
    built = undropped().to(dtype)
    message = "the claim needs weights of float32 or float64, in which rounding is small beside the noise; found "
    with pytest.raises(TypeError, match=f"{message}null of {dtype}; use model.float"):
        private_backward(built, images(2).to(dtype), labels(2), ids=[0, 1], generator=seeded(), **QUIET)
    assert not grads(built)


def length_of_shared(built: KeyMemoryTransformer) -> float:
    found = [grad.flatten() for name, grad in grads(built).items() if name != "memory.store.values"]
    return float(torch.cat(found).double().norm())


@pytest.mark.parametrize("amount", [1e-3, 1.0, 1e15, 1e30, 3e37])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_is_never_longer_than_clip(amount: float, autocast: bool) -> None:
    """Whatever the input: the loss, its gradient or the squares of that may overflow."""
    built, clip = vectors(), 0.25
    x = amount * torch.randn(1, 5, generator=seeded(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        private_backward(built, x, labels(1), ids=[0], generator=seeded(), clip=clip, **NO_NOISE)
    assert length_of_shared(built) <= clip * (1 + 1e-6)
    assert grads(built)["memory.store.values"].isfinite().all()


@pytest.mark.parametrize("amount", [1e30, 3e37])
def test_an_instance_that_overflows_changes_nothing_of_others(amount: float) -> None:
    x = torch.randn(4, 5, generator=seeded(2))
    x[2] *= amount
    found = []
    for rows in ([0, 1, 2, 3], [0, 1, 3]):
        built = vectors()
        private_backward(built, x[rows], labels(4)[rows], ids=rows, generator=seeded(), clip=0.25, **NO_NOISE)
        found.append(grads(built))
    one, other = found
    values = one.pop("memory.store.values"), other.pop("memory.store.values")
    torch.testing.assert_close(values[0][[0, 1, 3]], values[1][[0, 1, 3]])
    assert values[0].isfinite().all()
    gap = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    assert gap <= 0.25 * (1 + 1e-5)


def test_autocast_changes_nothing() -> None:
    found = []
    for autocast in (False, True):
        built = undropped()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            options = {**QUIET, "clip": 0.5, "noise_multiplier": 1.0}
            private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **options)
        found.append(grads(built))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="of the dtype of the weights"):
        private_backward(undropped(), images(1).bfloat16(), labels(1), ids=[0], generator=seeded(), **QUIET)


def test_products_in_less_precision_do_not_lengthen_a_step() -> None:
    before = torch.get_float32_matmul_precision()
    built = undropped()
    try:
        torch.set_float32_matmul_precision("medium")
        options = {"clip": 0.25, **NO_NOISE}
        private_backward(built, images(1), labels(1), ids=[0], generator=seeded(), **options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert length_of_shared(built) <= 0.25 * (1 + 1e-6)


def test_no_gradient_of_an_earlier_loss_is_left() -> None:
    """An optimiser would step on it without noise, also where a weight is not trained any more."""
    built = filled(COUNT, aggregation="softmax", own_token_probability=0.0)
    built.attach(torch.optim.SGD([built.memory.store.values], 0.1))
    built.loss(images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded()).backward()
    built.readout.network.head.weight.requires_grad_(False)
    built.readout.own_token_probability = 1.0
    held = set(grads(built))
    private_backward(built, images(0), labels(0), ids=[], generator=seeded(), **QUIET)
    assert "readout.network.head.weight" in held and any(name.startswith("readout.aggregation") for name in held)
    assert not any(grad.any() for grad in grads(built).values())
    assert built.readout.network.head.weight.grad is None and all(
        p.grad is None for p in built.readout.aggregation.parameters()
    )


def test_values_that_are_not_trained_have_no_gradient() -> None:
    built = undropped()
    built.memory.store.values.requires_grad_(False)
    private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
    assert built.memory.store.values.grad is None and built.readout.network.head.weight.grad is not None


def test_with_dropout_each_instance_draws_by_itself() -> None:
    built = undropped(dropout=0.5).train()
    x, y = images(1).repeat(COUNT, 1, 1, 1), torch.zeros(COUNT, dtype=torch.int64)
    built.memory.store.values.data.fill_(1.0)
    private_backward(built, x, y, ids=range(COUNT), generator=seeded(), clip=0.25, **NO_NOISE)
    own = grads(built)["memory.store.values"][:COUNT]
    assert not torch.equal(own[0], own[1]) and length_of_shared(built) <= COUNT * 0.25 * (1 + 1e-6)


def test_models_for_which_the_claim_does_not_hold() -> None:
    two = undropped()
    two.memory.remember([50], torch.randn(1, 2, 5, generator=seeded(4)), labels(1))
    with torch.random.fork_rng():
        seen = KeyMemoryTransformer.for_images(
            classes=3,
            channels=1,
            size=(8, 6),
            key_encoder=Projection.principal(images(20), 5, fitted_on="forgettable"),
            mode="paper",
            own_token_probability=1.0,
        )
    mixing, frozen = undropped(), undropped()
    mixing.readout.network.norm = torch.nn.BatchNorm1d(8)
    frozen.requires_grad_(False)
    for built, message in (
        (undropped(own_token_probability=0.5), "the claim needs paper mode with own_token_probability=1"),
        (model(mode="exact"), "found mode='exact', own_token_probability=0"),
        (two, "the claim needs one row for each instance, found 9 rows of 8"),
        (seen, "the claim needs an encoder that has not seen what can be forgotten"),
        (mixing, "the claim needs layers that do not mix instances, found a BatchNorm1d, which keeps statistics of ba"),
        (frozen, "no shared weight is trained, expected some; call requires_grad_() on the network"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            private_backward(built, images(1), labels(1), ids=[0], generator=seeded(), **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier must be above 0, found 0.0"),
        ({"sample_rate": 0.0}, "sample_rate must be above 0 and at most 1, found 0.0"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"delta": 1.0}, "delta must be between 0 and 1, found 1.0"),
    ],
)
def test_bad_numbers_of_the_accountant(options: dict[str, float], message: str) -> None:
    usual = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=re.escape(message)):
        epsilon(**{**usual, **options})  # type: ignore[arg-type]


def test_bad_numbers_of_batches() -> None:
    with pytest.raises(ValueError, match=re.escape("sample_rate must be above 0 and at most 1, found 1.5")):
        next(poisson_batches(3, sample_rate=1.5, steps=1, generator=seeded()))
    with pytest.raises(ValueError, match="total must be at least 1, found 0"):
        next(poisson_batches(0, sample_rate=0.5, steps=1, generator=seeded()))


def test_an_empty_batch_leaves_no_gradient_of_the_one_before() -> None:
    built = undropped()
    private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
    private_backward(built, images(0), labels(0), ids=[], generator=seeded(), **QUIET)
    assert built.memory.store.values.grad is None


def test_a_value_that_was_dropped_is_not_in_the_gradient() -> None:
    built = filled(COUNT, drop_input=0.0, drop_exemplar=0.5, sparse=True)
    private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(), **QUIET)
    grad = built.memory.store.values.grad
    assert grad is not None and 0 < len(grad.coalesce().indices()[0]) < COUNT

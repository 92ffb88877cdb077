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
from munkey.privacy import epsilon, poisson_batches, private_backward

COUNT = 7
QUIET = {"clip": 1e9, "noise_multiplier": 0.0, "expected_batch_size": COUNT}


def undropped(**settings: object) -> KeyMemoryTransformer:
    built = filled(COUNT, drop_input=0.0, drop_exemplar=0.0, **settings)
    built.attach(torch.optim.SGD([built.memory.store.values], 0.1))
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
        assert "memory.store.values" not in found and "memory.null" in found and "network.null_input" in found
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
        grads(built)["network.tokens.embed.weight"].abs().max() == 0
        and grads(built)["network.null_input"].abs().max() > 0
    )


def test_the_same_generator_gives_the_same_gradients() -> None:
    found = []
    for seed in (1, 1, 2):
        built = filled(COUNT)
        options = {**QUIET, "noise_multiplier": 1.0, "clip": 1.0}
        private_backward(built, images(COUNT), labels(COUNT), ids=range(COUNT), generator=seeded(seed), **options)
        found.append(grads(built)["network.head.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_learns_and_forgets() -> None:
    built, x, y = filled(60), images(60), labels(60)
    optimizers = [
        torch.optim.AdamW(built.parameter_groups(0.0), lr=1e-2),
        torch.optim.Adam([built.memory.store.values], lr=5e-2),
    ]
    built.attach(optimizers[1])
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
            noise_multiplier=0.3,
            expected_batch_size=30,
            generator=seeded(len(rows)),
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
    ],
)
def test_bad_calls(options: dict[str, object], message: str) -> None:
    built = undropped()
    with pytest.raises(ValueError, match=re.escape(message)):
        private_backward(built, images(2), labels(2), generator=seeded(), **{"ids": [0, 1], **QUIET, **options})  # type: ignore[arg-type]
    assert not grads(built)


def test_models_for_which_the_claim_does_not_hold() -> None:
    two = undropped()
    two.memory.remember([50], torch.randn(1, 2, 5, generator=seeded(4)), labels(1))
    with torch.random.fork_rng():
        seen = KeyMemoryTransformer.for_images(
            3, 1, (8, 6), Projection.principal(images(20), 5, fitted_on="forgettable")
        )
    for built, message in (
        (undropped(own_token_probability=0.5), "the claim needs paper mode with own_token_probability=1"),
        (model(mode="exact"), "found mode='exact', own_token_probability=0"),
        (two, "the claim needs one row for each instance, found 9 rows of 8"),
        (seen, "the claim needs an encoder that has not seen what can be forgotten"),
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

"""The loss of the second stage against a loop over images, and what training tells the network."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradients import assert_gradient_everywhere
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN
from pairs import conditions, half_known, images, small
from strategies import quick
from torch import Tensor
from worlds import seeded

from treediff import LeafConditionedDDPM, TreeCondition
from treediff.diffusion import (
    CosineSchedule,
    DiscreteSchedule,
    NoiseSchedule,
)
from treediff.diffusion.presets import CONDITIONS

each_condition = pytest.mark.parametrize("condition", CONDITIONS)
PREDICTIONS = ("epsilon", "x0", "v")
Seen = dict[str, Any]


def watch(model: LeafConditionedDDPM) -> list[Seen]:
    """What the network is given, call by call."""
    seen: list[Seen] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(dict(zip(("x_t", "t", "told"), given, strict=True))))
    return seen


def speck(n: int = 1, **settings: Any) -> tuple[LeafConditionedDDPM, Tensor, TreeCondition]:  # noqa: ANN401
    """A model for images of 2 x 2 pixels, for large batches."""
    settings = {"size": 2, "multipliers": (1,), "condition": "reconstruction", **settings}
    return small(**settings), images(n, size=(1, 2, 2)), conditions(n=n, size=(1, 2, 2))


# --- the loss -----------------------------------------------------------------------------------------------


def slow_loss(model: LeafConditionedDDPM, x: Tensor, told: TreeCondition, t: Tensor, noise: Tensor) -> float:
    """Image by image, with the weights of each prediction from the definition of min-SNR."""
    total, gamma = 0.0, model.config["for_images"]["min_snr"] if model.config else None
    for i in range(len(x)):
        alpha = math.exp(float(model.schedule.log_alpha(t[i])))
        sigma = math.sqrt(1 - alpha**2)
        clean, eps = 2 * x[i] - 1, noise[i]
        output = model((alpha * clean + sigma * eps)[None], t[i : i + 1], told[i : i + 1])[0]
        wanted = {"epsilon": eps, "x0": clean, "v": alpha * eps - sigma * clean}[model.prediction]
        snr = alpha**2 / sigma**2
        factor = {"epsilon": snr, "x0": 1.0, "v": snr + 1}[model.prediction]
        weight = 1.0 if gamma is None else min(snr, gamma) / factor
        total += weight * float((output - wanted).square().mean())
    return total / len(x)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["cosine", "ddpm"])
@pytest.mark.parametrize("min_snr", [None, 2.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_equals_the_loop_over_images(prediction: str, min_snr: float | None, schedule: str) -> None:
    model = small(prediction=prediction, min_snr=min_snr, schedule=schedule, coarsen=0.0, dtype=torch.float64)
    x, told = images(5, dtype=torch.float64), half_known(conditions(n=5, dtype=torch.float64))
    t = torch.tensor([0.01, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    noise = torch.randn(x.shape, generator=seeded(), dtype=torch.float64)
    found = float(model.loss(x, told, t=t, noise=noise))
    assert found == pytest.approx(slow_loss(model, x, told, t, noise), rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("condition_noise", [0.0, 0.5])
def test_with_draws_of_its_own_it_is_the_same_loss_of_what_was_drawn(condition_noise: float) -> None:
    model = small(condition_noise=condition_noise, coarsen=0.4, dtype=torch.float64)
    x, told = images(6, dtype=torch.float64), conditions(n=6, dtype=torch.float64)
    seen = watch(model)
    found = model.loss(x, told, generator=seeded(3))
    (call,) = seen.copy()
    t = call["t"].double()
    alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    noise = (call["x_t"] - alpha * (2 * x - 1)) / sigma
    assert float(found) == pytest.approx(slow_loss(model, x, call["told"], t, noise), rel=1e-5)


@torch.no_grad()
def test_noise_is_standard_normal_and_that_on_the_condition_another() -> None:
    n, most = 4000, 0.5
    model, x, told = speck(n, condition_noise=most, coarsen=0.3)
    seen = watch(model)
    model.loss(x, told, generator=seeded())
    alpha, sigma = (f(seen[0]["t"]).view(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    noise = (seen[0]["x_t"] - alpha * (2 * x - 1)) / sigma
    level = seen[0]["told"].noise_level
    told_so = level[seen[0]["told"].is_known()]  # whether a row keeps its image has nothing to do with its noise
    assert 0 <= told_so.min() < 0.01 and most - 0.01 < told_so.max() < most
    assert float(told_so.mean()) == pytest.approx(most / 2, abs=0.02)
    size = level.view(-1, 1, 1, 1)
    noisy, clean = 2 * seen[0]["told"].image - 1, 2 * told.require_image() - 1
    on_image = ((noisy - torch.sqrt(1 - size**2) * clean) / size)[level > 0.05]
    for drawn in (noise, on_image):
        assert float(drawn.mean()) == pytest.approx(0, abs=0.03) and float(drawn.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((noise[level > 0.05] * on_image).mean())) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([seen[0]["t"], level]))[0, 1])) < 0.05


@torch.no_grad()
def test_a_share_of_the_rows_is_told_a_node_alone() -> None:
    n = 4000
    model, x, told = speck(n, coarsen=0.3)
    seen = watch(model)
    model.loss(x, told, generator=seeded(1))
    found = seen[0]["told"]
    hidden = ~found.is_known()
    assert float(hidden.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(found.node[~hidden], told.node[~hidden])
    for leaf in GROWN.leaves:
        places = Counter(found.node[hidden & (told.node == leaf)].tolist())
        total, path = places.total(), GROWN.path(leaf)
        assert set(places) == set(path)
        for node in path[:-1]:  # each depth as often as any other; four of them
            assert places[node] / total == pytest.approx(1 / 4, abs=0.08)
    everyone, no_one = small(size=2, multipliers=(1,), coarsen=1.0), small(size=2, multipliers=(1,), coarsen=0.0)
    for model, expected in ((everyone, False), (no_one, True)):
        seen = watch(model)
        model.loss(x, told, generator=seeded(1))
        assert (seen[0]["told"].is_known() == expected).all()


# --- times --------------------------------------------------------------------------------------------------


def times(n: int, seed: int, schedule: NoiseSchedule) -> Tensor:
    model, x, told = speck(n, coarsen=0.0)
    model.schedule = schedule
    seen = watch(model)
    with torch.no_grad():
        model.loss(x, told, generator=seeded(seed))
    found: Tensor = seen[0]["t"]
    return found


@quick
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_times_are_evenly_spread(n: int, seed: int) -> None:
    schedule = CosineSchedule()
    t = times(n, seed, schedule)
    assert t.min() >= schedule.first and t.max() <= 1
    shares = ((t.double() - schedule.first) / (1 - schedule.first)).sort().values
    torch.testing.assert_close(shares.diff(), torch.full((n - 1,), 1 / n, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 10, 1000])
def test_a_discrete_schedule_has_every_step_equally_often(steps: int) -> None:
    """The first and the last included."""
    schedule = DiscreteSchedule.linear(steps, 1e-3, 0.2)
    for seed in range(4):
        drawn = times(2 * steps, seed, schedule) * steps
        assert (drawn - drawn.round()).abs().max() < 1e-4
        assert Counter(drawn.round().int().tolist()) == dict.fromkeys(range(1, steps + 1), 2)


def test_every_image_gets_every_time() -> None:
    """The first row as well as the last."""
    drawn = torch.stack([times(3, seed, DiscreteSchedule.linear(5)) * 5 for seed in range(200)]).round().int()
    for row in drawn.T:
        counts = Counter(row.tolist())
        assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) > 20


# --- what the network is told -------------------------------------------------------------------------------


@torch.no_grad()
@each_condition
@pytest.mark.parametrize("extra", [{}, {"shift": 1.0}, {"condition_noise": 0.5}], ids=str)
def test_the_root_is_no_condition(condition: str, extra: dict[str, float]) -> None:
    """A place at the root is bit by bit the same as every detail hidden there, whatever the details."""
    model, x, t = small(condition=condition, **extra), 2 * images(3) - 1, torch.tensor([0.1, 0.5, 1.0])
    root = TreeCondition.at(0, 3)
    hidden = replace(conditions(n=3), node=root.node, known=torch.zeros(3, dtype=torch.bool))
    expected = model(x, t, root)
    assert torch.equal(model(x, t, hidden), expected)
    assert torch.equal(model.denoiser(hidden)(x, 0.5), model.denoiser(root)(x, 0.5))
    assert torch.equal(
        model.sample(hidden, steps=2, generator=seeded()), model.sample(root, steps=2, generator=seeded())
    )
    reads_details, knows_nodes = condition != "node" or bool(model.shift), condition not in ("reconstruction", "latent")
    assert torch.isclose(model(x, t, replace(hidden, known=None)), expected).all() != reads_details
    assert torch.equal(model(x, t, TreeCondition.at(5, 3)), expected) != knows_nodes


@each_condition
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_reaches_every_parameter(condition: str, prediction: str) -> None:
    model = small(condition=condition, prediction=prediction, condition_noise=0.3, coarsen=0.0, dtype=torch.float64)
    told = half_known(conditions(n=8, dtype=torch.float64, anywhere=True))
    model.loss(images(8, dtype=torch.float64), told, generator=seeded()).backward()
    assert_gradient_everywhere(model, above=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 0.7, 1.0])
def test_what_the_network_sees(shift: float) -> None:
    """`x_t + shift image` where the image is known, then the image."""
    model = small(condition="reconstruction", shift=shift)
    x, t, told = 2 * images(4) - 1, torch.linspace(0.1, 1, 4), half_known(conditions(n=4))
    image = 2 * told.require_image() - 1
    known = told.is_known().view(-1, 1, 1, 1)
    null = model.conditioner.parts[0].null.expand_as(image)  # type: ignore[index,union-attr]
    expected = model.unet(torch.cat([x + shift * image * known, torch.where(known, image, null)], 1), t)
    torch.testing.assert_close(model(x, t, told), expected)
    torch.testing.assert_close(model(x, t, TreeCondition.at(1, 4)), model.unet(torch.cat([x, null], 1), t))


# --- precision, compiling, random numbers -------------------------------------------------------------------


@each_condition
def test_bfloat16_autocast(condition: str) -> None:
    model, x, told = small(condition=condition), images(4), half_known(conditions(n=4))
    expected = model.loss(x, told, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.loss(x, told, generator=seeded())
        drawn = model.sample(told, steps=2, generator=seeded(1))
    assert found.item() == pytest.approx(expected.item(), rel=0.02)
    torch.testing.assert_close(drawn, model.sample(told, steps=2, generator=seeded(1)), atol=0.1, rtol=0)
    found.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["cosine", "ddpm"])
def test_half_precision_keeps_the_times(schedule: str) -> None:
    """How much noise there is fits the time that the network is told, though the images are of few digits."""
    model, x, told = speck(64, schedule=schedule, dtype=torch.bfloat16)
    seen = watch(model)
    model.loss(x.bfloat16(), told, noise=torch.zeros_like(x).bfloat16(), generator=seeded())
    alpha = model.schedule.alpha(seen[0]["t"]).view(-1, 1, 1, 1)
    clean = 2 * x.bfloat16() - 1
    torch.testing.assert_close(seen[0]["x_t"], alpha.bfloat16() * clean)


@each_condition
def test_compiles_in_one_graph(condition: str) -> None:
    torch.compiler.reset()
    model, x, t, told = small(condition=condition), images(3), torch.rand(3, generator=seeded()), conditions(n=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y, expected = compiled(x, t, told), model(x, t, told)
    torch.testing.assert_close(y, expected)
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(out.sum(), parameters, allow_unused=True) for out in (y, expected))
    torch.testing.assert_close(found, wanted)


def test_global_random_numbers_are_left_alone() -> None:
    model, x, told = small(condition_noise=0.3), images(3), conditions(n=3)
    before = torch.get_rng_state()
    first = model.loss(x, told, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.loss(x, told, generator=seeded(1)), first)
    assert not torch.isclose(model.loss(x, told, generator=seeded(2)), first)

"""Drawing from the second stage: against a loop over images and steps, and what must not depend on what."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import GROWN, PRUNED
from pairs import conditions, half_known, images, small
from torch import Tensor
from worlds import seeded

from treediff import LeafConditionedDDPM, TreeCondition
from treediff.core.noise import combine_seeds, counter_normal, seed_from
from treediff.diffusion import (
    ClippedDenoiser,
    DDIMSampler,
    DDPMSampler,
    Denoiser,
    DiscreteSchedule,
    DPMSolverSampler,
    HeunSampler,
    Progress,
    Sampler,
    karras,
    quadratic,
    trailing,
    uniform,
)
from treediff.diffusion.presets import CONDITIONS

SAMPLERS: list[Sampler] = [DPMSolverSampler(), DDPMSampler("large"), DDIMSampler(eta=0.5), HeunSampler()]
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
# In float64, where a product over more rows may add in another order.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def quiet(model: LeafConditionedDDPM) -> LeafConditionedDDPM:
    """With an output so small that estimates stay in their range, and pictures are not black and white."""
    with torch.no_grad():
        model.unet.out.weight.mul_(0.05)
        model.unet.out.bias.mul_(0.05)
    return model


def precise(**settings: Any) -> LeafConditionedDDPM:  # noqa: ANN401
    return quiet(small(dtype=torch.float64, **settings))


def told(n: int = 5, seed: int = 2) -> TreeCondition:
    return half_known(conditions(n=n, seed=seed, dtype=torch.float64))


# --- the chain ----------------------------------------------------------------------------------------------


def slow_sample(
    model: LeafConditionedDDPM, row: TreeCondition, seed: int, index: int, times: list[float], start: Tensor | None
) -> Tensor:
    """One image by DDPM's ancestral steps, in the words of DiffuseVAE: the chain is that of `y = x + shift image`.

    Mean `c1 x0 + c2 y + (1 - c2) shift image`, with `x0 = (y - shift image - sigma eps) / alpha`; formulation 2 for a
    shift of 1, formulation 1 for 0. The network is asked directly, and predicts noise.
    """

    def level(t: float) -> tuple[float, float]:
        time = torch.tensor(t, dtype=torch.float64)
        return float(model.schedule.alpha(time)), float(model.schedule.sigma(time))

    def draw(number: int) -> Tensor:
        return counter_normal(seed, torch.tensor([index]), (1, 8, 8), draw=number, dtype=torch.float64)

    signal = model.conditioner(row)
    known = bool(row.is_known())
    image = model.shift * (2 * row.require_image() - 1) if known else torch.zeros(1, 1, 8, 8)
    alpha, sigma = level(times[0])
    y = image + (draw(0) if start is None else alpha * (2 * start - 1) + sigma * draw(0))
    for step, (s, t) in enumerate(pairwise(times)):
        (alpha_s, sigma_s), (alpha_t, sigma_t) = level(s), level(t)
        inputs = y if signal.image is None else torch.cat([y, signal.image], 1)
        eps = model.unet(inputs, torch.tensor([s]), signal.vector, signal.tokens, signal.mask)
        x0 = ((y - image - sigma_s * eps) / alpha_s).clamp(-1, 1)
        beta = 1 - alpha_s**2 / alpha_t**2
        c1, c2 = alpha_t * beta / sigma_s**2, alpha_s / alpha_t * sigma_t**2 / sigma_s**2
        y = c1 * x0 + c2 * y + (1 - c2) * image + sigma_t / sigma_s * beta**0.5 * draw(step + 1)
    return ((y - image + 1) / 2).clamp(0, 1)[0]


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("start_time", [1.0, 0.6])
@pytest.mark.parametrize("condition", ["diffuse_tree_vae", "path_tokens"])
def test_equals_the_loop_over_images_and_steps(condition: str, start_time: float, shift: float) -> None:
    model = small(condition=condition, shift=shift, prediction="epsilon", schedule="ddpm", dtype=torch.float64)
    rows, begin = told(), images(5, 9, torch.float64) if start_time < 1 else None
    found = model.sample(
        rows, sampler=DDPMSampler(), steps=6, start=begin, start_time=start_time, first_index=11, generator=seeded(4)
    )
    seed = combine_seeds(seed_from(seeded(4)), 1)
    times = uniform(model.schedule, 6, start=start_time).tolist()
    for i in range(5):
        expected = slow_sample(model, rows[i : i + 1], seed, 11 + i, times, None if begin is None else begin[i : i + 1])
        torch.testing.assert_close(found[i], expected, **CLOSE)
    assert ((found > 0) & (found < 1)).any()


@torch.no_grad()
def test_a_start_at_the_noisiest_time_is_not_forgotten() -> None:
    model, rows, begin = precise(), told(), images(5, 9, torch.float64)
    first, last = [], []

    def sampler(_: Denoiser, x: Tensor, times: Tensor, **__: Any) -> Tensor:  # noqa: ANN401
        first.append(x)
        last.append(float(times[-1]))
        return x

    for start in (None, begin):
        model.sample(rows, sampler=sampler, start=start, generator=seeded(1))  # type: ignore[arg-type]
    noise = first[0]
    torch.testing.assert_close(first[1], model.schedule.add_noise(2 * begin - 1, noise, 1.0))
    assert not torch.isclose(first[1], noise).all() and last == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_denoiser_turns_any_prediction_into_an_image(prediction: str) -> None:
    model, rows, x = small(prediction=prediction, dtype=torch.float64), told(), 2 * images(5, dtype=torch.float64) - 1
    for t in (0.1, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = (float(f(time)) for f in (model.schedule.alpha, model.schedule.sigma))
        output = model(x, torch.full((5,), t), rows)
        expected = {"epsilon": (x - sigma * output) / alpha, "x0": output, "v": alpha * x - sigma * output}[prediction]
        torch.testing.assert_close(model.denoiser(rows, clip=False)(x, t), expected, **CLOSE)
        torch.testing.assert_close(model.denoiser(rows)(x, t), expected.clamp(-1, 1), **CLOSE)


# --- what depends on what -----------------------------------------------------------------------------------


@torch.no_grad()
@each_sampler
def test_an_image_does_not_depend_on_its_batch(sampler: Sampler) -> None:
    model, rows = precise(), told(9)
    whole = model.sample(rows, sampler=sampler, steps=4, generator=seeded(5))
    assert torch.equal(model.sample(rows, sampler=sampler, steps=4, generator=seeded(5)), whole)
    for first, n in ((0, 1), (4, 1), (2, 5), (8, 1), (3, 0)):
        part = rows[slice(first, first + n)]
        drawn = model.sample(part, sampler=sampler, steps=4, first_index=first, generator=seeded(5))
        torch.testing.assert_close(drawn, whole[first : first + n], **CLOSE)
    assert not torch.isclose(model.sample(rows, sampler=sampler, steps=4, generator=seeded(6)), whole).all()


def draws(model: LeafConditionedDDPM, n: int, first: int, seed: int, **settings: Any) -> list[Tensor]:  # noqa: ANN401
    """What a chain begins with, and the noise of its first three steps."""
    found: list[Tensor] = []

    def sampler(_: Denoiser, x: Tensor, __: Tensor, noise: Callable[[int], Tensor], callback: object) -> Tensor:
        found.extend([x, *(noise(i) for i in range(3))])
        return x

    rows = TreeCondition(torch.ones(n, dtype=torch.int64), image=images(n))
    model.sample(rows, sampler=sampler, first_index=first, generator=seeded(seed), **settings)  # type: ignore[arg-type]
    return found


def test_noise_is_the_same_bit_for_bit_whatever_the_batch() -> None:
    model = small()
    whole = draws(model, 40, 0, 3)
    for first, n in ((0, 1), (17, 3), (39, 1)):
        for found, expected in zip(draws(model, n, first, 3), whole, strict=True):
            assert torch.equal(found, expected[first : first + n])
    every = torch.stack(whole).flatten(1)
    assert torch.corrcoef(every).fill_diagonal_(0).abs().max() < 0.1  # of 2560 numbers
    assert float(every.std()) == pytest.approx(1, abs=0.02)
    # The tree's draws for the same seed are other numbers.
    root = counter_normal(seed_from(seeded(3)), torch.arange(40), (1, 8, 8))
    assert abs(float((root * whole[0]).mean())) < 0.1 and not torch.isclose(root, whole[0]).all()


def test_global_random_numbers_are_left_alone() -> None:
    model, state = small(), torch.get_rng_state()
    drawn = model.sample(TreeCondition.at(1, 2), sampler=DDPMSampler(), steps=2, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state) and not drawn.requires_grad
    generator = seeded()
    first, second = (
        model.sample(TreeCondition.at(1, 2), sampler=DDPMSampler(), steps=2, generator=generator) for _ in range(2)
    )
    assert torch.equal(first, drawn) and not torch.isclose(first, second).all()  # a generator moves on


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_the_network_is_told_is_worked_out_once(condition: str) -> None:
    model, calls = small(condition=condition), []
    model.conditioner.register_forward_hook(lambda *_: calls.append(1))
    model.sample(conditions(n=2), steps=5)
    assert len(calls) == 1
    model.sample(conditions(n=2), steps=5, guidance=2.0)
    assert len(calls) == 3


# --- guidance -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tree", [GROWN, PRUNED], ids=["grown", "pruned"])
@pytest.mark.parametrize("away_from", ["root", "parent", "sibling"])
def test_guidance_leads_away_from_another_place(away_from: str, tree: Any) -> None:  # noqa: ANN401
    model = precise(tree=tree, shift=0.5)
    rows = conditions(tree, len(tree), dtype=torch.float64, anywhere=True)
    x = torch.randn(len(tree), 1, 8, 8, generator=seeded(), dtype=torch.float64)
    others = []
    for node in rows.node.tolist():
        parent = tree.root if tree.parent(node) is None else tree.parent(node)
        siblings = [child for child in tree.children(parent) if child != node and node != tree.root]
        others.append({"root": tree.root, "parent": parent, "sibling": (*siblings, parent)[0]}[away_from])
    positive = model.denoiser(rows, clip=False)(x, 0.6)
    negative = model.denoiser(TreeCondition.at(others), clip=False)(x, 0.6)
    for weight in (2.5, torch.linspace(0, 3, len(tree), dtype=torch.float64)):
        column = torch.as_tensor(weight).view(-1, 1, 1, 1)
        found = model.denoiser(rows, guidance=weight, away_from=away_from, clip=False)(x, 0.6)
        torch.testing.assert_close(found, negative + column * (positive - negative), **CLOSE)
        clipped = model.denoiser(rows, guidance=weight, away_from=away_from)
        assert isinstance(clipped, ClippedDenoiser)
        torch.testing.assert_close(clipped(x, 0.6), found.clamp(-1, 1), **CLOSE)


@torch.no_grad()
def test_settings_of_guidance_reach_it() -> None:
    model, rows, x = precise(), told(), torch.randn(5, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    plain, guided = model.denoiser(rows, clip=False), model.denoiser(rows, guidance=3.0, clip=False)
    late = model.denoiser(rows, guidance=3.0, interval=(0.0, 0.5), clip=False)
    assert torch.equal(late(x, 0.6), plain(x, 0.6)) and torch.equal(late(x, 0.4), guided(x, 0.4))
    even = model.denoiser(rows, guidance=3.0, rescale=1.0, clip=False)(x, 0.6)
    torch.testing.assert_close(even.flatten(1).std(1), plain(x, 0.6).flatten(1).std(1))
    drawn = [model.sample(rows, steps=3, generator=seeded(1), guidance=g) for g in (1.0, 3.0)]
    assert not torch.isclose(*drawn).all()


# --- grids, samplers, callbacks -----------------------------------------------------------------------------


@torch.no_grad()
def test_grids_go_by_name_or_are_functions() -> None:
    model, rows, seen = precise(), told(2), []
    for name, grid in {"uniform": uniform, "trailing": trailing, "quadratic": quadratic, "karras": karras}.items():
        for choice in (name, grid):
            steps: list[float] = []
            drawn = model.sample(
                rows, steps=4, grid=choice, generator=seeded(), callback=lambda p, s=steps: s.append(p.t)
            )
            assert steps == grid(model.schedule, 4).tolist()[1:]
            seen.append(drawn)
        assert torch.equal(seen[-1], seen[-2])
    assert not torch.isclose(seen[0], seen[2]).all()
    assert torch.equal(model.sample(rows, steps=4, generator=seeded()), seen[0])  # uniform by default
    by_default = model.sample(rows, sampler=DPMSolverSampler(), steps=20, generator=seeded())
    assert torch.equal(model.sample(rows, generator=seeded()), by_default)


def test_callbacks_are_told_of_every_step() -> None:
    model, seen = small(), []
    drawn = model.sample(TreeCondition.at(1, 2), steps=3, callback=seen.append, generator=seeded())
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)] and isinstance(seen[0], Progress)
    torch.testing.assert_close(((seen[-1].x + 1) / 2).clamp(0, 1), drawn)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_conditions_may_be_more_precise_than_the_network(shift: float) -> None:
    model = quiet(small(condition="reconstruction_path", shift=shift))
    rough = half_known(conditions())
    fine = half_known(conditions(dtype=torch.float64))
    found, expected = (model.sample(rows, steps=2, generator=seeded()) for rows in (fine, rough))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_draws_without_dropout_whatever_the_mode() -> None:
    model, told = quiet(small(dropout=0.5)).train(), TreeCondition.at(1, 2)
    model.unet.out.eval()
    modes = [module.training for module in model.modules()]
    found = model.sample(told, steps=2, generator=seeded())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        model.sample(told, steps=2, callback=lambda progress: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.eval().sample(told, steps=2, generator=seeded()), found)


def test_noise_of_a_late_start_is_that_of_the_first_time_of_the_grid() -> None:
    """Which a schedule of steps rounds: 0.25 of 10 steps is 0.2."""
    model, x = small(schedule="ddpm"), images(2)
    model.schedule = DiscreteSchedule.linear(10, 0.01, 0.3)
    drawn: list[Tensor] = []
    for time in (0.2, 0.25):
        settings: dict[str, Any] = {"start": x, "start_time": time, "steps": 2, "sampler": DDIMSampler()}
        drawn.append(model.sample(TreeCondition.at(1, 2), generator=seeded(), **settings))
    assert torch.equal(*drawn)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "even"}, "grid must be one of uniform, trailing, quadratic, karras, or a function; found 'even'"),
        ({"start_time": 0.5}, "a chain that begins at t = 0.5 needs images to begin with; pass start="),
        ({"away_from": "leaf"}, "away_from must be one of root, parent, sibling; found 'leaf'"),
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"guidance": torch.ones(3)}, "expected one weight, or one for each of the 2 images; found (3,)"),
        ({"guidance": 2.0, "rescale": 2.0}, "rescale must be between 0 and 1, found 2.0"),
        ({"rescale": 2.0}, "rescale must be between 0 and 1, found 2.0"),
        ({"interval": (0.6, 0.5)}, "interval must be two times, 0 <= low <= high <= 1, found (0.6, 0.5)"),
        ({"start": images(2), "start_time": 0.0}, "start must be a time after 0.001 and at most 1, found 0.0"),
        ({"start": images(1)}, "condition must have one row for each of the 1 images, found 2"),
    ],
)
def test_errors_teach(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small().sample(TreeCondition.at(1, 2), **settings)


def test_guidance_away_from_what_was_never_learned_is_an_error() -> None:
    model, rows = small(coarsen=0.0), TreeCondition.at(1, 2)
    for away_from in ("root", "parent"):
        message = (
            f"guidance away from the {away_from} needs a model that was trained on inner nodes too, found coarsen=0"
        )
        for guidance in (2.0, torch.ones(2)):
            with pytest.raises(ValueError, match=message):
                model.sample(rows, steps=1, guidance=guidance, away_from=away_from)
        model.sample(rows, steps=1, away_from=away_from)
    model.sample(rows, steps=1, guidance=2.0, away_from="sibling")


def test_places_must_be_in_the_tree() -> None:
    with pytest.raises(KeyError, match="there is no node 9 in the tree"):
        small().sample(TreeCondition.at(9), steps=1)

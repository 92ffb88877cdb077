"""Noise on the condition in generation: what it is, what it reaches, and what it leaves alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pairs import conditions, images, small
from test_ddpm_sampling import draws, precise, told
from torch import Tensor
from worlds import seeded

from treediff import TreeCondition
from treediff.core.noise import combine_seeds, counter_normal, seed_from
from treediff.diffusion import DDPMSampler


def on_condition(n: int, first: int, seed: int, level: float, x: Tensor) -> tuple[Tensor, TreeCondition]:
    """The noise that was put on the condition's images, and what the conditioner was told."""
    model, seen = small(condition="reconstruction_path", condition_noise=0.8, multipliers=(1,)), []
    model.conditioner.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rows = TreeCondition(torch.ones(n, dtype=torch.int64), image=x)
    model.sample(rows, steps=1, condition_noise=level, first_index=first, generator=seeded(seed))
    (told,) = seen
    return (2 * told.require_image() - 1 - (1 - level**2) ** 0.5 * (2 * x - 1)) / level, told


@pytest.mark.parametrize("level", [0.2, 0.8])
def test_a_level_of_noise_reaches_the_conditioner(level: float) -> None:
    n, x = 400, images(400, dtype=torch.float64)
    noise, told = on_condition(n, 0, 3, level, x)
    assert told.noise_level is not None and told.noise_level.shape == (n,)
    assert torch.equal(told.noise_level, torch.full((n,), level))
    seed = combine_seeds(seed_from(seeded(3)), 1)
    expected = counter_normal(seed, torch.arange(n), (1, 8, 8), draw=-1, dtype=torch.float64)
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-6)  # levels are in float32, as in training
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert float(noise.var()) == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)
    assert torch.corrcoef(noise.flatten(1)[:50]).fill_diagonal_(0).abs().max() < 0.6  # of 64 numbers each


def test_noise_on_the_condition_is_of_its_own_draw_whatever_the_batch() -> None:
    x = images(40)
    whole, _ = on_condition(40, 0, 3, 0.5, x)
    for first, n in ((0, 1), (17, 3), (39, 1), (40, 0)):
        assert torch.equal(on_condition(n, first, 3, 0.5, x[first : first + n])[0], whole[first : first + n])
    assert not torch.isclose(on_condition(40, 0, 4, 0.5, x)[0], whole).all()
    chain = torch.stack([whole, *draws(small(), 40, 0, 3)]).flatten(1)
    assert torch.corrcoef(chain).fill_diagonal_(0).abs().max() < 0.1  # of 2560 numbers


def test_noise_on_the_condition_leaves_that_of_the_chain_alone() -> None:
    model = small(condition="reconstruction_path", condition_noise=0.8)
    for found, expected in zip(draws(model, 5, 2, 3, condition_noise=0.5), draws(model, 5, 2, 3), strict=True):
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("condition", ["reconstruction_path", "diffuse_tree_vae"])
def test_a_noisy_condition_is_the_condition_with_noise_on_it(condition: str, shift: float, guidance: float) -> None:
    model, rows = precise(condition=condition, condition_noise=0.5, shift=shift), told()
    settings: dict[str, Any] = {"sampler": DDPMSampler(), "steps": 3, "first_index": 7, "guidance": guidance}
    found = model.sample(rows, condition_noise=0.5, generator=seeded(4), **settings)
    seed, index = combine_seeds(seed_from(seeded(4)), 1), torch.arange(7, 12)
    noise = counter_normal(seed, index, (1, 8, 8), draw=-1, dtype=torch.float64)
    noised = rows.noised(torch.full((5,), 0.5), noise)
    assert torch.equal(found, model.sample(noised, generator=seeded(4), **settings))
    plain, none = (model.sample(rows, generator=seeded(4), **settings, **s) for s in ({}, {"condition_noise": 0}))
    assert torch.equal(plain, none)
    known = rows.is_known()
    assert torch.equal(found[~known], plain[~known])  # there was no image to put noise on
    assert not torch.isclose(found[known], plain[known]).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("built", "level"),
    [(0.0, 0.1), (0.5, 0.51), (0.5, -0.1), (0.5, float("nan"))],
    ids=["built without", "more", "less", "nan"],
)
def test_a_level_must_be_one_of_training(built: float, level: float) -> None:
    model = small(condition="reconstruction_path", condition_noise=built)
    message = (
        f"condition_noise must be between 0 and the greatest level of training, {built}, found {level}; for more "
        "noise, train a model that was built with a greater condition_noise"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.sample(conditions(n=2), condition_noise=level)


def test_noise_needs_an_image_to_go_on() -> None:
    model = small(condition="reconstruction_path", condition_noise=0.5)
    with pytest.raises(ValueError, match="this condition has no image; make one with a TreeVAE, or pass image="):
        model.sample(TreeCondition.at(1, 2), steps=1, condition_noise=0.2)
    model.sample(TreeCondition.at(1, 2), steps=1, condition_noise=0.0)

"""Augmentations: kornia's transformations, with the draws of a seed, an image at a time."""

from __future__ import annotations

import re
import sys
from typing import Any

import kornia.augmentation as kornia
import pytest
import torch
from torch import nn
from worlds import seeded

from treediff.augment import Augment, celeba_augment, cifar_augment, contrastive_views, omniglot_augment

PRESETS = {"cifar": lambda: cifar_augment(8), "celeba": lambda: celeba_augment((8, 8)), "omniglot": omniglot_augment}
each_preset = pytest.mark.parametrize("name", PRESETS)


def images(count: int = 6, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, 8, 8, generator=seeded())


@each_preset
def test_the_seed_decides_and_the_global_state_stays(name: str) -> None:
    augment, state = PRESETS[name](), torch.get_rng_state()
    one, again, other = (augment(images(), generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (6, 3, 8, 8) and one.min() >= 0 and one.max() <= 1


@each_preset
def test_every_image_has_draws_of_its_own(name: str) -> None:
    same = images(1).expand(20, -1, -1, -1).contiguous()
    changed = PRESETS[name]()(same, generator=seeded())
    assert len({image.numpy().tobytes() for image in changed}) > 10


def test_the_draws_are_those_that_kornia_makes_of_the_seed() -> None:
    step = kornia.RandomAffine(10.0, (0.1, 0.1), p=1.0)
    found = Augment(step)(images(), generator=seeded(3))
    inverse = kornia.RandomAffine(10.0, (0.1, 0.1), p=1.0)
    assert torch.equal(found, inverse(images(), params=step._params))


def test_two_views_differ() -> None:
    first, second = contrastive_views(images(), cifar_augment(8), generator=seeded())
    assert first.shape == second.shape and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    augment = omniglot_augment()
    found = augment(images().to(dtype), generator=seeded(1))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), augment(images(), generator=seeded(1)), atol=0.01, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images().to(dtype), generator=seeded(1)), found)


def test_grey_and_empty_batches_pass() -> None:
    assert omniglot_augment()(images(channels=1), generator=seeded()).shape == (6, 1, 8, 8)
    assert cifar_augment(8)(images(0)).shape == (0, 3, 8, 8)
    assert repr(Augment(nn.Identity())) == "Augment(Identity())"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Augment("flip"), TypeError, "expected modules such as kornia.augmentation.RandomHorizontalFlip()"),
        (lambda: Augment()(torch.rand(3, 8, 8)), ValueError, "found (3, 8, 8); give a single image a batch axis"),
        (lambda: Augment()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "x.float() / 255"),
    ],
)
def test_errors_teach(call: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_without_kornia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ImportError, match=re.escape("augmentations are kornia's: pip install 'treediff[augment]'")):
        cifar_augment()

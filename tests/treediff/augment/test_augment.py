"""What holds for every augmentation: range, randomness, independence, settings; and the presets."""

import math
import pickle
from typing import Any

import pytest
import torch
from augmenting import EVERYTHING, PRESETS, close, pictures, seeded
from torch import Tensor

from treediff.augment import (
    Augment,
    ColorJitter,
    RandomAffine,
    RandomFlip,
    RandomGray,
    RandomResizedCrop,
    celeba_augment,
    cifar_augment,
    contrastive_views,
    gray,
    omniglot_augment,
)


@pytest.mark.parametrize("augment", [*[make() for make in PRESETS.values()], EVERYTHING], ids=[*PRESETS, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pictures_stay_pictures(augment: Augment, dtype: torch.dtype) -> None:
    images = pictures(64, 3, 9, 6, dtype=dtype)
    images[::2] = images[::2].round()  # all channels at 0 or 1, where rounding would stick out first
    before = images.clone()
    found = augment(images, generator=seeded())
    assert found.shape == images.shape and found.dtype == dtype
    assert 0 <= found.min() and found.max() <= 1
    assert torch.equal(images, before) and not torch.equal(found, images)
    if dtype != torch.float64:  # one seed is one set of parameters, whatever the precision
        close(found.double(), augment(before.double(), generator=seeded()), 0.01)


def test_same_seed_same_pictures_and_the_global_generator_rests() -> None:
    images, augment = pictures(4, 3, 6, 6), cifar_augment()
    state = torch.get_rng_state()
    first, second = augment(images, generator=seeded(1)), augment(images, generator=seeded(1))
    assert torch.equal(first, second) and not torch.equal(first, augment(images, generator=seeded(2)))
    assert torch.equal(state, torch.get_rng_state())


def test_without_a_generator_numbers_come_from_torchs_own() -> None:
    images, augment = pictures(4, 3, 6, 6), cifar_augment()
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(seeded(3).get_state())
        found = augment(images)
    assert torch.equal(found, augment(images, generator=seeded(3)))


def test_generator_and_noise_are_two_ways_to_say_the_same() -> None:
    images, augment = pictures(4, 3, 6, 6), cifar_augment()
    noise = torch.rand(4, augment.draws, generator=seeded(5))
    assert torch.equal(augment(images, noise=noise), augment(images, generator=seeded(5)))


def test_images_do_not_see_each_other() -> None:
    images, noise = pictures(8, 3, 6, 6), torch.rand(8, EVERYTHING.draws, generator=seeded())
    whole = EVERYTHING(images, noise=noise)
    for i in range(8):
        close(EVERYTHING(images[i : i + 1], noise=noise[i : i + 1]), whole[i : i + 1])
    # The first images of a batch keep their parameters however long the batch is.
    close(EVERYTHING(images[:3], generator=seeded(4)), EVERYTHING(images, generator=seeded(4))[:3])


def test_copies_of_one_image_come_out_different() -> None:
    images = pictures(1, 3, 8, 8).expand(16, -1, -1, -1)
    found = EVERYTHING(images, generator=seeded()).flatten(1)
    assert (torch.cdist(found, found) + torch.eye(16) > 0.1).all()


def test_steps_have_numbers_of_their_own() -> None:
    images = pictures(4, 3, 6, 6)
    noise = torch.tensor([[0.0, 0.0], [0.0, 0.9], [0.9, 0.0], [0.9, 0.9]])
    found = Augment(RandomFlip(), RandomGray(p=0.5))(images, noise=noise)
    expected = images.clone()
    expected[:2] = expected[:2].flip(-1)
    expected[::2] = gray(expected[::2])
    close(found, expected)


def test_autocast_does_not_blur_positions() -> None:
    images = pictures(4, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EVERYTHING(images, generator=seeded())
    assert torch.equal(found, EVERYTHING(images, generator=seeded()))


def test_compiles_in_one_graph_and_so_never_waits_for_a_value() -> None:
    images, noise = pictures(4, 3, 6, 6), torch.rand(4, EVERYTHING.draws, generator=seeded())

    def run(images: Tensor, noise: Tensor) -> Tensor:
        return EVERYTHING(images, noise=noise)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    close(compiled(images, noise), run(images, noise))


def test_empty_things_are_fine() -> None:
    images = pictures(2, 3, 4, 4)
    assert torch.equal(Augment()(images, generator=seeded()), images)
    assert EVERYTHING(images[:0], generator=seeded()).shape == (0, 3, 4, 4)


def test_travels_to_worker_processes_and_shows_its_settings() -> None:
    augment = cifar_augment()
    copy = pickle.loads(pickle.dumps(augment))
    assert copy.steps == augment.steps
    assert repr(Augment(RandomFlip(p=0.25), RandomGray(p=0.5))) == "Augment(RandomFlip(p=0.25), RandomGray(p=0.5))"


# --- presets ------------------------------------------------------------------------------------------------


def test_presets_are_the_papers() -> None:
    assert cifar_augment().steps == (
        RandomResizedCrop(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)),
        RandomFlip(p=0.5),
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        RandomGray(p=0.2),
    )
    assert celeba_augment().steps == (
        RandomResizedCrop(scale=(0.75, 1.0), ratio=(0.8, 1.25)),
        RandomFlip(p=0.5),
        ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.0, p=0.8),
    )
    assert omniglot_augment().steps == (RandomAffine(degrees=10, translate=1 / 28, scale=(0.9, 1.1), shear=0.01),)


def test_views_are_two_independent_draws() -> None:
    images = pictures(4, 3, 6, 6)
    generator = seeded(7)
    expected = cifar_augment()(images, generator=generator), cifar_augment()(images, generator=generator)
    first, second = contrastive_views(images, generator=seeded(7))
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert ((first - second).flatten(1).abs().amax(1) > 0.05).all()
    mild, _ = contrastive_views(images, Augment(RandomFlip(p=1)), generator=seeded(7))
    close(mild, images.flip(-1))


# --- errors -------------------------------------------------------------------------------------------------


def test_refuses_what_is_not_a_batch_of_float_images() -> None:
    with pytest.raises(ValueError, match=r"found \(3, 4, 4\); give a single image a batch axis with image\[None\]"):
        cifar_augment()(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match=r"float images in \[0, 1\]; found torch.uint8; convert .* x.float.. / 255"):
        cifar_augment()(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_refuses_noise_that_does_not_fit() -> None:
    images, augment = torch.zeros(2, 3, 4, 4), Augment(RandomFlip())
    with pytest.raises(ValueError, match=r"shape \(2, 1\), one row per image .* found \(2, 3\); make it with"):
        augment(images, noise=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="either generator or noise, found both"):
        augment(images, noise=torch.zeros(2, 1), generator=seeded())


def test_refuses_what_is_not_a_step() -> None:
    with pytest.raises(TypeError, match="each a GeometricStep or a ColorStep; found 'flip' of type str"):
        Augment("flip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RandomResizedCrop(scale=(0.0, 1.0)),
            r"scale is a pair .* above 0 and at most 1; found \(0.0, 1.0\)",
        ),
        (lambda: RandomResizedCrop(scale=(0.5, 1.5)), r"at most 1; found \(0.5, 1.5\)"),
        (lambda: RandomResizedCrop(scale=(0.9, 0.5)), r"found \(0.9, 0.5\)"),
        (lambda: RandomResizedCrop(ratio=(1.0, math.inf)), r"ratio is a pair .* found \(1.0, inf\)"),
        (lambda: RandomFlip(p=1.5), "p is a probability from 0 to 1; found 1.5"),
        (lambda: RandomGray(p=-0.1), "p is a probability from 0 to 1; found -0.1"),
        (lambda: ColorJitter(p=math.nan), "p is a probability from 0 to 1; found nan"),
        (lambda: ColorJitter(brightness=-1.0), "brightness must be from 0 to inf, found -1.0"),
        (lambda: ColorJitter(contrast=math.inf), "contrast must be from 0 to inf, found inf"),
        (lambda: ColorJitter(saturation=math.nan), "saturation must be from 0 to inf, found nan"),
        (lambda: ColorJitter(hue=0.6), "hue must be from 0 to 0.5, found 0.6"),
        (lambda: RandomAffine(degrees=-1.0), "degrees must be from 0 to 180.0, found -1.0"),
        (lambda: RandomAffine(translate=2.0), "translate must be from 0 to 1.0, found 2.0"),
        (
            lambda: RandomAffine(scale=(0.0, 1.0)),
            r"scale is a pair .* above 0 and at most inf; found \(0.0, 1.0\)",
        ),
        (lambda: RandomAffine(shear=90.0), "shear must be from 0 to 89.0, found 90.0"),
    ],
)
def test_refuses_settings(make: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        make()

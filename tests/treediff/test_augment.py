"""Augmentations against slicing, colorsys, formulas by hand, and their own one-by-one execution."""

import colorsys
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from treediff.augment import (
    Augment,
    ColorJitter,
    ColorStep,
    GeometricStep,
    RandomAffine,
    RandomFlip,
    RandomGray,
    RandomResizedCrop,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    celeba_augment,
    cifar_augment,
    contrastive_views,
    gray,
    hsv_to_rgb,
    omniglot_augment,
    rgb_to_hsv,
    warp,
)

PRESETS = {"cifar": cifar_augment, "celeba": celeba_augment, "omniglot": omniglot_augment}
EVERYTHING = Augment(
    RandomFlip(),
    RandomAffine(degrees=30, translate=0.2, scale=(0.7, 1.4), shear=10),
    ColorJitter(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5, p=0.7),
    RandomResizedCrop(scale=(0.3, 1.0)),
    RandomGray(p=0.3),
)
sides = st.integers(1, 9)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


# --- geometry: moves whose answer is slicing ----------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), sides, sides)
def test_identity_gives_the_input_back(channels: int, height: int, width: int) -> None:
    images = pictures(2, channels, height, width)
    close(warp(images, torch.eye(3).expand(2, 3, 3)), images)
    still = Augment(RandomFlip(p=0), RandomAffine(), RandomResizedCrop(scale=(1.0, 1.0)))
    close(still(images, generator=seeded()), images)


def test_identity_is_exact_to_double_precision_on_large_pictures() -> None:
    images = pictures(1, 1, 200, 300, dtype=torch.float64)
    close(Augment(RandomAffine())(images, generator=seeded()), images, 1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), sides, sides)
def test_flip_is_torch_flip(channels: int, height: int, width: int) -> None:
    images = pictures(2, channels, height, width)
    flipped = Augment(RandomFlip(p=1))(images, generator=seeded())
    close(flipped, images.flip(-1))


def test_flip_draws_for_each_image() -> None:
    images = pictures(4, 3, 5, 5)
    flipped = Augment(RandomFlip(p=0.5))(images, noise=torch.tensor([[0.0], [0.49], [0.5], [0.99]]))
    close(flipped, torch.cat([images[:2].flip(-1), images[2:]]))


@settings(deadline=None)
@given(sides, sides, st.data())
def test_translation_by_whole_pixels_is_slicing_into_black(
    height: int, width: int, data: st.DataObject
) -> None:
    right, down = data.draw(st.integers(-width, width)), data.draw(st.integers(-height, height))
    images = pictures(1, 2, height, width, dtype=torch.float64)
    noise = torch.tensor(
        [[0.5, (right / width + 1) / 2, (down / height + 1) / 2, 0.5, 0.5]], dtype=torch.float64
    )
    moved = Augment(RandomAffine(translate=1.0))(images, noise=noise)
    close(moved, F.pad(images, (right, -right, down, -down)), 1e-9)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (6, 12)])
def test_crop_of_a_third_is_slicing_where_it_hits_pixels(height: int, width: int) -> None:
    """Stretched three times, every third output pixel lies on the middle of an input pixel."""
    images, ratio = pictures(1, 3, height, width, dtype=torch.float64), width / height
    crop = Augment(RandomResizedCrop(scale=(1 / 9, 1 / 9), ratio=(ratio, ratio)))
    h, w = height // 3, width // 3
    for top in range(height - h + 1):
        for left in range(width - w + 1):
            noise = torch.tensor([[0.5, 0.5, left / (width - w), top / (height - h)]], dtype=torch.float64)
            middles = crop(images, noise=noise)[..., 1::3, 1::3]
            close(middles, images[..., top : top + h, left : left + w], 1e-9)


def test_crop_at_the_edge_continues_it_instead_of_darkening() -> None:
    white = torch.ones(8, 1, 7, 7)
    close(Augment(RandomResizedCrop(scale=(0.1, 1.0)))(white, generator=seeded()), white)


def test_white_stays_white_to_the_last_bit() -> None:
    """At this size the bilinear weights of some pixels add up to more than 1 in float32."""
    white, step = (
        torch.ones(32, 3, 33, 33),
        RandomAffine(degrees=45, translate=0.5, scale=(0.8, 3.0), shear=30),
    )
    assert Augment(step)(white, generator=seeded()).max() == 1


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_quarter_turns_are_rot90_and_positive_is_clockwise(turns: int) -> None:
    images = pictures(1, 2, 8, 4, dtype=torch.float64)
    noise = torch.tensor([[(turns / 2 + 1) / 2, 0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    turned = Augment(RandomAffine(degrees=180))(images, noise=noise)
    # The middle square turns onto itself whatever the picture's shape.
    close(turned[..., 2:6, :], torch.rot90(images[..., 2:6, :], -turns, (-2, -1)), 1e-9)
    if turns != 2:
        assert turned[..., :2, :].max() == turned[..., 6:, :].max() == 0


# --- geometry: any matrix -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9))
def test_linear_pictures_show_where_each_pixel_came_from(seed: int, height: int, width: int) -> None:
    """Bilinear interpolation is exact on a ramp, so the warped ramp spells out every source position."""
    ys = (2 * torch.arange(height, dtype=torch.float64) + 1) / height - 1
    xs = (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    images = ((torch.stack([x, y]) + 1) / 2)[None]
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2] += 0.6 * torch.randn(2, 3, generator=seeded(seed), dtype=torch.float64)
    source_x, source_y = torch.einsum("rc,chw->rhw", matrix[:2], torch.stack([x, y, torch.ones_like(x)]))
    inner = (source_x.abs() < 1 - 1 / width) & (source_y.abs() < 1 - 1 / height)
    outside = (source_x.abs() > 1) | (source_y.abs() > 1)
    found = warp(images, matrix[None])[0]
    close(found[:, inner], ((torch.stack([source_x, source_y]) + 1) / 2)[:, inner], 1e-9)
    assert (found[:, outside] == 0).all()


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.integers(1, 50), st.integers(1, 50))
def test_affine_matrix_is_the_inverse_of_the_documented_map(
    draw: list[float], height: int, width: int
) -> None:
    step = RandomAffine(degrees=170, translate=0.3, scale=(0.5, 2.0), shear=60)
    (matrix,) = step.matrices(torch.tensor([draw], dtype=torch.float64), height, width)
    turn, lean = math.radians(170 * (2 * draw[0] - 1)), math.radians(60 * (2 * draw[4] - 1))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    forward = np.eye(3)
    forward[:2, :2] = (0.5 + 1.5 * draw[3]) * rotation @ np.array([[1, math.tan(lean)], [0, 1]])
    forward[:2, 2] = [0.3 * (2 * draw[1] - 1) * width, 0.3 * (2 * draw[2] - 1) * height]
    to_pixels = np.diag([width / 2, height / 2, 1.0])
    expected = np.linalg.inv(to_pixels) @ np.linalg.inv(forward) @ to_pixels
    close(matrix, torch.from_numpy(expected), 1e-9)


def test_fused_steps_equal_steps_one_by_one() -> None:
    """Moves by whole pixels lose nothing, so here one resampling must equal three, in either order."""
    images = pictures(3, 2, 8, 8, dtype=torch.float64)
    flip, shift = RandomFlip(p=1), RandomAffine(translate=0.25)
    turn = RandomAffine(degrees=90)
    noise = torch.rand(3, 11, generator=seeded(), dtype=torch.float64)
    noise[:, :6] = torch.tensor([0.0, 0.5, 0.75, 1.0, 0.5, 0.5])
    noise[:, 6] = 1.0
    one_by_one = images
    for step, columns in ((flip, noise[:, :1]), (shift, noise[:, 1:6]), (turn, noise[:, 6:])):
        one_by_one = Augment(step)(one_by_one, noise=columns)
    close(Augment(flip, shift, turn)(images, noise=noise), one_by_one, 1e-9)
    other_order = Augment(shift, flip, turn)(images, noise=noise[:, [1, 2, 3, 4, 5, 0, *range(6, 11)]])
    assert (other_order - one_by_one).abs().max() > 0.1


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (Augment(RandomFlip(), RandomAffine(degrees=5), RandomResizedCrop()), 1),
        (EVERYTHING, 2),
        (Augment(), 0),
    ],
)
def test_neighbouring_moves_cost_one_resampling(
    augment: Augment, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sample = F.grid_sample

    def counted(*args: Any, **options: Any) -> Tensor:  # noqa: ANN401
        calls.append(1)
        return sample(*args, **options)

    monkeypatch.setattr(F, "grid_sample", counted)
    augment(pictures(2, 3, 4, 4), generator=seeded())
    assert len(calls) == expected


# --- what crops are drawn -----------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 10**6),
)
def test_crops_have_their_area_lie_inside_and_keep_the_ratio_where_they_can(
    scale: tuple[float, float], ratio: tuple[float, float], height: int, width: int, seed: int
) -> None:
    scale, ratio = (min(scale), max(scale)), (min(ratio), max(ratio))
    noise = torch.rand(64, 4, generator=seeded(seed), dtype=torch.float64)
    matrices = RandomResizedCrop(scale=scale, ratio=ratio).matrices(noise, height, width)
    w, h, x, y = matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 0, 2], matrices[:, 1, 2]
    slack = 1e-9
    area, aspect = w * h, (w * width) / (h * height)
    assert scale[0] - slack <= area.min() and area.max() <= scale[1] + slack
    assert max((x.abs() + w).max(), (y.abs() + h).max()) <= 1 + slack
    # Outside of the range only when no ratio of the range fits: then a side fills the image.
    fills = (w > 1 - slack) | (h > 1 - slack)
    assert (((aspect > ratio[0] - slack) & (aspect < ratio[1] + slack)) | fills).all()


def test_crops_are_spread_evenly() -> None:
    """Areas, places and log-ratios (of areas that always fit) have the uniform's mean and variance."""
    step = RandomResizedCrop(scale=(0.2, 0.6), ratio=(3 / 4, 4 / 3))
    matrices = step.matrices(torch.rand(20000, 4, generator=seeded(), dtype=torch.float64), 32, 32)
    w, h = matrices[:, 0, 0], matrices[:, 1, 1]
    uniforms = torch.stack(
        [
            (w * h - 0.2) / 0.4,
            (torch.log(w / h) / math.log(4 / 3) + 1) / 2,
            (matrices[:, 0, 2] / (1 - w) + 1) / 2,
            (matrices[:, 1, 2] / (1 - h) + 1) / 2,
        ]
    )
    # Five standard errors of a mean and of a variance over 20000 draws.
    assert (uniforms.mean(1) - 1 / 2).abs().max() < 5 * math.sqrt(1 / 12 / 20000)
    assert (uniforms.var(1) - 1 / 12).abs().max() < 5 * math.sqrt(1 / 180 / 20000)
    correlation = torch.corrcoef(uniforms) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(20000)


# --- colour -------------------------------------------------------------------------------------------------

channel = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
colors = st.lists(st.tuples(channel, channel, channel), min_size=1, max_size=20)


def as_image(pixels: list[tuple[float, float, float]]) -> Tensor:
    return torch.tensor(pixels, dtype=torch.float64).T[None, :, None, :]


@settings(deadline=None, max_examples=50)
@given(colors)
def test_hsv_agrees_with_colorsys_pixel_by_pixel(pixels: list[tuple[float, float, float]]) -> None:
    found = rgb_to_hsv(as_image(pixels))
    expected = as_image([colorsys.rgb_to_hsv(*pixel) for pixel in pixels])
    around = (found - expected)[:, 0].abs()  # hues of 0 and 1 are one and the same
    close(torch.minimum(around, 1 - around), torch.zeros_like(around), 1e-9)
    close(found[:, 1:], expected[:, 1:], 1e-12)
    assert found.min() >= 0 and found[:, 0].max() <= 1
    close(hsv_to_rgb(found), as_image(pixels), 1e-9)


@settings(deadline=None, max_examples=50)
@given(colors)
def test_rgb_agrees_with_colorsys_pixel_by_pixel(pixels: list[tuple[float, float, float]]) -> None:
    close(hsv_to_rgb(as_image(pixels)), as_image([colorsys.hsv_to_rgb(*pixel) for pixel in pixels]), 1e-9)


@settings(deadline=None, max_examples=50)
@given(colors, st.floats(-1, 1))
def test_hue_turns_as_in_colorsys(pixels: list[tuple[float, float, float]], shift: float) -> None:
    def turned(pixel: tuple[float, float, float]) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    found = adjust_hue(as_image(pixels), torch.tensor([shift], dtype=torch.float64))
    close(found, as_image([turned(pixel) for pixel in pixels]), 1e-8)


def test_gray_has_the_weights_of_the_itu() -> None:
    images = pictures(2, 3, 4, 5, dtype=torch.float64)
    expected = torch.einsum("bchw,c->bhw", images, torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64))
    close(gray(images), expected[:, None], 1e-12)


def test_brightness_contrast_and_saturation_by_hand() -> None:
    images, factors = pictures(4, 3, 5, 6, dtype=torch.float64), [0.0, 0.6, 1.0, 1.7]
    factor = torch.tensor(factors, dtype=torch.float64)
    for image, f, bright, contrast, saturated in zip(
        images.numpy(),
        factors,
        adjust_brightness(images, factor),
        adjust_contrast(images, factor),
        adjust_saturation(images, factor),
        strict=True,
    ):
        luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        for found, expected in (
            (bright, f * image),
            (contrast, f * image + (1 - f) * luma.mean()),
            (saturated, f * image + (1 - f) * luma),
        ):
            close(found, torch.from_numpy(np.clip(expected, 0, 1)), 1e-12)


@pytest.mark.parametrize("at", [(0.0,) * 4, (1.0,) * 4, (0.9, 0.2, 0.7, 0.1)])
def test_jitter_draws_between_its_ends_and_goes_in_order(at: tuple[float, ...]) -> None:
    images = pictures(2, 3, 4, 4, dtype=torch.float64)
    jitter = ColorJitter(brightness=0.4, contrast=0.3, saturation=1.5, hue=0.1)
    bright, contrast, saturation, hue = (2 * x - 1 for x in at)

    def per_image(value: float) -> Tensor:
        return torch.full((2,), value, dtype=torch.float64)

    expected = adjust_brightness(images, per_image(1 + 0.4 * bright))
    expected = adjust_contrast(expected, per_image(1 + 0.3 * contrast))
    expected = adjust_saturation(expected, torch.lerp(per_image(0.0), per_image(2.5), (saturation + 1) / 2))
    expected = adjust_hue(expected, per_image(0.1 * hue))
    noise = torch.tensor([[0.0, *at]], dtype=torch.float64).expand(2, 5)
    close(Augment(jitter)(images, noise=noise), expected, 1e-12)


def test_jitter_and_gray_touch_a_share_of_the_images() -> None:
    images = pictures(4, 3, 4, 4)
    noise = torch.rand(4, 5, generator=seeded())
    noise[:, 0] = torch.tensor([0.0, 0.79, 0.8, 0.99])
    changed = Augment(ColorJitter(brightness=0.4, hue=0.1, p=0.8))(images, noise=noise)
    assert ((changed != images).flatten(1).any(1)).tolist() == [True, True, False, False]
    grayed = Augment(RandomGray(p=0.8))(images, noise=noise[:, :1])
    assert torch.equal(grayed[2:], images[2:])
    assert torch.equal(grayed[:2], gray(images[:2]).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    "augment", [*[make() for make in PRESETS.values()], EVERYTHING], ids=[*PRESETS, "all"]
)
def test_a_gray_picture_is_a_colour_picture_with_equal_channels(augment: Augment) -> None:
    images, noise = pictures(6, 1, 8, 8), torch.rand(6, augment.draws, generator=seeded())
    found = augment(images, noise=noise)
    close(found.expand(-1, 3, -1, -1), augment(images.expand(-1, 3, -1, -1), noise=noise), 1e-5)


# --- Augment: what holds for all ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "augment", [*[make() for make in PRESETS.values()], EVERYTHING], ids=[*PRESETS, "all"]
)
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
    assert (
        repr(Augment(RandomFlip(p=0.25), RandomGray(p=0.5)))
        == "Augment(RandomFlip(p=0.25), RandomGray(p=0.5))"
    )


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
    assert omniglot_augment().steps == (
        RandomAffine(degrees=10, translate=1 / 28, scale=(0.9, 1.1), shear=0.01),
    )


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
    with pytest.raises(
        ValueError, match=r"found \(3, 4, 4\); give a single image a batch axis with image\[None\]"
    ):
        cifar_augment()(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError, match=r"float images in \[0, 1\]; found torch.uint8; divide bytes by 255"):
        cifar_augment()(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("step", [ColorJitter(), ColorJitter(hue=0.1), RandomGray()])
def test_colour_refuses_other_numbers_of_channels(step: ColorStep) -> None:
    with pytest.raises(
        ValueError, match=r"or 1 \(grey\); found 4 in images of shape \(2, 4, 3, 3\); leave colour"
    ):
        Augment(step)(torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("adjust", [adjust_contrast, adjust_saturation, adjust_hue])
def test_adjusting_refuses_other_numbers_of_channels(adjust: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="colour steps need 3 channels"):
        adjust(torch.zeros(2, 2, 3, 3), torch.ones(2))


def test_geometry_takes_any_number_of_channels() -> None:
    step: GeometricStep = RandomAffine(degrees=10)
    assert Augment(step)(pictures(2, 5, 4, 4), generator=seeded()).shape == (2, 5, 4, 4)


def test_refuses_noise_that_does_not_fit() -> None:
    images, augment = torch.zeros(2, 3, 4, 4), Augment(RandomFlip())
    with pytest.raises(
        ValueError, match=r"shape \(2, 1\), one row per image .* found \(2, 3\); make it with"
    ):
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

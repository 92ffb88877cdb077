"""Colour arithmetic and steps against colorsys and formulas by hand."""

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from augmenting import EVERYTHING, PRESETS, close, pictures, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treediff.augment import (
    Augment,
    ColorJitter,
    ColorStep,
    RandomGray,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gray,
    hsv_to_rgb,
    rgb_to_hsv,
)

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


@pytest.mark.parametrize("augment", [*[make() for make in PRESETS.values()], EVERYTHING], ids=[*PRESETS, "all"])
def test_a_gray_picture_is_a_colour_picture_with_equal_channels(augment: Augment) -> None:
    images, noise = pictures(6, 1, 8, 8), torch.rand(6, augment.draws, generator=seeded())
    found = augment(images, noise=noise)
    close(found.expand(-1, 3, -1, -1), augment(images.expand(-1, 3, -1, -1), noise=noise), 1e-5)


@pytest.mark.parametrize("step", [ColorJitter(), ColorJitter(hue=0.1), RandomGray()])
def test_colour_refuses_other_numbers_of_channels(step: ColorStep) -> None:
    with pytest.raises(ValueError, match=r"or 1 \(grey\); found 4 in images of shape \(2, 4, 3, 3\); leave colour"):
        Augment(step)(torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("adjust", [adjust_contrast, adjust_saturation, adjust_hue])
def test_adjusting_refuses_other_numbers_of_channels(adjust: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="colour steps need 3 channels"):
        adjust(torch.zeros(2, 2, 3, 3), torch.ones(2))

"""Upright shapes and histograms of gradients, against moments and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick
from torch import Tensor
from torch.nn import functional as F
from worlds import seeded

from treediff.layers import Deskew, GradientHistograms


def stroke(slant: float, right: float = 0.0, down: float = 0.0, size: int = 41) -> Tensor:
    """A smooth stroke through the middle, `(1, 1, size, size)`."""
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = place[:, None] - down, place[None] - right
    return torch.exp(-0.5 * ((x - slant * y) / 1.5) ** 2 - 0.5 * (y / 5) ** 2)[None, None]


def moments(image: Tensor) -> tuple[float, float, float]:
    """Means and covariance, written out."""
    mass, (height, width) = image.sum(), image.shape
    mean_x = sum(float(image[i, j]) * j for i in range(height) for j in range(width)) / mass
    mean_y = sum(float(image[i, j]) * i for i in range(height) for j in range(width)) / mass
    pixels = ((i, j) for i in range(height) for j in range(width))
    covariance = sum(float(image[i, j]) * (j - mean_x) * (i - mean_y) for i, j in pixels) / mass
    return float(mean_x), float(mean_y), float(covariance)


@pytest.mark.parametrize("slant", [-0.8, -0.3, 0.0, 0.5])
def test_a_slanted_stroke_becomes_the_upright_one_in_the_middle(slant: float) -> None:
    found = Deskew()(stroke(slant, 3.0, -2.0))
    mean_x, mean_y, covariance = moments(found[0, 0])
    assert mean_x == pytest.approx(20, abs=0.05) and mean_y == pytest.approx(20, abs=0.05)
    assert covariance == pytest.approx(0, abs=0.1)
    assert (found - stroke(0.0)).abs().max() < 0.1, "interpolation alone"


def test_channels_move_together_and_the_shear_is_limited() -> None:
    one, other = stroke(0.5, 2.0), stroke(-0.2)
    both = Deskew()(torch.cat([one, other], 1))
    turned = Deskew()(torch.cat([other, one], 1))
    torch.testing.assert_close(both, turned.flip(1))
    little = Deskew(most=0.1)(stroke(0.5))
    assert (little - stroke(0.4)).abs().max() < 0.15
    with pytest.raises(ValueError, match="most must be above 0, found 0"):
        Deskew(most=0)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 5, 9), (1, 1, 1, 1), (0, 1, 4, 4)])
def test_blank_images_and_single_pixels_stay(shape: tuple[int, ...]) -> None:
    assert torch.equal(Deskew()(torch.zeros(shape)), torch.zeros(shape))


def by_loops(image: Tensor, cell: int, orientations: int) -> Tensor:
    """Each pixel's votes, and each cell's pixels, one by one."""
    channels, height, width = image.shape
    votes = torch.zeros(orientations, height, width, dtype=image.dtype)

    def at(c: int, i: int, j: int) -> float:
        return float(image[c, i, j]) if 0 <= i < height and 0 <= j < width else 0.0

    for c in range(channels):
        for i in range(height):
            for j in range(width):
                across, down = at(c, i, j + 1) - at(c, i, j - 1), at(c, i + 1, j) - at(c, i - 1, j)
                turn = (math.atan2(down, across) % math.pi) / math.pi * orientations
                low = math.floor(turn)
                for place, share in ((low, 1 - turn + low), (low + 1, turn - low)):
                    votes[place % orientations, i, j] += share * math.hypot(across, down)
    margin, rows = cell // 4, []
    for orientation in range(orientations):
        for i in range(height // cell):
            for j in range(width // cell):
                top, left = max(0, i * cell - margin), max(0, j * cell - margin)
                part = votes[orientation, top : (i + 1) * cell + margin, left : (j + 1) * cell + margin]
                rows.append(part.sum())
    whole = torch.stack(rows)
    return (whole / whole.sum().clamp_min(1e-30)).sqrt()


@quick
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99)
)
def test_histograms_are_those_of_the_loop(
    channels: int, height: int, width: int, orientations: int, cell: int, seed: int
) -> None:
    cell = min(cell, height, width)
    images = torch.rand(2, channels, height, width, generator=seeded(seed), dtype=torch.float64)
    found = GradientHistograms(cell, orientations)(images)
    torch.testing.assert_close(found, torch.stack([by_loops(image, cell, orientations) for image in images]))


def test_brightness_does_not_count_and_directions_do() -> None:
    layer, images = GradientHistograms(), torch.rand(3, 1, 12, 8, generator=seeded(0))
    torch.testing.assert_close(layer(0.3 * images), layer(images))
    torch.testing.assert_close(layer(images).square().sum(1), torch.ones(3))
    assert not torch.allclose(layer(images.flip(2)), layer(images), atol=0.05)
    upright = F.pad(torch.ones(1, 1, 8, 4), (2, 2, 2, 2))
    assert layer(upright).view(8, -1).square().sum(1).argmax() == 0, "edges of upright bars lie across"
    assert torch.equal(layer(torch.zeros(1, 1, 8, 8)), torch.zeros(1, 32)), "nothing to see"


def test_images_smaller_than_a_cell_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have at least 4 pixels a side, found \(3, 9\)"):
        GradientHistograms()(torch.rand(1, 1, 3, 9))
    with pytest.raises(ValueError, match="orientations must be at least 1, found 0"):
        GradientHistograms(orientations=0)
    assert repr(GradientHistograms()) == "GradientHistograms(cell=4, orientations=8)"
    assert repr(Deskew()) == "Deskew(most=1.0)"

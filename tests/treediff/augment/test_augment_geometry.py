"""Steps that move pixels, against slicing, formulas by hand, and their own one-by-one execution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from augmenting import EVERYTHING, close, pictures, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from treediff.augment import Augment, GeometricStep, RandomAffine, RandomFlip, RandomResizedCrop, warp

sides = st.integers(1, 9)
# --- moves whose answer is slicing --------------------------------------------------------------------------


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
def test_translation_by_whole_pixels_is_slicing_into_black(height: int, width: int, data: st.DataObject) -> None:
    right, down = data.draw(st.integers(-width, width)), data.draw(st.integers(-height, height))
    images = pictures(1, 2, height, width, dtype=torch.float64)
    noise = torch.tensor([[0.5, (right / width + 1) / 2, (down / height + 1) / 2, 0.5, 0.5]], dtype=torch.float64)
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


# --- any matrix ---------------------------------------------------------------------------------------------


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
def test_affine_matrix_is_the_inverse_of_the_documented_map(draw: list[float], height: int, width: int) -> None:
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


def test_geometry_takes_any_number_of_channels() -> None:
    step: GeometricStep = RandomAffine(degrees=10)
    assert Augment(step)(pictures(2, 5, 4, 4), generator=seeded()).shape == (2, 5, 4, 4)


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

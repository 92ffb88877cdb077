"""Images in rows and columns: every image is where it belongs, every label is whole and beside its row or column."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from summaries import check_apart, texts_of_pictures
from torch import Tensor
from worlds import seeded

from treediff.pictures import draw_grid, draw_strip

Array = npt.NDArray[np.uint8]
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 100, 70), (1, 3, 40)]


def noise(*shape: int) -> Tensor:
    """Images of 256 tones, which 8 bits hold whatever the rounding."""
    return torch.randint(256, shape, generator=seeded(2)) / 255


def read(path: Path) -> Array:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def tile_of(image: Tensor) -> Array:
    """An image as it should be shown: in 8 bits, in colour, enlarged to at most 64 pixels."""
    factor = max(1, 64 // max(image.shape[1:]))
    grey = (image.double() * 255).round().byte().permute(1, 2, 0).numpy()
    return np.kron(np.broadcast_to(grey, (*grey.shape[:2], 3)), np.ones((factor, factor, 1), np.uint8))


def places_of(picture: Array, tile: Array) -> list[tuple[int, int]]:
    """Everywhere that a picture shows a tile, found without knowing where to look."""
    tall, wide = tile.shape[:2]
    room = picture[: picture.shape[0] - tall + 1, : picture.shape[1] - wide + 1]
    first = (room == tile[0, 0]).all(2)
    last = (picture[tall - 1 :, wide - 1 :] == tile[-1, -1]).all(2)
    corners = zip(*np.nonzero(first & last), strict=True)
    return [(int(y), int(x)) for y, x in corners if np.array_equal(picture[y : y + tall, x : x + wide], tile)]


def corners_of(picture: Array, images: Tensor) -> npt.NDArray[np.int64]:
    """Row and column of the left upper corner of each image of a grid, `(R, N, 2)`."""
    found = [[places_of(picture, tile_of(image)) for image in row] for row in images]
    assert all(len(places) == 1 for row in found for places in row)
    return np.array(found)[:, :, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (2, 12)])
def test_every_image_is_where_it_belongs(tmp_path: Path, shape: tuple[int, int, int], rows: int, columns: int) -> None:
    images = noise(rows, columns, *shape)
    draw_grid(images, tmp_path / "grid.png")
    picture = read(tmp_path / "grid.png").copy()
    corners = corners_of(picture, images)
    tall, wide = tile_of(images[0, 0]).shape[:2]
    assert (corners[:, :, 0] == corners[:, :1, 0]).all() and (corners[:, :, 1] == corners[:1, :, 1]).all()
    assert set(np.diff(corners[:, 0, 0])) in (set(), {tall + 4}) and set(np.diff(corners[0, :, 1])) in (
        set(),
        {wide + 4},
    )
    for top, left in corners.reshape(-1, 2):
        picture[top : top + tall, left : left + wide] = 255
    assert (picture == 255).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("beside", "above", "title"),
    [
        (["a", "bb", "a longer name"], [0.95, 0.123456, 1 / 3, 0.0], "The title"),
        (["a", "b", "c"], None, "A title that is long " * 12),
        (None, ["t = 0.999", "Ankle boot", "T-shirt/top", "Sneaker"], None),
        (["$x_1$ " * 30, "two\nlines", "ok"], ["much too long " * 9] * 4, "W" * 90),
    ],
)
def test_labels_are_whole_and_beside_what_they_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    beside: list[str] | None,
    above: list[str | float] | None,
    title: str | None,
) -> None:
    texts = texts_of_pictures(monkeypatch)
    images = noise(3, 4, *shape)
    draw_grid(images, tmp_path / "grid.png", row_labels=beside, column_labels=above, title=title)
    picture = read(tmp_path / "grid.png")
    corners, (tall, wide) = corners_of(picture, images), tile_of(images[0, 0]).shape[:2]
    check_apart(texts, *picture.shape[:2])
    columns, rows = texts[len(texts) - len(beside or []) - len(above or []) :], texts[len(texts) - len(beside or []) :]
    titles = texts[: len(texts) - len(beside or []) - len(above or [])]
    assert " ".join(text.text for text in titles) == " ".join((title or "").split())
    for i, name in enumerate(beside or []):
        top, left = corners[i, 0]
        assert rows[i].right < left and abs((rows[i].top + rows[i].bottom) / 2 - top - tall / 2) < 5
        check_text(rows[i].text, name)
    for j, label in enumerate(above or []):
        top, left = corners[0, j]
        assert columns[j].bottom < top and abs((columns[j].left + columns[j].right) / 2 - left - wide / 2) < 2
        check_text(columns[j].text, label)
    for text in titles:
        assert text.bottom < corners[:, :, 0].min()
    for text in texts:
        box = picture[int(text.top) : int(text.bottom) + 1, int(text.left) : int(text.right) + 1]
        assert box.min() < 128  # ink


def check_text(found: str, given: str | float) -> None:
    """The text itself, or as much of a long one as fits; numbers with three decimals at most."""
    if isinstance(given, float):
        assert abs(float(found) - given) <= 0.0005 and len(found) <= 5
    elif found.endswith("…"):
        assert len(found) > 10 and " ".join(given.split()).startswith(found[:-1])
    else:
        assert found == " ".join(given.split())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.123456, 1.0, 7, "x"], ["0.123", "1", "7", "x"]),
        (torch.tensor([1.0, 0.7, 0.0333333, 0.0]), ["1", "0.7", "0.033", "0"]),
        (torch.tensor([999, 500, 20, 0]), ["999", "500", "20", "0"]),
        (np.array([1000.0, 0.5, 2.25, -12.3456]), ["1000", "0.5", "2.25", "-12.346"]),
    ],
)
def test_numbers_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Sequence[str | float], expected: list[str]
) -> None:
    texts = texts_of_pictures(monkeypatch)
    draw_strip(noise(4, 1, 1, 8, 8), tmp_path / "strip.png", labels=labels)
    assert [text.text for text in texts] == expected


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_step(tmp_path: Path) -> None:
    frames = noise(5, 2, 3, 8, 8)
    draw_strip(frames, tmp_path / "strip.png", labels=range(5), row_labels=["a", "b"], title="t")
    corners = corners_of(read(tmp_path / "strip.png"), frames.transpose(0, 1))
    assert (np.diff(corners[:, :, 0], axis=0) > 0).all() and (np.diff(corners[:, :, 1], axis=1) > 0).all()
    grid = frames.transpose(0, 1).contiguous()
    draw_grid(grid, tmp_path / "grid.png", column_labels=range(5), row_labels=["a", "b"], title="t")
    assert (tmp_path / "strip.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_the_same_images_give_the_same_bytes_whatever_the_style(tmp_path: Path) -> None:
    frames, named = noise(3, 2, 1, 8, 8), {"labels": [0.9, 0.5, 0.0], "title": "steps"}
    draw_strip(frames, tmp_path / "one.png", **named)  # type: ignore[arg-type]
    with matplotlib.rc_context({"font.family": "monospace", "text.antialiased": False, "savefig.dpi": 10}):
        (tmp_path / "two.PNG").write_text("old")
        draw_strip(frames, str(tmp_path / "two.PNG"), **named)  # type: ignore[arg-type]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.PNG").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_will_do_and_gradients_are_left_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    images = (noise(2, 2, 1, 8, 8) * 8).round() / 8  # exact in all of them
    draw_grid(images, tmp_path / "one.png")
    draw_grid(images.to(dtype).requires_grad_(), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


GOOD = torch.full((4, 2, 1, 8, 8), 0.5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "a.jpg"}, ValueError, "draw_strip writes PNG files: expected a name that ends in .png, found"),
        (
            {"frames": [GOOD[0]] * 4},
            TypeError,
            "frames: expected a float tensor in [0, 1], found list; an array:",
        ),
        (
            {"frames": GOOD.byte()},
            TypeError,
            "frames: expected a float tensor in [0, 1], found torch.uint8; conv",
        ),
        ({"frames": GOOD - 1}, ValueError, "frames: expected values in [0, 1], found -0.5 to -0.5; images from -1 to"),
        ({"frames": GOOD + 1}, ValueError, "found 1.5 to 1.5; images from -1 to 1, such as those a sampler tells its"),
        ({"frames": GOOD / 0}, ValueError, "frames: expected values in [0, 1], found inf to inf; images from -1 to 1"),
        ({"frames": GOOD * float("nan")}, ValueError, "frames: expected values in [0, 1], found nan to nan; images"),
        ({"frames": GOOD[0]}, ValueError, "frames: expected shape (steps, images, C, H, W) with C 1 or 3, found (2, 1"),
        ({"frames": GOOD.expand(4, 2, 2, 8, 8)}, ValueError, "with C 1 or 3, found (4, 2, 2, 8, 8)"),
        ({"frames": GOOD[:0]}, ValueError, "frames: expected at least one image, found none: shape (0, 2, 1, 8, 8)"),
        ({"frames": GOOD[:, :0]}, ValueError, "frames: expected at least one image, found none: shape (4, 0, 1, 8, 8)"),
        ({"labels": ["a", "b"]}, ValueError, "labels: expected one for each step, 4, found 2"),
        ({"labels": []}, ValueError, "labels: expected one for each step, 4, found 0"),
        ({"row_labels": ["a", "b", "c"]}, ValueError, "row_labels: expected one for each image, 2, found 3"),
        (
            {"frames": torch.zeros(1000, 1, 1, 1, 1)},
            ValueError,
            "the picture of 1 x 1000 images would have 68040 x 108 pixels, more than 65000 to a side; draw fewer rows",
        ),
    ],
)
def test_errors_of_strips_teach_and_write_nothing(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"frames": GOOD, "path": "strip.png", **change}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=re.escape(message)):
        draw_strip(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "grid"}, ValueError, "draw_grid writes PNG files: expected a name that ends in .png, found"),
        (
            {"images": None},
            TypeError,
            "images: expected a float tensor in [0, 1], found NoneType; an array:",
        ),
        ({"images": GOOD[0]}, ValueError, "images: expected shape (rows, columns, C, H, W) with C 1 or 3, found (2, 1"),
        ({"column_labels": ["a"]}, ValueError, "column_labels: expected one for each column, 2, found 1"),
        ({"row_labels": torch.zeros(5)}, ValueError, "row_labels: expected one for each row, 4, found 5"),
    ],
)
def test_errors_of_grids_teach_and_write_nothing(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"images": GOOD, "path": "grid.png", **change}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=re.escape(message)):
        draw_grid(**arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [draw_grid, draw_strip])
def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:  # noqa: ANN401
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    message = f"{draw.__name__} needs matplotlib, which is not installed; pip install 'treediff[pictures]'"
    with pytest.raises(ImportError, match=re.escape(message) + "$"):
        draw(GOOD, tmp_path / "picture.png")

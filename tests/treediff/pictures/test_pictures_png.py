"""Drawings as PNG files: every image is there, pixel by pixel, and no text meets another or the edge."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from strategies import quick
from summaries import SPLIT, image_model, made_up, summary_of

from treediff import TreeTopology
from treediff.pictures import draw_grid, draw_strip, draw_tree
from treediff.pictures import figure as figures
from treediff.pictures.tiles import fit, pixels, png_bytes


def opened(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(np.int64)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float, float, float]]:
    """Every text that is written from now on, with its extent, and at last the size of the drawing."""
    found: list[tuple[str, float, float, float, float]] = []
    save = figures.save

    def record(drawn: Figure, path: str | os.PathLike[str]) -> None:
        save(drawn, path)
        labels = [label for axes in drawn.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        shown = labels if any(axes.axison for axes in drawn.axes) else []
        for text in [*drawn.texts, *(text for axes in drawn.axes for text in axes.texts), *shown]:
            if text.get_text():
                box = text.get_window_extent()
                found.append((text.get_text(), box.x0, box.y0, box.x1, box.y1))
        found.append(("", 0.0, 0.0, *drawn.bbox.size))

    monkeypatch.setattr(figures, "save", record)
    return found


def check_apart(texts: list[tuple[str, float, float, float, float]]) -> None:
    """All texts lie in the drawing, and no two meet."""
    *written, (_, _, _, width, height) = texts
    for i, (text, left, low, right, high) in enumerate(written):
        assert left >= 0 and low >= 0 and right <= width and high <= height, text
        for other, l2, b2, r2, t2 in written[:i]:
            assert right <= l2 or r2 <= left or high <= b2 or t2 <= low, (text, other)


# --- trees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [SPLIT, TreeTopology.balanced(0), TreeTopology.balanced(3)], ids=len)
@pytest.mark.parametrize("refined", [True, False])
def test_every_image_of_every_node_is_drawn(tmp_path: Path, tree: TreeTopology, refined: bool) -> None:
    """Images of one tone each: the tone takes as many pixels as there are tiles of it."""
    summary = made_up(tree, samples=6, members=3, class_names=None)
    if refined:
        for node in summary:
            object.__setattr__(node, "refined", np.full((6, 1, 8, 8), (node.id % 11) / 11 + 0.02, np.float32))
    draw_tree(summary, tmp_path / "tree.png")
    drawn = opened(tmp_path / "tree.png")
    tones: dict[int, int] = {}
    for node in summary:
        for images in (node.samples, node.members, *([] if node.refined is None else [node.refined])):
            for image in images:
                tone = round(float(image.flat[0]) * 255)
                tones[tone] = tones.get(tone, 0) + 1
    grey = (drawn == drawn[..., :1]).all(2)
    for tone, count in tones.items():
        if 0 < tone < 250:
            area = int((grey & (drawn[..., 0] == tone)).sum()) / (0.36 * 150) ** 2
            assert 0.9 * count <= area <= 1.2 * count, tone


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 96, 64), (1, 1, 1), (3, 200, 300)])
@pytest.mark.parametrize("refined", [True, False])
def test_labels_are_whole_and_apart(
    tmp_path: Path, texts: list[Any], shape: tuple[int, int, int], refined: bool
) -> None:
    names = (
        "cat",
        "dog",
        "a class with a name that is longer than others",
        "$x_1$",
        *(f"number {i}" for i in range(9)),
    )
    draw_tree(made_up(shape=shape, class_names=names, refined=refined), tmp_path / "tree.png")
    check_apart(texts)
    written = {text for text, *_ in texts}
    assert {"4 leaves, 16 images", "node 0", "node 6", "100 %", "cat", "$x_1$", "other classes", "real"} <= written
    assert {"TreeVAE", "refined"} <= written if refined else "generated" in written


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("members", [0, 4])
def test_with_and_without_labels_and_real_images(tmp_path: Path, texts: list[Any], members: int, labels: bool) -> None:
    draw_tree(summary_of(image_model(), members=members, labels=labels), tmp_path / "tree.png")
    check_apart(texts)
    assert ("real" in {text for text, *_ in texts}) == bool(members)


def test_the_drawing_grows_with_the_tree(tmp_path: Path) -> None:
    sizes = []
    for leaves in (2, 13, 40):
        tree = TreeTopology.balanced(1)
        while len(tree.leaves) < leaves:
            tree = tree.split(min(tree.leaves, key=tree.depth))
        draw_tree(made_up(tree), tmp_path / "tree.png", dpi=60)
        sizes.append(opened(tmp_path / "tree.png").shape)
    assert sizes[0][1] < sizes[1][1] < sizes[2][1] < 40 * 2 * 60 + 200


def test_a_class_takes_its_share_of_the_bar(tmp_path: Path) -> None:
    summary = made_up(TreeTopology.balanced(0), class_names=("cat", "dog"))
    (node,) = summary
    object.__setattr__(node, "count", 4)
    object.__setattr__(node, "class_counts", np.array([1, 3]))
    draw_tree(summary, tmp_path / "tree.png")
    drawn = opened(tmp_path / "tree.png")
    cat, dog = (((drawn == colour).all(2)).sum(1) for colour in ((0xCC, 0x66, 0x77), (0x33, 0x22, 0x88)))
    row = int(dog.argmax())
    assert dog[row] == pytest.approx(3 * cat[row], rel=0.05)


def test_the_same_summary_gives_the_same_bytes_whatever_the_style(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    draw_tree(made_up(), tmp_path / "one.png")
    with plt.style.context("dark_background"):
        draw_tree(made_up(), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "dpi", "message"),
    [
        ("tree.jpg", 150, "draw_tree writes PNG files: expected a name that ends in .png, found"),
        ("tree.png", 20, "dpi must be at least 40 for labels that can be read, found 20"),
        (
            "tree.png",
            60_000,
            "more than 65000 to a side; choose dpi below 60000, or use write_html, which needs",
        ),
    ],
)
def test_errors_teach_and_write_nothing(tmp_path: Path, name: str, dpi: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_tree(made_up(), tmp_path / name, dpi=dpi)
    assert list(tmp_path.iterdir()) == []


# --- grids and strips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 20), (3, 100, 70)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (2, 12)])
def test_every_image_is_where_it_belongs(
    tmp_path: Path, texts: list[Any], shape: tuple[int, int, int], rows: int, columns: int
) -> None:
    images = torch.rand(rows, columns, *shape, generator=torch.Generator().manual_seed(0))
    labels = {"row_labels": [f"row {i}" for i in range(rows)], "column_labels": list(range(columns))}
    draw_grid(images, tmp_path / "grid.png", title="Of $all$ kinds", **labels)  # type: ignore[arg-type]
    drawn, tiles = opened(tmp_path / "grid.png"), fit(pixels(images.flatten(0, 1).numpy()), max(64, *shape[1:]))
    tall, wide = (size + 4 for size in tiles.shape[1:3])
    first = np.broadcast_to(tiles[0], (*tiles.shape[1:3], 3))[:6, :6]
    places = [
        (y, x)
        for y, x in zip(*np.where((drawn == first[0, 0]).all(2)), strict=True)
        if (drawn[y : y + 6, x : x + 6] == first).all()
    ]
    found = 0
    for y, x in places[:1]:
        for k, tile in enumerate(tiles):
            top, left = y + (k // columns) * tall, x + (k % columns) * wide
            there = drawn[top : top + tile.shape[0], left : left + tile.shape[1]]
            found += bool((there == np.broadcast_to(tile, there.shape)).mean() > 0.95)
    assert found == rows * columns
    check_apart(texts)
    written = [text for text, *_ in texts]
    assert {"row 0", "0", "Of $all$ kinds"} <= set(written)


def test_a_strip_has_a_row_for_each_image_and_a_column_for_each_step(tmp_path: Path, texts: list[Any]) -> None:
    frames = torch.rand(6, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draw_strip(frames, tmp_path / "strip.png", labels=torch.linspace(1, 0, 6))
    draw_grid(frames.swapaxes(0, 1), tmp_path / "grid.png", column_labels=torch.linspace(1, 0, 6))
    assert (tmp_path / "strip.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert [text for text, *_ in texts][:6] == ["1", "0.8", "0.6", "0.4", "0.2", "0"]
    check_apart(texts[:7])


def test_long_labels_are_slanted_and_shortened(tmp_path: Path, texts: list[Any]) -> None:
    labels = [f"leaf {i}, of a class with a long name" for i in range(4)]
    draw_grid(torch.rand(2, 4, 1, 8, 8), tmp_path / "grid.png", row_labels=labels[:2], column_labels=labels)
    *written, (_, _, _, width, height) = texts
    assert all(text.endswith("…") for text, *_ in written)
    assert all(left >= 0 and low >= 0 and right <= width and high <= height for _, left, low, right, high in written)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_is_taken_and_gradients_are_left_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.rand(1, 2, 1, 4, 4).to(dtype).requires_grad_()
    draw_grid(images, tmp_path / "grid.png")
    assert images.grad is None and opened(tmp_path / "grid.png").any()


@pytest.mark.parametrize("draw", [draw_grid, draw_strip])
@pytest.mark.parametrize(
    ("images", "settings", "error", "message"),
    [
        (torch.rand(2, 1, 4, 4), {}, ValueError, "with C 1 or 3, found (2, 1, 4, 4)"),
        (torch.rand(1, 1, 2, 4, 4), {}, ValueError, "with C 1 or 3, found (1, 1, 2, 4, 4)"),
        (torch.rand(0, 1, 1, 4, 4), {}, ValueError, "expected at least one image, found none: shape (0, 1, 1, 4, 4)"),
        (torch.rand(1, 1, 1, 4, 4) * 2 + 1, {}, ValueError, "expected values in [0, 1], found"),
        (torch.full((1, 1, 1, 4, 4), torch.nan), {}, ValueError, "expected values in [0, 1], found nan"),
        (torch.zeros(1, 1, 1, 4, 4, dtype=torch.uint8), {}, TypeError, "convert it with x.float() / 255"),
        ([[1.0]], {}, TypeError, "expected a float tensor in [0, 1], found list"),
        (torch.rand(1, 1, 1, 4, 4), {"row_labels": ["a", "b"]}, ValueError, "row_labels: expected one for each"),
    ],
)
def test_errors_of_grids_teach_and_write_nothing(
    tmp_path: Path,
    draw: Any,  # noqa: ANN401
    images: Any,  # noqa: ANN401
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        draw(images, tmp_path / "a.png", **settings)
    with pytest.raises(ValueError, match=f"{draw.__name__} writes PNG files: expected a name that ends in"):
        draw(torch.rand(1, 1, 1, 4, 4), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="more than 65000 to a side; draw fewer rows or columns"):
        draw(torch.rand(1, 1, 1, 1, 1).expand(1000, 1000, 1, 1, 1), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [draw_grid, draw_strip, draw_tree])
def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:  # noqa: ANN401
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    what = made_up() if draw is draw_tree else torch.rand(1, 1, 1, 4, 4)
    with pytest.raises(
        ImportError, match=r"needs matplotlib, which is not installed; pip install 'treediff\[pictures\]'"
    ):
        draw(what, tmp_path / "a.png")


# --- tiles --------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 99))
def test_png_bytes_are_read_back_by_another_library(height: int, width: int, channels: int, seed: int) -> None:
    import io

    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    with Image.open(io.BytesIO(png_bytes(image))) as picture:
        assert (np.asarray(picture).reshape(image.shape) == image).all()


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 99))
def test_fitting_repeats_pixels_or_averages_blocks(height: int, width: int, target: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (1, height, width, 1), np.uint8)
    found, longest = fit(image, target), max(height, width)
    if longest <= target:
        factor = target // longest
        assert (found[0, ::factor, ::factor] == image[0]).all() and found.shape[1] == height * factor
        return
    block = -(-longest // target)
    assert max(found.shape[1:3]) <= target
    inside = image[0, : height - height % block, : width - width % block]
    for y in range(inside.shape[0] // block):
        for x in range(inside.shape[1] // block):
            mean = inside[y * block : (y + 1) * block, x * block : (x + 1) * block].mean()
            assert abs(int(found[0, y, x, 0]) - mean) <= 0.5 + 1e-9


def test_values_outside_of_the_range_are_cut_off() -> None:
    assert pixels(np.array([-1.0, 0.5, 2.0], np.float32).reshape(1, 1, 1, 3)).ravel().tolist() == [0, 128, 255]

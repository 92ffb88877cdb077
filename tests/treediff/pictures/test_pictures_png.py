"""The drawing of a tree as one PNG: its size, what is in it, and that nothing else is touched."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import quick, topologies
from summaries import check_apart, image_model, made_up, summary_of, texts_of_pictures

from treediff import TreeTopology
from treediff.pictures import TreeSummary, draw_tree
from treediff.pictures.geometry import Panel, Placement, place
from treediff.pictures.tiles import fit, pixels, png_bytes, tile_size

Array = npt.NDArray[np.uint8]


def tree_of(leaves: int) -> TreeTopology:
    tree = TreeTopology.balanced(0)
    while len(tree.leaves) < leaves:
        tree = tree.split(tree.leaves[0])
    return tree


def drawn(summary: TreeSummary, path: Path, **settings: int) -> Array:
    draw_tree(summary, path, **settings)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_a_drawing_shows_the_images_of_every_node(tmp_path: Path) -> None:
    summary = summary_of(image_model(), n=40)
    picture = drawn(summary, tmp_path / "tree.png")
    plan = place(summary, 150)
    assert picture.shape[1] == plan.width and plan.height < picture.shape[0] < plan.height + 300
    for node in summary:
        block = plan.blocks[node.id]
        for panel, images in ((block.generated, node.samples), (block.real, node.members)):
            if panel is None or not len(images):
                continue
            left, top = panel.left + plan.frame, panel.top + plan.frame
            tile = picture[top : top + plan.tile[0], left : left + plan.tile[1]]
            np.testing.assert_array_equal(tile, np.broadcast_to(fit(pixels(images[:1]), max(plan.tile))[0], tile.shape))


def tiles_in(picture: Array, panel: Panel, plan: Placement) -> list[Array]:
    """What a panel shows, tile by tile."""
    (tall, wide), rows = plan.tile, panel.height // plan.tile[0]
    corners = [
        (panel.top + plan.frame + row * (tall + plan.gap), panel.left + plan.frame + column * (wide + plan.gap))
        for row in range(rows)
        for column in range(panel.columns)
    ]
    return [picture[top : top + tall, left : left + wide] for top, left in corners]


@pytest.mark.parametrize(
    ("leaves", "shape"),
    [(3, (1, 8, 8)), (1, (1, 28, 28)), (13, (1, 28, 28)), (3, (3, 32, 32)), (5, (3, 96, 64))],
)
def test_refined_samples_stand_below_those_they_were_made_from(
    tmp_path: Path, leaves: int, shape: tuple[int, int, int]
) -> None:
    summary = made_up(tree_of(leaves), shape=shape, refined=True, samples=8)
    draw = np.random.default_rng(0)
    nodes = [dataclasses.replace(n, samples=draw.random(n.samples.shape, np.float32)) for n in summary]
    summary = dataclasses.replace(summary, nodes=tuple(nodes))
    picture, plan = drawn(summary, tmp_path / "tree.png"), place(summary, 150)
    for node in summary:
        block = plan.blocks[node.id]
        assert block.refined is not None and node.refined is not None
        for panel, images in ((block.generated, node.samples), (block.refined, node.refined)):
            found = tiles_in(picture, panel, plan)
            assert len(found) >= min(leaves, 2)
            for tile, image in zip(found, images, strict=False):
                expected = fit(pixels(image[None]), max(plan.tile))[0]
                np.testing.assert_array_equal(tile, np.broadcast_to(expected, tile.shape))
        above, below = block.generated, block.refined
        assert (above.left, above.width, above.height) == (below.left, below.width, below.height)
        assert above.top + above.height < below.top
        if block.real is not None:
            assert below.top + below.height < block.real.top


@pytest.mark.parametrize(
    ("leaves", "shape", "refined"),
    [
        *[(leaves, (1, 8, 8), True) for leaves in (1, 3, 13)],
        *[(leaves, (1, 28, 28), True) for leaves in (7, 12)],
        *[(leaves, (3, 32, 32), True) for leaves in (3, 12)],
        *[(leaves, (1, 28, 28), False) for leaves in (1, 12)],
    ],
)
def test_labels_are_whole_and_name_every_row_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves: int, shape: tuple[int, int, int], refined: bool
) -> None:
    texts = texts_of_pictures(monkeypatch)
    summary = made_up(tree_of(leaves), shape=shape, refined=refined, samples=8, class_names=("cat", "a longer name"))
    picture, plan = drawn(summary, tmp_path / "tree.png"), place(summary, 150)
    check_apart(texts, *picture.shape[:2])
    panels = [p for b in plan.blocks.values() for p in (b.generated, b.refined, b.real, b.bar) if p is not None]
    named = dict.fromkeys(("TreeVAE", "refined", "generated", "real"), 0)
    for text in texts:
        if text.text == "no images":
            continue
        for panel in panels:
            assert not text.meets(panel.left, panel.top, panel.left + panel.width, panel.top + panel.height), text
        if text.text in named:
            named[text.text] += 1
            kind = "generated" if text.text == "TreeVAE" else text.text
            beside = [getattr(block, kind) for block in plan.blocks.values()]
            middle = (text.top + text.bottom) / 2
            assert any(p is not None and abs(p.top + p.height / 2 - middle) < 4 and p.left > text.right for p in beside)
    if leaves <= 12:  # one label for the row of leaves and one for each other node
        counts = named["TreeVAE"], named["refined"], named["generated"]
        assert counts == ((leaves, leaves, 0) if refined else (0, 0, leaves))
    told = " ".join(text.text for text in texts)
    if refined:  # lines that are broken go on below their beginning, not below the swatch
        notes = texts[[text.text.startswith("TreeVAE:") for text in texts].index(True) :]
        assert len({round(text.left - notes[0].left) // 3 for text in notes}) == 1
    assert ("Refined: the images above once more" in told) == refined
    assert ("TreeVAE: drawn from the prior" in told) == refined and ("Generated: drawn" in told) != refined


def test_the_frames_have_the_colours_that_the_text_below_names(tmp_path: Path) -> None:
    summary = made_up(refined=True)
    picture, plan = drawn(summary, tmp_path / "tree.png"), place(summary, 150)
    corners = set()
    for node in summary:
        block = plan.blocks[node.id]
        assert block.refined is not None and block.real is not None
        corners.add(tuple(tuple(picture[p.top, p.left]) for p in (block.generated, block.refined, block.real)))
    (frames,) = corners
    assert len(set(frames)) == 3
    below = picture[plan.height :, plan.margin + 3]  # where the swatches are
    order = [colour for colour in map(tuple, below) if colour in frames]
    assert list(dict.fromkeys(order)) == list(frames)


def test_a_node_that_was_not_refined_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of_pictures(monkeypatch)
    summary = made_up(refined=True)
    nodes = [dataclasses.replace(n, refined=None) if n.id in (1, 4) else n for n in summary]
    drawn(dataclasses.replace(summary, nodes=tuple(nodes)), tmp_path / "tree.png")
    assert [text.text for text in texts].count("no images") == 2


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("members", [0, 4])
def test_sizes_are_sane_with_and_without_labels_and_real_images(tmp_path: Path, members: int, labels: bool) -> None:
    names = ("cat", "dog") if labels else None
    picture = drawn(made_up(members=members, class_names=names), tmp_path / "tree.png")
    assert 500 < picture.shape[0] < 2000 and 700 <= picture.shape[1] < 2000
    assert picture.mean() > 128 and picture.std() > 5  # dark on light, and not blank


@pytest.mark.parametrize("leaves", [1, 2, 13, 40])
def test_the_width_grows_with_the_leaves(tmp_path: Path, leaves: int) -> None:
    width = drawn(made_up(tree_of(leaves)), tmp_path / "tree.png", dpi=60).shape[1] * 150 / 60
    assert max(650, 150 * leaves) < width < 280 * leaves + 700


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 96, 64), (1, 1, 1), (3, 200, 300)])
def test_images_of_any_shape(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    picture = drawn(made_up(shape=shape), tmp_path / "tree.png", dpi=70)
    assert picture.mean() > 128 and picture.std() > 5  # dark on light, and not blank


@quick
@given(topologies(max_steps=10), st.sampled_from([40, 97, 150, 300]), st.booleans())
def test_blocks_do_not_meet_and_lie_inside(tree: TreeTopology, dpi: int, refined: bool) -> None:
    plan = place(made_up(tree, samples=40, refined=refined), dpi)  # more than there is room for
    blocks = list(plan.blocks.values())
    assert set(plan.blocks) == set(tree)
    for i, first in enumerate(blocks):
        assert 0 <= first.left < first.right <= plan.width and 0 <= first.top < first.bottom <= plan.height
        for second in blocks[:i]:
            apart = first.right <= second.left or second.right <= first.left
            assert apart or first.bottom <= second.top or second.bottom <= first.top
    for child, line in plan.edges.items():
        parent = tree.parent(child)
        assert parent is not None
        assert line[0] == (plan.blocks[parent].x, plan.blocks[parent].bottom)
        assert line[-1] == (plan.blocks[child].x, plan.blocks[child].top)
    assert set(plan.edges) == set(tree) - {tree.root}


def test_the_same_summary_gives_the_same_bytes_whatever_the_style(tmp_path: Path) -> None:
    draw_tree(made_up(), tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "text.color": "red", "savefig.dpi": 10}):
        before = dict(matplotlib.rcParams)
        draw_tree(made_up(), tmp_path / "two.PNG")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.PNG").read_bytes()


def test_text_is_taken_literally(tmp_path: Path) -> None:
    drawn(made_up(class_names=("$x_1$ & <b>", "a very long name " * 20, "\n")), tmp_path / "tree.png", dpi=60)


@pytest.mark.parametrize(
    ("name", "dpi", "message"),
    [
        ("tree.jpg", 150, "draw_tree writes PNG files: expected a name that ends in .png, found"),
        ("tree", 150, "draw_tree writes PNG files: expected a name that ends in .png, found"),
        ("tree.png", 39, "dpi must be at least 40 for labels that can be read, found 39"),
        ("tree.png", 100_000, "more than 65000 to a side; choose dpi below 100000, or use write_html"),
    ],
)
def test_errors_teach_and_write_nothing(tmp_path: Path, name: str, dpi: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_tree(made_up(), tmp_path / name, dpi=dpi)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'treediff[pictures]', or use write_html")):
        draw_tree(made_up(), tmp_path / "tree.png")


# --- tiles --------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.integers(0, 2**32))
def test_png_bytes_are_read_back_by_another_library(height: int, width: int, channels: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    with Image.open(io.BytesIO(png_bytes(image))) as found:
        found.load()
        np.testing.assert_array_equal(np.asarray(found).reshape(image.shape), image)


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_fitting_repeats_pixels_or_averages_blocks(height: int, width: int, target: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (1, height, width, 1), np.uint8)
    found = fit(image, target)
    assert found.shape == (1, *tile_size(height, width, target), 1) and max(found.shape[1:3]) <= target
    longest = max(height, width)
    if longest <= target:
        factor = target // longest
        np.testing.assert_array_equal(found[:, ::factor, ::factor], image)
        return
    block = -(-longest // target)
    for i in range(found.shape[1]):
        for j in range(found.shape[2]):
            # Blocks that stick out of the image repeat its edge.
            rows = np.minimum(np.arange(i * block, (i + 1) * block), height - 1)
            columns = np.minimum(np.arange(j * block, (j + 1) * block), width - 1)
            assert found[0, i, j, 0] == np.round(image[0, :, :, 0][np.ix_(rows, columns)].astype(float).mean())


def test_values_outside_of_the_range_are_cut_off() -> None:
    images = np.array([[[[-1.0, 0.0, 0.5, 1.0, 9.0]]]], np.float32)
    assert pixels(images).tolist() == [[[[0], [0], [128], [255], [255]]]]

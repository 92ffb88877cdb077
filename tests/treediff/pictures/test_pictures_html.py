"""The page of a tree: whole in itself, well formed, and with every node, image and link in its place."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from contrast import contrast
from hypothesis import HealthCheck, given, settings
from models import PRUNED, observations
from PIL import Image
from strategies import quick, topologies
from summaries import SPLIT, image_model, made_up, summary_of

from treediff import TreeTopology
from treediff.pictures import TreeSummary, summarize_tree, write_html
from treediff.pictures.palette import rgb
from treediff.pictures.tiles import pixels

VOID = {"meta", "link", "img", "rect", "path", "image", "br"}  # the last of svg close themselves
each_tree = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


class Page(HTMLParser):
    """Tags with their attributes, and a check that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(summary: TreeSummary, path: Path, title: str | None = None) -> Page:
    write_html(summary, path, title=title)
    return Page(path.read_text(encoding="utf-8"))


def picture(address: str | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    assert address is not None
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        return np.asarray(image)


@pytest.mark.parametrize("labels", [True, False])
def test_nothing_comes_from_elsewhere(tmp_path: Path, labels: bool) -> None:
    page = page_of(summary_of(image_model(), labels=labels), tmp_path / "tree.html")
    bare = re.sub(r'"data:image/png;base64,[^"]*"', '""', page.text)
    assert not re.search(r"https?:|//\w|@import|url\(", bare)
    for _, attributes in page.tags:
        for name in ("href", "src", "action", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "form", "base"} == set()


def test_the_browser_is_told_to_run_only_the_pages_own_script(tmp_path: Path) -> None:
    text = page_of(made_up(), tmp_path / "tree.html").text
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


@each_tree
@given(topologies(max_steps=9))
def test_every_node_has_its_place_in_the_tree_and_its_details(tmp_path: Path, tree: TreeTopology) -> None:
    page = page_of(made_up(tree), tmp_path / "tree.html")
    sections = {attributes["id"]: attributes for attributes in page.all("section")}
    assert list(sections) == [f"node-{node}" for node in tree]
    assert [a["class"] for a in sections.values()].count("root") == 1
    in_tree = [a["href"] for a in page.all("a") if "of the data" in (a["aria-label"] or "")]
    assert in_tree == [f"#node-{node}" for node in tree]
    assert len([a for a in page.all("path") if a.get("class") == "edge"]) == len(tree) - 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "data-up", "data-down", "data-left", "data-right"):
            target = attributes.get(name)
            assert target is None or not target.startswith("#") or target[1:] in ids
    for node in tree:
        ways = {way: sections[f"node-{node}"].get(f"data-{way}") for way in ("up", "down", "left", "right")}
        level = tree.levels[tree.depth(node)]
        place = level.index(node)
        expected = {
            "up": tree.parent(node),
            "down": next(iter(tree.children(node)), None),
            "left": level[place - 1] if place else None,
            "right": level[place + 1] if place + 1 < len(level) else None,
        }
        assert ways == {way: None if to is None else f"#node-{to}" for way, to in expected.items()}


def test_every_image_is_in_the_page_pixel_by_pixel(tmp_path: Path) -> None:
    for kind in ("mlp", "colour"):
        summary = summary_of(image_model(kind=kind), n=12)
        page = page_of(summary, tmp_path / "tree.html")
        expected = [image for node in summary for part in (node.samples, node.members) for image in part]
        found = [picture(a["src"]) for a in page.all("img")]
        assert len(found) == len(expected)
        for image, shown in zip(expected, found, strict=True):
            np.testing.assert_array_equal(shown.reshape(pixels(image[None])[0].shape), pixels(image[None])[0])
        thumbnails = [picture(a["href"]) for a in page.all("image")]
        for node, shown in zip(summary, thumbnails, strict=True):
            np.testing.assert_array_equal(shown.ravel(), pixels(node.samples[:1])[0].ravel())
    assert all(attributes["alt"] for attributes in page.all("img"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_refined_samples_stand_below_those_they_were_made_from(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    summary = made_up(shape=shape, refined=True)
    page = page_of(summary, tmp_path / "tree.html")
    for node in summary:
        assert node.refined is not None
        section = page.text.partition(f'<section id="node-{node.id}"')[2].partition("</section>")[0]
        heading = '<span class="generated">TreeVAE</span> above, <span class="refined">refined</span> below'
        assert f"<h3>{heading}</h3>" in section and "<h3>Generated</h3>" not in section
        pairs = re.findall(r'<li><div class="generated">(<img.*?>)</div><div class="refined">(<img.*?>)</div>', section)
        for i, (pair, blurry, sharp) in enumerate(zip(pairs, node.samples, node.refined, strict=True), 1):
            for text, image, name in zip(pair, (blurry, sharp), ("by the TreeVAE", "refined"), strict=True):
                (img,) = Page(text).all("img")
                assert img["alt"] == img["title"] == f"image {i} {name}"
                shown = pixels(image[None])[0]
                np.testing.assert_array_equal(picture(img["src"]).reshape(shown.shape), shown)
    thumbnails = [picture(a["href"]) for a in page.all("image")]
    for node, thumbnail in zip(summary, thumbnails, strict=True):
        np.testing.assert_array_equal(thumbnail.ravel(), pixels(node.samples[:1]).ravel())


def test_without_refined_samples_nothing_is_said_of_them(tmp_path: Path) -> None:
    page = page_of(made_up(), tmp_path / "tree.html")
    body = page.text.partition("<body>")[2]
    assert "refined" not in body and "TreeVAE" not in body
    assert body.count('<div class="generated"><h3>Generated</h3>') == len(SPLIT)


def test_colours_of_text_can_be_read_on_light_and_on_dark_paper(tmp_path: Path) -> None:
    """Web Content Accessibility Guidelines 2.2, criterion 1.4.3, level AA."""
    text = page_of(made_up(refined=True), tmp_path / "tree.html").text
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S)]
    assert len(themes) == 2
    for theme in themes:
        for name in ("ink", "grey", "generated", "refined", "real"):
            assert contrast(rgb(theme["paper"]), rgb(theme[name])) >= 4.5, name
    assert "h3 .refined { color: var(--refined); }" in text and ".refined img { border-color: var(--refined)" in text


def test_numbers_are_those_of_the_summary(tmp_path: Path) -> None:
    page = page_of(made_up(), tmp_path / "tree.html")  # leaves 1, 4, 5, 6 with as many rows as their ids
    for node, (share, count) in {0: ("100 %", "16"), 1: ("6.2 %", "1"), 3: ("68.8 %", "11")}.items():
        section = page.text.partition(f'<section id="node-{node}"')[2].partition("</section>")[0]
        assert f"<dt>share of the data</dt><dd>{share}</dd>" in section
        assert f"<dt>images assigned</dt><dd>{count}</dd>" in section
    assert "4 leaves, 16 images" in page.text


def test_without_labels_and_without_real_images_the_page_is_whole(tmp_path: Path) -> None:
    bare = page_of(made_up(members=0, class_names=None), tmp_path / "tree.html")
    assert bare.all("table") == [] and "Real images" not in bare.text
    full = page_of(made_up(), tmp_path / "tree.html")
    assert len(full.all("table")) == len(SPLIT) and "Real images" in full.text


def test_a_leaf_without_images_says_so(tmp_path: Path) -> None:
    tree = TreeTopology.balanced(0)  # node 0 has as many rows as its id
    page = page_of(made_up(tree), tmp_path / "tree.html")
    assert "No image has its most probable leaf here." in page.text


def test_names_and_titles_are_text_and_not_markup(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script> & "x" {braces}'
    page = page_of(made_up(class_names=(evil, "b")), tmp_path / "tree.html", title=evil)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in page.text
    assert page.words.count(evil) >= 2  # the title and the heading, as they were given
    assert any(evil in (attributes["title"] or "") for attributes in page.all("img"))


def test_many_classes_are_summed_up(tmp_path: Path) -> None:
    model = image_model(TreeTopology.balanced(0))
    for classes, more in ((20, None), (30, "10 more</th>")):
        labels = list(range(classes)) * 2
        summary = summarize_tree(model, observations(model, 2 * classes), labels)
        page = page_of(summary, tmp_path / "tree.html")
        assert ("more</th>" in page.text) == (more is not None) and (more or "") in page.text
        assert len(page.all("tr")) == min(classes, 21)


def test_large_images_are_averaged_down(tmp_path: Path) -> None:
    page = page_of(made_up(shape=(3, 300, 200)), tmp_path / "tree.html")
    assert {picture(a["src"]).shape for a in page.all("img")} == {(100, 67, 3)}


def test_the_same_summary_gives_the_same_bytes_and_replaces_the_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    two.write_text("old")
    for path in (one, two):
        write_html(made_up(PRUNED), str(path))
    assert one.read_bytes() == two.read_bytes()
    assert b"\r" not in one.read_bytes() and b"<title>A tree of 3 leaves</title>" in one.read_bytes()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_html(made_up(), tmp_path / "none" / "tree.html")

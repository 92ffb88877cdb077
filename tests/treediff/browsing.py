"""The tree page in a real browser: opens it, tells what it shows, and compares that with the summary."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from summaries import made_up

from treediff import TreeTopology
from treediff.pictures import TreeSummary
from treediff.pictures.palette import percent

PROGRAMS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
expect.set_options(timeout=30_000)

# What a reader sees: text, pixels as the browser decoded them, and where things are.
SHOWN = """async () => {
  const all = (what, where = document) => [...where.querySelectorAll(what)].filter((e) => e.getClientRects().length);
  const node = (link) => Number(link.getAttribute("href").slice("#node-".length));
  const images = (what) => Promise.all(all(what, section).map(async (img) => {
    await img.decode();
    const [width, height] = [img.naturalWidth, img.naturalHeight];
    const canvas = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    canvas.drawImage(img, 0, 0);
    const [box, pixels] = [img.getBoundingClientRect(), [...canvas.getImageData(0, 0, width, height).data]];
    return { alt: img.alt, shape: [height, width, 4], pixels, x: box.x, y: box.y };
  }));
  const sections = all("section");
  const section = sections[0];
  return {
    sections: sections.map((s) => s.id),
    heading: section.querySelector("h2").innerText,
    crumbs: all(".crumbs li", section).map((li) => li.innerText),
    facts: Object.fromEntries(all(".facts div", section).map((div) => [...div.children].map((e) => e.innerText))),
    classes: all("tr", section).map((row) => [row.cells[0].innerText, row.cells[2].innerText]),
    bars: all(".bar", section).map((bar) => bar.offsetWidth / (bar.parentElement.clientWidth - 2)),  // padding: 1 px
    way: all(".tree a.way").map(node).sort((a, b) => a - b),
    current: all(".tree a[aria-current]").map(node),
    generated: await images(".generated img"),
    refined: await images(".refined img"),
    real: await images(".real img"),
  };
}"""

# Where the focus is, whether one sees it, and whether the tree shows the node; scrolling may take some frames.
FOCUS = """async () => {
  for (let frame = 0; ; frame++) {
    const at = document.activeElement, style = getComputedStyle(at), { top } = at.getBoundingClientRect();
    const boxes = [".tree", ".tree a[aria-current]"].map((e) => document.querySelector(e).getBoundingClientRect());
    const [pane, link] = boxes;
    const found = {
      id: at.id,
      visible: at.matches(":focus-visible") && style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2,
      "on the screen": top >= 0 && top < innerHeight,
      "in the tree": pane.left <= link.left && link.right <= pane.right
        && pane.top <= link.top && link.bottom <= pane.bottom,
    };
    if (Object.values(found).every(Boolean) || frame > 100) return found;
    await new Promise(requestAnimationFrame);
  }
}"""

# What no scrolling brings into view, what makes the page or the details scroll, and links too small to tap
# (Web Content Accessibility Guidelines 2.2, criterion 2.5.8: 24 pixels).
CUT_OFF = """async () => {
  for (let frame = 0; frame < 2; frame++) await new Promise(requestAnimationFrame);  // until it has scrolled
  const wrong = [], all = (what) => [...document.querySelectorAll(what)].filter((e) => e.getClientRects().length);
  const [paper, pane, main] = [document.documentElement, ...all(".tree, main")];
  for (const e of [paper, main]) if (e.scrollWidth > e.clientWidth) wrong.push(["sideways", e.tagName, e.scrollWidth]);
  if (main.scrollTop) wrong.push(["the details begin above their pane", main.scrollTop]);
  for (const e of all("header *, main, main *")) {
    const { left, right } = e.getBoundingClientRect();
    if (left < 0 || right > paper.clientWidth) wrong.push(["outside", e.outerHTML.slice(0, 80)]);
  }
  const corner = pane.getBoundingClientRect();
  if (!/auto|scroll/.test(getComputedStyle(pane).overflow)) wrong.push(["the tree does not scroll"]);
  for (const e of all(".tree a")) {
    const box = e.getBoundingClientRect();
    const [x, y] = [box.left - corner.left + pane.scrollLeft, box.top - corner.top + pane.scrollTop];
    const [right, bottom] = [x + box.width, y + box.height];
    if (x < 0 || y < 0 || right > pane.scrollWidth || bottom > pane.scrollHeight) wrong.push(["lost", x, y]);
  }
  for (const e of all("a")) {
    const { width, height } = e.getBoundingClientRect();
    if (width < 24 || height < 24) wrong.push(["small", e.getAttribute("aria-label"), width, height]);
  }
  return wrong;
}"""

# Texts and marks with their colour, the colour under them, and the contrast that they need.
COLOURS = """() => {
  const under = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? under(e.parentElement) : colour;
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const [text, e] = [texts.currentNode.data.trim(), texts.currentNode.parentElement];
    if (!text || !e.getClientRects().length) continue;
    found.push([text, getComputedStyle(e)[e.closest("svg") ? "fill" : "color"], under(e), 4.5]);
  }
  const mark = (name, what, property) => {
    for (const e of document.querySelectorAll(what)) {
      if (e.getClientRects().length) found.push([name, getComputedStyle(e)[property], under(e.parentElement), 3]);
    }
  };
  mark("edge", ".edge", "stroke");
  mark("frame of the way", ".tree a.way:not([aria-current], :focus) .frame", "stroke");
  mark("frame of the node", ".tree a[aria-current]:not(:focus) .frame", "stroke");
  mark("focus", ".tree a:focus-visible .frame", "stroke");
  mark("focus", "section:focus-visible", "outlineColor");
  mark("bar", ".bar", "backgroundColor");
  mark("border of a link", "main a", "borderTopColor");
  mark("border of an image", "main img", "borderTopColor");
  return found;
}"""


@contextmanager
def a_browser() -> Iterator[Browser]:
    """Chromium or Chrome from the PATH."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"needs a browser on the PATH ({', '.join(PROGRAMS)}); on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        # Scroll bars stay, because they take room from the page.
        settings: dict[str, Any] = {"executable_path": program, "ignore_default_args": ["--hide-scrollbars"]}
        browser = playwright.chromium.launch(args=["--disable-gpu", "--disable-quic", "--disable-sync"], **settings)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, at: str = "", **settings: Any) -> Iterator[Page]:  # noqa: ANN401
    """The page from its file, with the network off; whatever it asks for or complains of fails the test."""
    context = browser.new_context(offline=True, **settings)
    page = context.new_page()
    asked: list[str] = []
    trouble: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(file.as_uri() + at)
    yield page
    context.close()
    trouble += [url for url in asked if url.partition("#")[0] != file.as_uri() and not url.startswith("data:")]
    assert not trouble, trouble


def pictured(tree: TreeTopology, **settings: Any) -> TreeSummary:  # noqa: ANN401
    """A made-up summary with two classes, and no image twice; the first of a node is of one colour."""
    summary = made_up(tree, shape=(3, 8, 8), **settings)
    nodes = []
    for node in summary:
        random = np.random.default_rng(100 + node.id)
        samples, members = (random.random(part.shape, np.float32) for part in (node.samples, node.members))
        samples[0] = np.array(colour_of(node.id), np.float32)[:, None, None] / 255
        first = int(random.integers(1 + node.count))
        counts = np.array([first, node.count - first] + [0] * (len(summary.class_names or ()) - 2))
        nodes.append(replace(node, samples=samples, members=members, class_counts=counts))
    return replace(summary, nodes=tuple(nodes))


def colour_of(node: int) -> tuple[int, int, int]:
    """The colour of the node's first image."""
    return 40 + 8 * node, 200 - 8 * node, 90


def wait_for(page: Page, node: int) -> None:
    """Until the page has come to a node."""
    expect(page.locator(f'.tree a[href="#node-{node}"]')).to_have_attribute("aria-current", "true")


def check_shown(page: Page, summary: TreeSummary, at: int) -> None:
    """All that the page says of a node is what the summary says of it, and of no other."""
    wait_for(page, at)
    shown, node, tree = page.evaluate(SHOWN), summary[at], summary.topology
    children = tree.children(at)
    kind = "root" if at == tree.root else "inner node" if children else "leaf"
    assert shown["sections"] == [f"node-{at}"] and shown["heading"] == f"Node {at}, {kind}"
    assert shown["crumbs"] == [str(step) for step in tree.path(at)]
    assert shown["facts"] == {
        "depth": str(tree.depth(at)),
        "share of the data": percent(node.share),
        "images assigned": str(node.count),
        "children": " ".join(map(str, children)) or "none",
    }
    assert shown["current"] == [at] and shown["way"] == sorted(tree.path(at))

    assert node.class_counts is not None and node.member_labels is not None and summary.class_names is not None
    shares = {int(k): int(node.class_counts[k]) / node.count for k in np.argsort(-node.class_counts, kind="stable")}
    lines = [(k, share) for k, share in shares.items() if share]
    assert shown["classes"] == [
        [summary.class_names[k], f"{node.class_counts[k]} ({percent(share)})"] for k, share in lines
    ]
    assert shown["bars"] == pytest.approx([share for _, share in lines], abs=0.02)

    _check_images(shown["generated"], node.samples)
    _check_images(shown["real"], node.members)
    names = [summary.class_names[k] for k in node.member_labels]
    captions = [f"real image, row {row}: {name}" for row, name in zip(node.member_rows, names, strict=True)]
    assert [image["alt"] for image in shown["real"]] == captions
    if node.refined is not None:
        _check_images(shown["refined"], node.refined)
        for above, below in zip(shown["generated"], shown["refined"], strict=True):
            assert above["x"] == below["x"] and above["y"] < below["y"]


def _check_images(shown: list[dict[str, Any]], expected: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    assert len(shown) == len(expected)
    for image, wanted in zip(shown, expected, strict=True):
        found = np.array(image["pixels"]).reshape(image["shape"])
        np.testing.assert_array_equal(found[..., :3], np.rint(255 * wanted).transpose(1, 2, 0))
        assert (found[..., 3] == 255).all() and image["alt"]

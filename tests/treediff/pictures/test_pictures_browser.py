"""The page of a tree in a real browser: clicked through, by keys alone, on narrow screens, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import COLOURS, CUT_OFF, FOCUS, a_browser, check_shown, colour_of, opened, pictured, wait_for
from contrast import contrast
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from summaries import SPLIT, made_up

from treediff import TreeTopology
from treediff.pictures import TreeSummary, write_html

TEN = TreeTopology.balanced(3).split(9).split(10)
WIDE, LOW, NARROW = {"width": 1280, "height": 800}, {"width": 900, "height": 400}, {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def small() -> TreeSummary:
    return pictured(SPLIT, refined=True)


@pytest.fixture(scope="module")
def ten() -> TreeSummary:
    return pictured(TEN, samples=8, members=8)


@pytest.fixture
def file(tmp_path: Path, small: TreeSummary) -> Path:
    write_html(small, tmp_path / "tree.html")
    return tmp_path / "tree.html"


@pytest.fixture
def file_of_ten(tmp_path: Path, ten: TreeSummary) -> Path:
    write_html(ten, tmp_path / "ten.html")
    return tmp_path / "ten.html"


def screen(page: Page) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What is on the screen, `(H, W, 3)`."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize("where", [".tree", ".facts"])
def test_clicks_lead_from_the_root_to_every_leaf(browser: Browser, file: Path, small: TreeSummary, where: str) -> None:
    """In the drawing, and by the children in the details; from the leaf back along its path."""
    with opened(browser, file, viewport=WIDE) as page:
        check_shown(page, small, 0)
        for leaf in SPLIT.leaves:
            for node in SPLIT.path(leaf)[1:]:
                page.locator(f'{where} a[href="#node-{node}"]:visible').click()
                check_shown(page, small, node)
            for node in reversed(SPLIT.path(leaf)[:-1]):
                page.locator(".crumbs a:visible").last.click()
                wait_for(page, node)


def test_all_ten_leaves(browser: Browser, file_of_ten: Path, ten: TreeSummary) -> None:
    with opened(browser, file_of_ten, viewport=NARROW) as page:
        for leaf in TEN.leaves:
            page.locator(f'.tree a[href="#node-{leaf}"]').click()
            check_shown(page, ten, leaf)
            expect(page.locator("h2:visible")).to_be_in_viewport()


def test_thumbnails_are_drawn(browser: Browser, file: Path) -> None:
    with opened(browser, file, viewport=WIDE) as page:
        drawn = screen(page)
        for node in SPLIT:
            box = page.locator(f'.tree a[href="#node-{node}"] image').bounding_box()
            assert box is not None
            middle = drawn[round(box["y"] + box["height"] / 2), round(box["x"] + box["width"] / 2)]
            assert tuple(middle) == colour_of(node)


def test_the_address_names_the_node(browser: Browser, file: Path, small: TreeSummary) -> None:
    with opened(browser, file, "#node-5", viewport=WIDE) as page:
        check_shown(page, small, 5)
        page.locator('.tree a[href="#node-4"]').click()
        check_shown(page, small, 4)
        assert page.url.endswith("tree.html#node-4")
        page.go_back()
        check_shown(page, small, 5)
    with opened(browser, file, "#node-99", viewport=WIDE) as page:
        check_shown(page, small, 0)


def test_without_scripts_the_clicks_still_work(browser: Browser, file: Path) -> None:
    with opened(browser, file, viewport=WIDE, java_script_enabled=False) as page:
        assert [node for node in SPLIT if page.locator(f"#node-{node}").is_visible()] == [0]
        for node in SPLIT:
            page.locator(f'.tree a[href="#node-{node}"]').click()
            page.locator(f"#node-{node}").wait_for()
            assert [other for other in SPLIT if page.locator(f"#node-{other}").is_visible()] == [node]


@pytest.mark.parametrize(
    ("policy", "added", "seen"),
    [
        (True, '<img src="http://127.0.0.1:9/x.png">', "Content Security Policy"),
        (True, "<script>let x = 1</script>", "Content Security Policy"),
        (False, '<img src="http://127.0.0.1:9/x.png">', "127.0.0.1:9/x.png"),
        (False, "<script>throw Error('at once')</script>", "at once"),
    ],
    ids=["image forbidden", "script forbidden", "image", "script"],
)
def test_other_requests_and_errors_are_noticed(
    browser: Browser, file: Path, policy: bool, added: str, seen: str
) -> None:
    """The checks of every test here can fail: the page's policy forbids what is added, and without it, it is seen."""
    text = file.read_text(encoding="utf-8").replace("</body>", added + "</body>")
    file.write_text(text if policy else text.replace("Content-Security-Policy", "none"), encoding="utf-8")
    with pytest.raises(AssertionError, match=seen), opened(browser, file):
        pass


def test_tab_goes_to_every_link_and_one_sees_where(browser: Browser, file: Path) -> None:
    with opened(browser, file, viewport=WIDE) as page:
        before = screen(page)
        for link in [f'.tree a[href="#node-{node}"]' for node in SPLIT] + [
            f'#node-0 .facts a[href="#node-{child}"]' for child in SPLIT.children(0)
        ]:
            page.keyboard.press("Tab")
            assert page.evaluate("link => document.activeElement === document.querySelector(link)", link), link
            box = page.locator(link).bounding_box()
            assert box is not None
            changed = np.abs(screen(page) - before).max(2) > 64
            rows, columns = np.nonzero(changed)
            assert len(rows) > 60, link  # a frame of at least so many pixels
            assert box["y"] - 6 <= rows.min() and rows.max() <= box["y"] + box["height"] + 6
            assert box["x"] - 6 <= columns.min() and columns.max() <= box["x"] + box["width"] + 6


def focus(page: Page) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate(FOCUS)
    return found


def seen(node: int) -> dict[str, Any]:
    return {"id": f"node-{node}", "visible": True, "on the screen": True, "in the tree": True}


def test_enter_opens_every_node_and_the_focus_goes_to_its_details(browser: Browser, file: Path) -> None:
    with opened(browser, file, viewport=NARROW) as page:
        for presses, node in enumerate(SPLIT, 1):
            page.goto(file.as_uri())
            for _ in range(presses):
                page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            wait_for(page, node)
            assert focus(page) == seen(node)
            page.keyboard.press("Tab")  # goes on from the details: to the first step of the path
            first = f'#node-{node} a[href="#node-{SPLIT.path(node)[0] if node else SPLIT.children(node)[0]}"]'
            assert page.evaluate("first => document.activeElement === document.querySelector(first)", first)


@pytest.mark.parametrize("viewport", [LOW, NARROW], ids=["low", "narrow"])
def test_arrows_lead_to_every_node(browser: Browser, file_of_ten: Path, viewport: dict[str, int]) -> None:
    with opened(browser, file_of_ten, viewport=viewport) as page:

        def press(key: str, node: int) -> None:
            page.keyboard.press(key)
            wait_for(page, node)
            assert focus(page) == seen(node)

        for leaf in TEN.leaves:
            press("Home", 0)
            for above, node in zip(TEN.path(leaf), TEN.path(leaf)[1:], strict=False):
                left, right = TEN.children(above)
                press("ArrowDown", left)
                if node == right:
                    press("ArrowRight", right)
            level = TEN.levels[TEN.depth(leaf)]
            place = level.index(leaf)
            press("ArrowDown", leaf)  # a leaf has nothing below
            press("Shift+ArrowUp", leaf)  # keys with others are the browser's
            press("ArrowLeft", level[max(place - 1, 0)])
            press("ArrowRight", level[place if place else 1])
            parent = TEN.parent(leaf if place else level[1])
            assert parent is not None
            press("ArrowUp", parent)


def test_details_that_are_too_long_scroll_by_keys(browser: Browser, file_of_ten: Path) -> None:
    with opened(browser, file_of_ten, viewport=LOW) as page:
        page.keyboard.press("ArrowDown")
        wait_for(page, 1)
        page.keyboard.press("End")
        page.wait_for_function("""() => {
          const main = document.querySelector("main");
          return main.scrollTop > 0 && main.scrollTop + main.clientHeight >= main.scrollHeight - 1;
        }""")


def test_roles_and_names_for_those_who_do_not_see(browser: Browser, file: Path) -> None:
    """As the browser hands them to a screen reader."""
    with opened(browser, file, "#node-3", viewport=WIDE) as page:
        found = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes, waiting, spoken = {node["nodeId"]: node for node in found}, [found[0]["nodeId"]], []
    while waiting:  # in the order in which they are read
        node = nodes[waiting.pop()]
        waiting.extend(reversed([child for child in node["childIds"] if child in nodes]))
        if not node["ignored"]:
            spoken.append((node["role"]["value"], node["name"]["value"]))

    def names(role: str) -> list[str]:
        return [name for found, name in spoken if found == role]

    assert names("navigation") == ["The tree", "Path from the root"] and names("region") == ["Node 3, inner node"]
    shares = ("100 %", "6.2 %", "93.8 %", "68.8 %", "25.0 %", "31.2 %", "37.5 %")
    in_tree = [f"node {node}, {share} of the data" for node, share in enumerate(shares)]
    assert names("link") == [*in_tree, "node 0", "node 2", "node 5", "node 6"]  # the path, the children
    assert names("SvgRoot") == []  # a picture, whose links a screen reader may pass over
    generated = [f"image {i} {how}" for i in range(1, 5) for how in ("by the TreeVAE", "refined")]
    assert names("image") == generated + [f"real image, row {row}: cat" for row in range(3)]
    headings = ["Node 3, inner node", "TreeVAE above, refined below", "Real images, the typical ones", "Classes"]
    assert names("heading") == ["A tree of 4 leaves", *headings]
    assert len(names("main")) == len(names("banner")) == 1 and len(names("rowheader")) == 2


def awkward(tree: TreeTopology) -> TreeSummary:
    """Names without a break, large numbers, wide images."""
    summary = made_up(tree, shape=(1, 40, 400), class_names=("W" * 90, "dog"), refined=True)
    many = [replace(n, count=n.count * 1_234_567, class_counts=np.array([n.count * 1_234_567, 1])) for n in summary]
    return replace(summary, nodes=tuple(many), rows=summary.rows * 1_234_567)


@pytest.mark.parametrize("tree", [TEN, TreeTopology.chain(12)], ids=["wide", "deep"])
@pytest.mark.parametrize("width", [320, 360, 801])
def test_no_width_cuts_anything_off(browser: Browser, tmp_path: Path, tree: TreeTopology, width: int) -> None:
    write_html(awkward(tree), tmp_path / "tree.html", title="W" * 150)
    with opened(browser, tmp_path / "tree.html", viewport={"width": width, "height": 640}) as page:
        for node in (0, tree.children(0)[-1], tree.leaves[-1]):
            page.evaluate("node => { location.hash = node; }", f"#node-{node}")
            wait_for(page, node)
            assert page.evaluate(CUT_OFF) == []
        page.evaluate("document.querySelector('h1').style = 'white-space: nowrap'")
        assert page.evaluate(CUT_OFF) != []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out(browser: Browser, file: Path, tmp_path: Path, scheme: Any) -> None:  # noqa: ANN401
    """Web Content Accessibility Guidelines 2.2, criteria 1.4.3 (text) and 1.4.11 (what is not text), level AA."""
    write_html(made_up(TreeTopology.balanced(0)), tmp_path / "empty.html")
    said = set()
    for path, at in ((file, ""), (file, "#node-6"), (tmp_path / "empty.html", "")):
        with opened(browser, path, at, viewport=WIDE, color_scheme=scheme) as page:
            page.keyboard.press("Tab")
            found = page.evaluate(COLOURS)
        for what, colour, under, least in found:
            one, other = ([float(value) for value in re.findall(r"[\d.]+", text)] for text in (colour, under))
            assert contrast(one, other) >= least, (what, colour, under)
            assert contrast(other, (255, 255, 255) if scheme == "light" else (0, 0, 0)) < 1.5, "paper of the scheme"
            said.add(what)
    text = {"A tree of 4 leaves", "Home", "Node 0, root", "Node 6, leaf", "depth", "68.8 %", "TreeVAE", "refined"}
    text |= {"Real images, the typical ones", "Classes", "cat", "No image has its most probable leaf here."}
    assert said >= text | {"edge", "frame of the way", "frame of the node", "focus", "bar", "border of a link"}

"""Every Python block in the README and the docs runs and says what its comments say; links and commands exist."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ROOT_PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md"]  # those of the docs are for its own build
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^\s*print\(.*\)\s+# ([\[(\d].*)$")  # a comment that begins with a value
SHAPE = re.compile(r"^(\w+) = .*\s# .*: \((\w+(?:, \w+)+)\)")  # a comment that ends with a shape


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and source of each block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found.group(1)) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize(
    ("page", "line", "source"),
    [
        pytest.param(page, line, source, id=f"{page.relative_to(ROOT)}:{line}")
        for page in PAGES
        for line, source in python_blocks(page)
    ],
)
def test_block_runs(page: Path, line: int, source: str) -> None:
    code = compile("\n" * (line - 1) + source, str(page), "exec")  # so that a traceback shows the page's line
    printed: dict[int, object] = {}
    names: dict[str, object] = {"__name__": "__main__", "print": recorder(printed)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, names)
    assert untrue(line, source, printed, names) == []


def recorder(printed: dict[int, object]) -> Callable[..., None]:
    """A `print` that keeps what it is given, by line."""

    def tell(*values: object) -> None:
        printed[sys._getframe(1).f_lineno] = values[0] if len(values) == 1 else values

    return tell


def plain(value: object) -> object:
    """Numbers in lists, whatever held them."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple | torch.Size) else value


def value_at_the_start(text: str) -> object:
    """Of '(2, 3), in [0, 1]' it is (2, 3); None if there is none."""
    commas = [found.start() for found in re.finditer(",", text)]
    for end in (len(text), *reversed(commas)):
        try:
            return ast.literal_eval(text[:end])
        except (SyntaxError, ValueError):
            continue
    return None


def untrue(line: int, source: str, printed: dict[int, object], names: dict[str, object]) -> list[str]:
    """Comments that give a value, or a shape, and something else came; a word stands for any number."""
    found = []
    for at, text in enumerate(source.splitlines(), start=line):
        expected = value_at_the_start(match[1]) if (match := PRINTED.match(text)) else None
        if expected is not None and plain(printed[at]) != plain(expected):
            found.append(f"line {at}: {expected}, not {printed[at]}")
        if match := SHAPE.match(text):
            shape, told = names[match[1]].shape, match[2].split(", ")  # type: ignore[attr-defined]
            if [str(n) if word.isdigit() else word for n, word in zip(shape, told, strict=False)] != told:
                found.append(f"line {at}: ({match[2]}), not {tuple(shape)}")
    return found


def test_a_comment_that_is_not_true_is_found() -> None:
    source = (
        "x = zeros(2, 3)  # zeros: (2, n)\nprint(x.shape)  # (2, 4), in [0, 1]\nprint(7)  # 7\nprint(1)  # 2 or so\n"
    )
    names: dict[str, object] = {"zeros": torch.zeros, "print": recorder(printed := {})}
    exec(source, names)
    assert untrue(1, source, printed, names) == ["line 2: (2, 4), not torch.Size([2, 3])"]
    assert untrue(1, source.replace("n)", "2)"), printed, names)[0] == "line 1: (2, 2), not (2, 3)"
    assert untrue(1, source.replace("n)", "n, 1)"), printed, names)[0] == "line 1: (2, n, 1), not (2, 3)"


def test_readme_has_an_example() -> None:
    assert python_blocks(README)
    texts = [text for page in PAGES for _, source in python_blocks(page) for text in source.splitlines()]
    assert sum(bool(PRINTED.match(text)) for text in texts) > 4 and sum(bool(SHAPE.match(text)) for text in texts) > 1


def test_readme_commands_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def anchors(page: Path) -> set[str]:
    """What headings are called in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ROOT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_outside_of_the_docs_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)\s]*)\)", page.read_text(encoding="utf-8"))
    assert links or page.name != "README.md"
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []

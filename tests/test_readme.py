"""Every Python block in the README and the docs runs, and every command the README names exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(code, {"__name__": "__main__"})


def test_readme_has_an_example() -> None:
    assert python_blocks(README)


def test_readme_commands_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_readme_links_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

"""Docstrings begin as CONTRIBUTING says: a function with a verb, a class or module with a noun."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPENERS = ("What", "How", "Where", "Whether", "Which", "Who", "Those", "That", "The same", "See")


def openings() -> Iterator[tuple[str, str]]:
    """Every docstring of both packages by its place."""
    for package in ("treediff", "munkey"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                    text = ast.get_docstring(node)
                    if text:
                        yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def test_no_docstring_begins_with_a_riddle() -> None:
    found = list(openings())
    assert len(found) > 1000
    riddles = [place for place, text in found if text.startswith(tuple(f"{opener} " for opener in OPENERS))]
    assert riddles == []

"""Tables in pages of results, between marks, made from recorded results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
Row = Sequence[object]


def markdown(titles: Row, rows: Iterable[Row]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def put(page: str, name: str, text: str) -> str:
    """The page with another text between a mark of some name and the next end."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    if page.count(begin) != 1:
        raise SystemExit(f"expected one mark {begin.strip()!r} in the page, found {page.count(begin)}")
    before, _, old = page.partition(begin)
    return f"{before}{begin}\n{text}\n\n{end}{old.partition(end)[2]}"


def rewrite(
    description: str | None, result: str, page: str, filled: Callable[[str, dict[str, Any] | None], str]
) -> None:
    """Rewrite the tables of a page from a result, or from None if there is no result yet; options name other files."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=RESULTS / result)
    parser.add_argument("--page", type=Path, default=RESULTS / page)
    args = parser.parse_args()
    found = json.loads(args.result.read_text()) if args.result.exists() else None
    args.page.write_text(filled(args.page.read_text(encoding="utf-8"), found), encoding="utf-8")

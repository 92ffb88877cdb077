"""Write the numbers of `benchmarks/reliability.py` into its page.

    python benchmarks/reliability_table.py

The tables between the marks of docs/results/reliability.md are made from docs/results/reliability.json; the text around
the tables stays. Cells without a result are marked.
"""

from __future__ import annotations

from typing import Any

from tables import Row, markdown, put, rewrite

MISSING = "*to be filled*"
#: One row for each attack, by its names in the result.
ATTACKS: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "lines": (
        ("kind", "change"),
        [
            (kind, change)
            for kind in ("memory", "file", "file and log")
            for change in ("add", "return", "grow", "forget", "compact", "load")
        ],
    ),
    "kills": (("kind",), [("munkey",), ("SQLite",), ("LMDB",)]),
    "bits": (("file",), [("live file",), ("log",), ("manifest",), ("rows of a folder",)]),
}
COUNTS = {
    "lines": ("trials", "before", "after", "refuses"),
    "kills": ("trials", "whole"),
    "bits": ("bits", "trials", "refused", "read as it was"),
}
TITLES = {
    "lines": ("store", "change", "interruptions", "before", "after", "refuses", "violations"),
    "kills": ("store", "kills", "whole", "violations"),
    "bits": ("file", "bits of it", "flipped", "refused", "read as it was", "violations"),
}


def violations(line: dict[str, Any]) -> int:
    return sum(count for name, count in line.items() if name.startswith("violation"))


def table(attack: str, lines: list[dict[str, Any]]) -> str:
    """Markdown, one row for each attack, done or not."""
    names, rows = ATTACKS[attack]
    found = {tuple(line[name] for name in names): line for line in lines if line["attack"] == attack}
    unknown = found.keys() - set(rows)
    if unknown:
        raise SystemExit(f"the result has attacks that the page has no row for: {sorted(unknown)}")
    text: list[Row] = []
    for row in rows:
        line = found.get(row)
        counts = [MISSING] * (1 + len(COUNTS[attack]))
        if line is not None:
            counts = [f"{line.get(name, 0):,}" for name in COUNTS[attack]] + [f"{violations(line):,}"]
        text.append((*row, *counts))
    return markdown(TITLES[attack], text)


def filled(page: str, result: dict[str, Any] | None) -> str:
    """The page with rewritten tables."""
    lines = [] if result is None else result["attacks"]
    for attack in ATTACKS:
        page = put(page, attack, table(attack, lines))
    return page


def main() -> None:
    """Write the page."""
    rewrite(__doc__, "reliability.json", "reliability.md", filled)


if __name__ == "__main__":
    main()

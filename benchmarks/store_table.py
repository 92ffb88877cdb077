"""Write the numbers of `benchmarks/store.py` into its page.

    python benchmarks/store_table.py

The tables between the marks of docs/results/munkey.md are made from docs/results/store.json; the text around the
tables stays.
"""

from __future__ import annotations

from typing import Any

from tables import markdown, put, rewrite


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    taken = 1000 * seconds
    return f"{taken:,.0f}" if taken >= 100 else f"{taken:.3g}"


def searching(result: dict[str, Any]) -> str:
    titles = ("keys", "rows x width", "queries", "ours, ms", "faiss, ms", "times faster", "candidates", "different")
    return markdown(
        titles,
        (
            (
                *(row["keys"], f"{row['rows']:,} x {row['width']}", row["queries"], ms(row["ours"]), ms(row["faiss"])),
                *(f"{row['times faster']:.2f}", f"{row['candidates']:,.0f}", row["different"]),
            )
            for row in result["searching"]
        ),
    )


def forgetting(result: dict[str, Any]) -> str:
    names = ("memory", "faiss", "file", "sqlite", "sqlite wal", "lmdb")
    titles = ("rows", "forgotten", "in memory", "faiss", "in a file", "SQLite", "SQLite, WAL", "LMDB")
    return markdown(
        titles,
        (
            (f"{row['rows']:,}", f"{row['forgotten']:,}", *(ms(row[name]) for name in names))
            for row in result["forgetting"]
        ),
    )


def opening(result: dict[str, Any]) -> str:
    titles = ("rows", "ours, s", "SQLite, s", "LMDB, s")
    return markdown(
        titles,
        (
            (f"{row['rows']:,}", *(f"{row[name]:.3g}" for name in ("ours", "sqlite", "lmdb")))
            for row in result["opening"]
        ),
    )


def adding(result: dict[str, Any]) -> str:
    titles = ("rows", "to", "seconds", "memory at most, of the store", "memory afterwards, of the store")
    return markdown(
        titles,
        (
            (f"{row['rows']:,}", place, *(f"{row[place][what]:.3g}" for what in ("seconds", "peak", "resident")))
            for row in result["adding"]
            for place in ("memory", "file")
        ),
    )


TABLES = {f.__name__: f for f in (searching, forgetting, opening, adding)}


def filled(page: str, result: dict[str, Any] | None) -> str:
    """The page with rewritten tables."""
    if result is None:
        raise SystemExit("there is no result; make one with benchmarks/store.py")
    for name, table in TABLES.items():
        page = put(page, name, table(result))
    return page


def main() -> None:
    """Write the page."""
    rewrite(__doc__, "store.json", "munkey.md", filled)


if __name__ == "__main__":
    main()

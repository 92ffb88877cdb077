"""Write the numbers of `benchmarks/readouts.py` into its page.

    python benchmarks/readouts_table.py

The tables between the marks of docs/results/readouts.md are made from docs/results/readouts.json; the text around the
tables stays.
"""

from __future__ import annotations

from typing import Any

from tables import markdown, put, rewrite


def table(result: dict[str, Any], what: str, factor: float, digits: int) -> str:
    """One column for each data set, means and standard deviations over seeds."""
    names = list(result)
    methods = list(dict.fromkeys(method for rows in result.values() for method in rows))
    return markdown(
        ("", *names),
        (
            (method, *(_cell(result[name].get(method, {}).get(what), factor, digits) for name in names))
            for method in methods
        ),
    )


def _cell(pair: list[float] | None, factor: float, digits: int) -> str:
    return "" if pair is None else f"{factor * pair[0]:.{digits}f} ± {factor * pair[1]:.{digits}f}"


#: Tables by their marks: number, factor and digits.
TABLES = {
    "accuracy": ("accuracy", 100.0, 1),
    "balanced": ("balanced accuracy", 100.0, 1),
    "log loss": ("log loss", 1.0, 3),
    "calibration": ("calibration error", 100.0, 1),
}


def filled(page: str, result: dict[str, Any] | None) -> str:
    """The page with its tables."""
    for name, settings in TABLES.items():
        if result is not None:
            page = put(page, name, table(result, *settings))
    return page


def main() -> None:
    """Rewrite the page."""
    rewrite(__doc__, "readouts.json", "readouts.md", filled)


if __name__ == "__main__":
    main()

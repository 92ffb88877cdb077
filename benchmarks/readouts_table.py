"""Write the numbers of `benchmarks/readouts.py` into its page.

    python benchmarks/readouts_table.py

The tables between the marks of docs/results/readouts.md are made from docs/results/readouts.json and new_classes.json,
and so is docs/results/readouts.png; the text around the tables stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import RESULTS, markdown, put, rewrite


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


def of_new_classes(result: dict[str, Any]) -> str:
    """Accuracy on a new class and on old classes, by number of examples of the new class."""
    counts = list(next(iter(result.values())))[1:]
    return markdown(
        ("", "old, before", *(f"new, {count}" for count in counts), *(f"old, {count}" for count in counts[-3:])),
        (
            (
                name,
                f"{rows['0']['old']:.1f}",
                *(f"{rows[count]['new']:.1f}" for count in counts),
                *(f"{rows[count]['old']:.1f}" for count in counts[-3:]),
            )
            for name, rows in result.items()
        ),
    )


def filled(page: str, result: dict[str, Any] | None) -> str:
    """The page with its tables."""
    learnt = RESULTS / "new_classes.json"
    if learnt.exists():
        page = put(page, "new classes", of_new_classes(json.loads(learnt.read_text())))
    for name, settings in TABLES.items():
        if result is not None:
            page = put(page, name, table(result, *settings))
    return page


#: Methods of the picture: symbol, and whether the method forgets to the bit.
SHOWN = {
    "munkey": ("D", True),
    "votes": ("o", True),
    "ridge": ("s", True),
    "logistic regression": ("o", False),
    "perceptron": ("s", False),
    "munkey, trees": ("P", True),
    "boosted trees": ("P", False),
}


def picture(result: dict[str, Any], path: Path) -> None:
    """Accuracy of each method, set by set; means over seeds, with standard deviations."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.0 + 0.6 * len(result)), layout="constrained")
    named: set[str] = set()
    for place, rows in enumerate(result.values()):
        for step, (method, (marker, exact)) in enumerate(SHOWN.items()):
            if method in rows:
                mean, spread = (100 * value for value in rows[method]["accuracy"])
                color, size = ("C0" if exact else "C1"), 9 if method == "munkey" else 6
                look: dict[str, Any] = {"color": color, "markersize": size}
                look["markerfacecolor"] = color if exact else "white"
                label = None if method in named else method + ("" if exact else ", trained again")
                axes.errorbar(mean, -place + 0.1 * (3 - step), xerr=spread, fmt=marker, label=label, **look)
                named.add(method)
    axes.set_yticks([-place for place in range(len(result))], list(result))
    axes.set_xlabel("test accuracy, %; more is better")
    axes.grid(axis="x", color="0.9")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Rewrite the page, and draw the picture."""
    rewrite(__doc__, "readouts.json", "readouts.md", filled)
    picture(json.loads((RESULTS / "readouts.json").read_text()), RESULTS / "readouts.png")


if __name__ == "__main__":
    main()

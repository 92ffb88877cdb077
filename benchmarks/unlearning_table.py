"""Write the numbers of `examples/unlearning_benchmark.py` on features into their page.

    python benchmarks/unlearning_table.py

The tables between the marks of docs/results/unlearning_features.md are made from
docs/results/unlearning/features-*/results.json; the text around the tables stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tables import RESULTS, markdown, put

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # for what they share
from unlearning.report import Rows, attack_gaps, gaps, oracle_of, summary

Found = dict[str, Rows]
PLAIN = "plain: retrained"
#: Methods in the order of the tables, with their names there; all others are methods after the fact.
NAMES = {
    "munkey": "munkey",
    "munkey learn=trees": "munkey, boosted trees on what stays",
    "nearest_neighbours": "nearest neighbours",
    "logistic_regression": "logistic regression, fitted again",
    "boosted_trees": "boosted trees, fitted again",
    PLAIN: "plain network, trained again",
    "rac_delete": "rac_delete",
}
PAPER = {
    "munkey mode=paper": "own value alone",
    "munkey mode=paper own_token_probability=0.5 stop_gradient=false": "half a neighbour's, with its gradient",
    "munkey mode=paper own_token_probability=0.7": "0.3 a neighbour's, without its gradient",
    "munkey mode=paper own_token_probability=0.7 writer=true": "the same with a writer",
}


def methods(found: Found) -> list[str]:
    """All methods after forgetting, without settings of paper mode, and the plain network that is trained again."""
    every = dict.fromkeys(row["method"] for rows in found.values() for row in rows)
    after = [name for name in every if ": " not in name and name not in NAMES and not name.startswith("munkey")]
    return [name for name in NAMES if name in every] + after


def numbers(rows: Rows, method: str, what: str) -> list[float]:
    return [row[what] for row in rows if row["method"] == method]


def by_set(found: Found, names: Sequence[str], cell: Callable[[Rows, str], str]) -> str:
    """One row for each method, one column for each data set."""
    return markdown(("", *found), ((NAMES.get(n, n), *(cell(rows, n) for rows in found.values())) for n in names))


def gap_of(rows: Rows, method: str) -> str:
    """To the own oracle; for the oracle, the floor: the gap of another oracle to it."""
    if method == PLAIN:
        return summary(gaps(rows, f"{PLAIN} again", PLAIN))
    return summary(gaps(rows, method, oracle_of(method)))


def attack_of(rows: Rows, method: str) -> str:
    return summary(attack_gaps(rows, f"{PLAIN} again" if method == PLAIN else method, "attacks"), 1)


def cost(found: Found) -> str:
    """One line for each data set; medians."""
    first = ("", "forget one, ms", "bytes", "first 256 answers after, ms", "256 answers, ms", "neighbours, ms")
    titles = (*first, "plain network, ms", "forget a tenth, s", "in a file, s", "train the plain network again, s")
    lines = []
    for name, rows in found.items():
        own = [row for row in rows if row["method"] == "munkey"]
        one = [statistics.median(row["one"][what] for row in own) for what in ("milliseconds", "bytes", "answer after")]
        times = [statistics.median(numbers(rows, m, "milliseconds")) for m in ("munkey", "nearest_neighbours", PLAIN)]
        seconds = [statistics.median(numbers(rows, "munkey", what)) for what in ("seconds", "seconds in a file")]
        seconds.append(statistics.median(numbers(rows, PLAIN, "seconds")))
        cells = [
            f"{one[0]:.2g}",
            f"{one[1]:,.0f}",
            *(f"{x:.3g}" for x in (one[2], *times)),
            *(f"{s:.2g}" for s in seconds),
        ]
        lines.append((name, *cells))
    return markdown(titles, lines)


def paper(found: Found) -> str:
    """Paper mode: accuracy, gap, gap of the input alone and the worst inside attack, each beside a second oracle's."""
    titles = ("data", "trained beside", "test", "gap", "floor", "gap of the input alone", "floor")
    lines = []
    for name, rows in found.items():
        for method, title in PAPER.items():
            if not (test := numbers(rows, method, "test")):
                continue
            oracle = oracle_of(method)
            again, cells = f"{oracle} again", [name, title, summary(test, 1)]
            for part in (None, "input alone"):
                cells += [summary(gaps(rows, own, oracle, part)) for own in (method, again)]
            cells += [summary(attack_gaps(rows, own, "inside"), 1) for own in (method, again)]
            lines.append(cells)
    return markdown((*titles, "worst inside attack", "floor"), lines)


def filled(page: str, found: Found) -> str:
    """The page with its tables."""
    names = methods(found)
    page = put(page, "accuracy", by_set(found, names, lambda rows, m: summary(numbers(rows, m, "test"), 1)))
    page = put(page, "gap", by_set(found, names, gap_of))
    page = put(page, "attack", by_set(found, names, attack_of))
    page = put(page, "cost", cost(found))
    return put(page, "paper", paper(found))


def results(folder: Path) -> Found:
    """The rows of all data sets."""
    paths = sorted(folder.glob("features-*/results.json"))
    return {path.parent.name.removeprefix("features-"): json.loads(path.read_text())["rows"] for path in paths}


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "unlearning", help="folder of features-*/results.json"
    )
    parser.add_argument("--page", type=Path, default=RESULTS / "unlearning_features.md")
    args = parser.parse_args()
    found = results(args.results)
    args.page.write_text(filled(args.page.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()

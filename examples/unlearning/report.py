"""The table and the picture of unlearning_benchmark.py, from its saved rows."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from munkey import posthoc
from munkey.audit import average_gap

NAMES = ("test", "retain", "forget", "attack")
BY_DESIGN = (
    "munkey",
    "munkey mode=paper",
    "nearest_neighbours",
    "logistic_regression",
    "rac_delete",
    "semi_parametric",
    "sisa",
)


Rows = list[dict[str, Any]]


def pairs(rows: Rows, method: str, oracle: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A method and an oracle for each seed."""
    return [
        (row, other)
        for row in rows
        for other in rows
        if (row["method"], other["method"], row["seed"]) == (method, oracle, other["seed"])
    ]


def gaps(rows: Rows, method: str, oracle: str, part: str | None = None) -> list[float]:
    """The average gap for each seed, in percent; of a part of the model, where it was measured."""
    found = [pair if part is None else [row.get(part, {}) for row in pair] for pair in pairs(rows, method, oracle)]
    return [average_gap(*({n: row[n] for n in NAMES} for row in pair)) for pair in found if all(pair)]


def attack_gaps(rows: Rows, method: str, where: str) -> list[float]:
    """The greatest distance, for each seed, between an attack on a model and the same attack on its oracle."""
    return [
        max(abs(found[0] - oracle[where][name][0]) for name, found in row[where].items())
        for row, oracle in pairs(rows, method, oracle_of(method))
        if where in row
    ]


def oracle_of(method: str) -> str:
    """The oracle of a method's own kind."""
    name = method.partition(": ")[0]
    return f"{name if by_design(name) else 'plain'}: retrained"


def by_design(name: str) -> bool:
    """Return whether a method deletes what it stored, or fits again, and changes no plain network after the fact."""
    return name not in ("plain", *posthoc.__all__)


def summary(numbers: list[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def table(rows: Rows) -> str:
    """Markdown: the smallest gap to the own oracle first, models that did not forget at the end.

    The *worst* attack is the attack farthest from the same attack on the own oracle, in either direction, in percent.
    *Inside* attacks are attacks on the weights. *Input alone*: the gap to the own oracle where both hide the memory, to
    show what weights kept. *Relearned*: see `Task.relearned`.
    """
    head = [*NAMES, "own gap", "plain gap", "input alone", "worst attack", "worst inside", "relearned", "seconds"]
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def order(method: str) -> tuple[bool, float]:
        found = gaps(rows, method, oracle_of(method))
        return ": " in method, statistics.mean(found) if found else 1000.0

    lines = ["| | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for method in sorted(methods, key=order):
        own = [row for row in rows if row["method"] == method]
        cells = [summary([row[name] for row in own]) for name in NAMES]
        cells += [summary(gaps(rows, method, oracle)) for oracle in (oracle_of(method), "plain: retrained")]
        cells.append(summary(gaps(rows, method, oracle_of(method), "input alone")))
        cells += [summary(attack_gaps(rows, method, where)) for where in ("attacks", "inside")]
        cells.append(summary([row["relearned"] for row in own], 3))
        cells.append(f"{statistics.median(row['seconds'] for row in own):.3g}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quality(rows: Rows) -> str:
    """Markdown: what the predictions are worth after forgetting, the most accurate first, and the time of an answer.

    Accuracies and the calibration error are in percent, the log loss in nats, and times, for 256 answers, are medians.
    """
    names = {"test": 1.0, "balanced accuracy": 100.0, "log loss": 1.0, "calibration error": 100.0, "milliseconds": 1.0}
    own = {name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)}
    own = {name: found for name, found in own.items() if ": " not in name and "log loss" in found[0]}
    lines = ["| | accuracy | " + " | ".join(list(names)[1:]) + " |", "| --- " * (len(names) + 1) + "|"]
    for name in sorted(own, key=lambda name: -statistics.mean(row["test"] for row in own[name])):
        cells = [
            summary([factor * row[what] for row in own[name]], 1 if factor > 1 or what == "test" else 3)
            for what, factor in list(names.items())[:-1]
        ]
        cells.append(f"{statistics.median(row['milliseconds'] for row in own[name]):.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if own else ""


def one(rows: Rows) -> str:
    """Markdown: the cost of forgetting one instance, and of the first answers after it; medians."""
    found = [row for row in rows if "one" in row and ": " not in row["method"]]
    lines = ["| | milliseconds | bytes | milliseconds of the first 256 answers after |", "| --- | --- | --- | --- |"]
    for method in dict.fromkeys(row["method"] for row in found):
        own = [row["one"] for row in found if row["method"] == method]
        cells = [f"{statistics.median(each[n] for each in own):.3g}" for n in ("milliseconds", "bytes", "answer after")]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if found else ""


def picture(rows: Rows, path: Path) -> None:
    """Gap to a model trained without the forget set, test accuracy, and seconds to forget, method by method.

    Points are seeds, bars are means. Dotted lines are models trained without; on the left, the gap between two of them.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = {method: gaps(rows, method, oracle_of(method)) for method in dict.fromkeys(row["method"] for row in rows)}
    methods = sorted((m for m in found if ": " not in m and found[m]), key=lambda m: -statistics.mean(found[m]))
    kinds = {method.partition(": ")[0] for method in found}
    colors = {f"{kind}: retrained": "C0" for kind in kinds if kind.startswith("munkey mode=paper")}
    colors["plain: retrained"] = "C1"
    test, seconds = _of(rows, "test"), _of(rows, "seconds")
    panels = [
        ("gap to a model trained without, %\nless is better", found, {o: gaps(rows, f"{o} again", o) for o in colors}),
        ("test accuracy, %\nmore is better", test, test),
        ("seconds to forget\nless is better", seconds, seconds),
    ]
    size = (10, 1.2 + 0.3 * len(methods))
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=size, layout="constrained")
    for axis, (title, measured, lines) in zip(axes, panels, strict=True):
        for place, method in enumerate(methods):
            color = "C0" if by_design(method) else "C1"
            axis.plot(measured[method], [place] * len(measured[method]), "o", color=color, alpha=0.35, markersize=5)
            axis.plot(statistics.mean(measured[method]), place, "|", color=color, markersize=14, markeredgewidth=2.5)
        for oracle, color in colors.items():
            for value in lines.get(oracle, []):
                axis.axvline(value, color=color, linestyle=":", linewidth=1)
        axis.set_xlabel(title)
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(methods)), [method.replace("_", " ") for method in methods])
    axes[0].set_xlim(left=0)
    axes[2].set_xscale("log")
    for color, kind in (("C0", "by design"), ("C1", "after the fact")):
        axes[2].plot([], [], "o", color=color, label=kind)
    axes[2].plot([], [], ":", color="0.4", label="trained without")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _of(rows: Rows, name: str) -> dict[str, list[float]]:
    """One measurement, for each method and seed."""
    return {row["method"]: [own[name] for own in rows if own["method"] == row["method"]] for row in rows}

"""The table and the picture of unlearning_benchmark.py, from the rows it saved."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from munkey.audit import average_gap

NAMES = ("test", "retain", "forget", "attack")
BY_DESIGN = ("munkey", "munkey mode=exact", "rac_delete", "semi_parametric", "nearest_neighbours", "sisa")


Rows = list[dict[str, Any]]


def pairs(rows: Rows, method: str, oracle: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A method and an oracle for each seed."""
    return [
        (row, other)
        for row in rows
        for other in rows
        if (row["method"], other["method"], row["seed"]) == (method, oracle, other["seed"])
    ]


def gaps(rows: Rows, method: str, oracle: str) -> list[float]:
    """The average gap for each seed, in percent."""
    return [average_gap(*({n: row[n] for n in NAMES} for row in pair)) for pair in pairs(rows, method, oracle)]


def attack_gaps(rows: Rows, method: str, where: str) -> list[float]:
    """How far the attack that is farthest from the same attack on the own oracle is from it, for each seed."""
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
    """Whether a method deletes what it stored; munkey does with any settings."""
    return name in BY_DESIGN or name.startswith("munkey ")


def summary(numbers: list[float], digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def table(rows: Rows) -> str:
    """Markdown: the smallest gap to the own oracle first, what was not unlearned at the end.

    The *worst* attack is the one farthest from the same attack on the own oracle, in either direction, in percent;
    *inside* attacks are those on the weights. *Relearned*: see `Task.relearned`.
    """
    head = [*NAMES, "own gap", "plain gap", "worst attack", "worst inside", "relearned", "seconds"]
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def order(method: str) -> tuple[bool, float]:
        found = gaps(rows, method, oracle_of(method))
        return ": " in method, statistics.mean(found) if found else 1000.0

    lines = ["| | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for method in sorted(methods, key=order):
        own = [row for row in rows if row["method"] == method]
        cells = [summary([row[name] for row in own]) for name in NAMES]
        cells += [summary(gaps(rows, method, oracle)) for oracle in (oracle_of(method), "plain: retrained")]
        cells += [summary(attack_gaps(rows, method, where)) for where in ("attacks", "inside")]
        cells.append(summary([row["relearned"] for row in own], 3))
        cells.append(f"{statistics.median(row['seconds'] for row in own):.3g}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: Rows, path: Path) -> None:
    """Gap to the own oracle against test accuracy; the larger a point, the longer it took."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows if ": " not in row["method"]):
        own, found = [row for row in rows if row["method"] == method], gaps(rows, method, oracle_of(method))
        if not found:
            continue
        x, y = statistics.mean(found), statistics.mean(row["test"] for row in own)
        seconds = statistics.median(row["seconds"] for row in own)
        size = 40 * max(1.0, (seconds * 1000)) ** 0.25
        axes.scatter(x, y, s=size, alpha=0.6, color="C0" if by_design(method) else "C1", edgecolor="k", linewidth=0.5)
        axes.annotate(f"{method}\n{seconds:.2g} s", (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    for row in [row for row in rows if row["method"] == "plain: retrained"][:1]:
        axes.axhline(row["test"], color="gray", linestyle=":", linewidth=1, label="retrained without memory")
    axes.set(xlabel="average gap to the own oracle, % (left is better)", ylabel="test accuracy, %", xscale="symlog")
    axes.scatter([], [], color="C0", label="by design")
    axes.scatter([], [], color="C1", label="after the fact")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)

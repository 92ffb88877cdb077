"""Colours that people with any kind of colour vision can distinguish, and the format of percentages.

Source: Paul Tol, "Colour schemes", SRON technical note 2021. Classes have the scheme 'muted', and a grey.
"""

from __future__ import annotations

import numpy as np

from treediff.pictures.summary import TreeSummary

__all__ = ["EMPTY", "GENERATED", "GREY", "INK", "LINE", "PAPER", "REAL", "REFINED", "class_colours", "percent", "rgb"]

PAPER, INK, GREY, LINE, EMPTY = "#ffffff", "#1d232a", "#66707a", "#c3cbd3", "#eef1f4"
GENERATED, REFINED, REAL = "#4477aa", "#225522", "#b8562f"  # these differ in lightness, too

_CLASSES = (
    *("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee"),
    *("#882255", "#44aa99", "#999933", "#aa4499", "#4d4d4d"),
)


def class_colours(summary: TreeSummary) -> dict[int, str]:
    """Choose a colour for each class; of more than ten classes only the ten most frequent have a colour."""
    counts = summary.nodes[0].class_counts
    if counts is None:
        return {}
    frequent = np.argsort(-counts, kind="stable")[: len(_CLASSES)]
    return {int(k): colour for k, colour in zip(sorted(frequent), _CLASSES, strict=False)}


def rgb(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of '#rrggbb'."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def percent(share: float, digits: int = 1) -> str:
    """Format a share from 0 to 1 as a percentage.

    Examples:
        >>> percent(0.1234), percent(1.0), percent(0.00001)
        ('12.3 %', '100 %', '< 0.1 %')
    """
    if 0 < 100 * share < 0.5 * 10**-digits:
        return f"< {10**-digits:g} %"
    text = f"{100 * share:.{digits}f}"
    return ("100" if text.startswith("100") else text) + " %"

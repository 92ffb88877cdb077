"""The linear assignment problem, solved exactly on integers."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Counts: TypeAlias = npt.NDArray[np.int64]


def best_assignment(weights: Counts) -> tuple[Counts, Counts]:
    """Row and column indices of the one-to-one assignment of largest total weight.

    Shortest augmenting paths (Jonker and Volgenant 1987), O(r^2 c) with `r <= c`, exact on integers.
    """
    if weights.shape[0] > weights.shape[1]:
        columns, rows = best_assignment(weights.T)
        return rows, columns
    cost = weights.max() - weights
    row_price, column_price = (np.zeros(size, np.int64) for size in cost.shape)
    row_of = np.full(cost.shape[1], -1)
    for row in range(len(cost)):
        _augment(cost, row, row_price, column_price, row_of)
    columns = np.flatnonzero(row_of >= 0)
    return row_of[columns], columns


def _augment(cost: Counts, start: int, row_price: Counts, column_price: Counts, row_of: Counts) -> None:
    """Match row `start` along the cheapest alternating path; prices and `row_of` change in place.

    Dijkstra over the columns. Prices keep each reduced cost `cost - row_price - column_price` at or above
    zero, and at zero on matched edges, so that walking back along a match is free.
    """
    unreached = np.iinfo(np.int64).max
    distance = np.full(len(row_of), unreached)
    previous = np.full(len(row_of), -1)
    is_open = np.ones(len(row_of), bool)
    row, column, length = start, -1, 0
    while row >= 0:
        through = length + cost[row] - row_price[row] - column_price
        shorter = through < distance
        distance[shorter], previous[shorter] = through[shorter], column
        column = int(np.where(is_open, distance, unreached).argmin())
        length = int(distance[column])
        is_open[column] = False
        row = int(row_of[column])
    reached = ~is_open & (row_of >= 0)
    slack = length - distance[reached]
    row_price[start] += length
    row_price[row_of[reached]] += slack
    column_price[reached] -= slack
    while column >= 0:
        before = int(previous[column])
        row_of[column] = start if before < 0 else row_of[before]
        column = before

"""The doors of growth: settings and data that cannot be meant, each refused with a reason."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from growing import SETTINGS, growth_of, small

from treediff import TreeGrowth

KINDS = ("initial", "settle", "subtree", "intermediate", "final")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_leaves": 0}, ValueError, "max_leaves must be at least 1, found 0"),
        ({"max_leaves": 2.5}, TypeError, "max_leaves must be a whole number, found 2.5"),
        ({"intermediate_every": 0}, ValueError, "intermediate_every must be at least 1, found 0"),
        ({"min_rows": 0}, ValueError, "min_rows must be at least 1, found 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, found 0"),
        ({"views": 0}, ValueError, "views must be at least 1, found 0"),
        ({"cut_rows": 0}, ValueError, "cut_rows must be at least 1, found 0"),
        ({"cut_share": 0.6}, ValueError, "cut_share must be between 0 and 0.5, found 0.6"),
        ({"cut_on": "pixels"}, ValueError, "cut_on must be 'inputs', 'features' or a function, found 'pixels'"),
        ({"keep_cuts": True}, ValueError, "keep_cuts must be one of ['never', 'growth', 'always'], found True"),
        ({"cut_on": 3}, TypeError, "cut_on must be 'inputs', 'features' or a function, found 3"),
        ({"epochs": -1}, ValueError, "epochs must be at least 0, found -1; 0 skips the stage"),
        ({"epochs": 1.5}, TypeError, "epochs must be a whole number, found 1.5"),
        *(({f"{kind}_epochs": -2}, ValueError, f"{kind}_epochs must be at least 0, found -2") for kind in KINDS),
        ({"min_share": 1.0}, ValueError, "min_share must be at least 0 and below 1, found 1.0"),
        ({"min_share": -0.1}, ValueError, "min_share must be at least 0 and below 1, found -0.1"),
        ({"min_share": math.nan}, ValueError, "min_share must be at least 0 and below 1, found nan"),
        ({"threshold": 1}, ValueError, "threshold must be at least 0 and below 1, found 1"),
        (
            {"policy": "biggest"},
            ValueError,
            "policy must be one of ['largest', 'highest_loss', 'highest_entropy'] or a function, found 'biggest'",
        ),
        ({"policy": 3}, TypeError, "policy must be a name or a function, found 3"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        TreeGrowth(small(), **{**SETTINGS, **settings})


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.zeros(5, 2), ValueError, "expected observations of shape (batch, 3), found (5, 2)"),
        (
            torch.zeros(5, 3, dtype=torch.int64),
            TypeError,
            "rows, or images of 8 or 16 bits, found torch.int64",
        ),
        (torch.zeros(5, 3, dtype=torch.float64), TypeError, "expected observations of the dtype of the weights"),
        (torch.full((5, 3), math.nan), ValueError, "observations must be finite, found NaN"),
        (torch.zeros(0, 3), ValueError, "expected at least one row, found none"),
        ([[0.0] * 4], ValueError, "expected observations of shape (batch, 3), found (1, 4)"),
    ],
)
def test_data_are_checked(data: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    growth = growth_of(small())
    with pytest.raises(error, match=re.escape(message)):
        next(growth.stages(data))
    assert growth.history == []

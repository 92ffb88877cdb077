"""Distances to retrained models against closed forms, loops, and an independent library."""

from __future__ import annotations

import math
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from scipy.stats import ks_2samp
from stores import seeded

from munkey.audit import average_gap, kl_of_margins, kolmogorov_smirnov, tug_of_war

SHARES = st.fixed_dictionaries({name: st.floats(0, 1) for name in ("test", "retain", "forget")})


@given(SHARES, SHARES)
def test_gap_and_tug_of_war(found: dict[str, float], oracle: dict[str, float]) -> None:
    differences = [abs(found[name] - oracle[name]) for name in found]
    assert average_gap(found, oracle) == pytest.approx(sum(differences) / 3)
    assert tug_of_war(found, oracle) == pytest.approx(
        (1 - differences[0]) * (1 - differences[1]) * (1 - differences[2])
    )
    assert average_gap(oracle, oracle) == 0 and tug_of_war(oracle, oracle) == 1


@pytest.mark.parametrize("function", [average_gap, tug_of_war])
def test_metrics_must_be_the_same(function: type[average_gap]) -> None:
    for found, oracle in (({}, {}), ({"test": 1.0}, {}), ({"test": 1.0}, {"forget": 1.0})):
        with pytest.raises(ValueError, match=re.escape(f"expected the same metrics of both, found {sorted(found)}")):
            function(found, oracle)


def test_accuracies_must_be_shares() -> None:
    with pytest.raises(ValueError, match=re.escape("accuracies must be from 0 to 1, found test 90.0 and 0.9")):
        tug_of_war({"test": 90.0}, {"test": 0.9})


def test_kolmogorov_smirnov_is_that_of_an_independent_library() -> None:
    found = torch.randn(13, 8, generator=seeded(0)).round(decimals=1)
    oracle = (torch.randn(9, 8, generator=seeded(1)) + torch.arange(8) / 4).round(decimals=1)
    got = kolmogorov_smirnov(found, oracle)
    expected = [ks_2samp(found[:, n], oracle[:, n]).statistic for n in range(8)]
    assert got.each.tolist() == pytest.approx(expected) and got.mean == pytest.approx(sum(expected) / 8)


def test_kolmogorov_smirnov_ends() -> None:
    x = torch.randn(5, 3, generator=seeded(0))
    assert kolmogorov_smirnov(x, x[[3, 0, 4, 1, 2]]).mean == 0
    assert kolmogorov_smirnov(x, x + 100).mean == 1


def test_kl_counts_in_bins() -> None:
    found, oracle = torch.randn(30, 4, generator=seeded(0)), torch.randn(20, 4, generator=seeded(1)) + 0.5
    got = kl_of_margins(found, oracle, bins=5, floor=0.01)
    for n in range(4):
        both = torch.cat([found[:, n], oracle[:, n]]).double()
        low, high = both.min().item(), both.max().item()
        p, q = (
            [(count / len(side) + 0.01) / 1.05 for count in torch.histc(side[:, n].double(), 5, low, high).tolist()]
            for side in (found, oracle)
        )
        assert got.each[n].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert got.mean == pytest.approx(got.each.mean().item())


def test_kl_ends() -> None:
    x = torch.randn(6, 3, generator=seeded(0))
    assert kl_of_margins(x, x.flip(0)).mean == 0
    assert kl_of_margins(torch.ones(2, 1), torch.ones(3, 1)).mean == 0
    far = kl_of_margins(x, x + 1000, bins=2, floor=0.5).mean
    assert far == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))


def test_kl_of_two_gaussians() -> None:
    """`d**2 / 2`, but for the width of bins and the floor."""
    found, oracle = torch.randn(2, 400_000, 1, generator=seeded(0))
    assert kl_of_margins(found + 0.5, oracle, bins=200, floor=1e-7).mean == pytest.approx(0.125, abs=0.005)


@pytest.mark.parametrize("function", [kl_of_margins, kolmogorov_smirnov])
def test_bad_models(function: type[kl_of_margins]) -> None:
    x = torch.ones(2, 3)
    for other in (x[:, :2], x[0], x[:0]):
        with pytest.raises(
            ValueError, match=re.escape("expected values (models, n) of the same instances, found (2, 3)")
        ):
            function(x, other)
    with pytest.raises(ValueError, match="values of models must be finite, found NaN or infinity"):
        function(x, x / 0)


def test_bad_numbers() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="bins must be at least 2, found 1"):
        kl_of_margins(x, x, bins=1)
    with pytest.raises(ValueError, match="floor must be above 0, found 0"):
        kl_of_margins(x, x, floor=0)

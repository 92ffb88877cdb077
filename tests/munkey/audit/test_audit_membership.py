"""Membership inference against closed forms, an independent library, and loops that follow the definitions."""

from __future__ import annotations

import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from sklearn.metrics import roc_auc_score, roc_curve
from stores import seeded
from torch import Tensor

from munkey.audit import area_under_curve, attack, membership_scores

SCORES = st.lists(st.sampled_from([-7.0, -2.0, -0.5000001, -0.5, -0.1, 0.0]), min_size=1, max_size=30)


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_rates_are_those_of_an_independent_library(members: list[float], others: list[float], fpr: float) -> None:
    truth, scores = np.array([1] * len(members) + [0] * len(others)), np.array(members + others)
    got = attack(wide(members), wide(others), fpr=fpr, resamples=1)
    assert got.auc == pytest.approx(roc_auc_score(truth, scores))
    assert area_under_curve(wide(members), wide(others)) == pytest.approx(got.auc)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert got.tpr == pytest.approx(true[false <= fpr].max())
    assert area_under_curve(wide(others), wide(members)) == pytest.approx(1 - got.auc)


@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0])
def test_two_gaussians(distance: float) -> None:
    """`Phi(d / sqrt 2)`, and at 1 % false positives `Phi(d - z)` with `Phi(z) = 0.99`."""
    normal, count = torch.distributions.Normal(0.0, 1.0), 200_000
    members, others = torch.randn(2, count, generator=seeded(0))
    got = attack(members + distance, others, resamples=20)
    assert got.auc == pytest.approx(float(normal.cdf(torch.tensor(distance / math.sqrt(2)))), abs=0.004)
    assert got.tpr == pytest.approx(float(normal.cdf(distance - normal.icdf(torch.tensor(0.99)))), abs=0.01)


def test_intervals_cover_the_truth() -> None:
    """95 of 100, give or take 2.5 standard deviations and what the bootstrap of 60 instances lacks."""
    expected, covered = 0.7602, 0  # Phi(1 / sqrt 2)
    for trial in range(100):
        members, others = torch.randn(2, 60, generator=seeded(trial))
        low, high = attack(members + 1, others, resamples=200).auc_interval
        covered += low <= expected <= high
    assert 88 <= covered <= 99


def test_intervals_are_those_of_drawing_again() -> None:
    """A loop that draws rows and asks for both rates anew gives the same quantiles up to chance."""
    members, others = torch.randn(2, 40, generator=seeded(0))
    members = (members + 0.7).round(decimals=1)
    got = attack(members, others.round(decimals=1), fpr=0.1, resamples=4000)
    found, generator = [], seeded(5)
    for _ in range(2000):
        ours, theirs = (x[torch.randint(40, (40,), generator=generator)] for x in (members, others.round(decimals=1)))
        again = attack(ours, theirs, fpr=0.1, resamples=1)
        found.append((again.auc, again.tpr))
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    assert (got.auc_interval[0], got.auc_interval[1]) == pytest.approx((low[0], high[0]), abs=0.02)
    assert (got.tpr_interval[0], got.tpr_interval[1]) == pytest.approx((low[1], high[1]), abs=0.06)


def test_an_attack_is_the_same_each_time_and_for_any_size_of_its_parts() -> None:
    members, others = torch.randn(2, 30_000, generator=seeded(0))
    one, two = (attack(members, others, resamples=70, generator=seeded(3)) for _ in range(2))
    assert one.auc_interval == two.auc_interval and one.auc_interval[0] < one.auc < one.auc_interval[1]
    assert one.auc_interval != attack(members, others, resamples=70, generator=seeded(4)).auc_interval
    assert torch.equal(one.members, members) and torch.equal(one.others, others)


def test_scores_follow_their_definitions() -> None:
    logits, labels = 3 * torch.randn(20, 4, generator=seeded(0)), torch.arange(20) % 4
    got = membership_scores(logits, labels)
    for n, (row, y) in enumerate(zip(logits.double().softmax(1).tolist(), labels.tolist(), strict=True)):
        assert got["confidence"][n].item() == pytest.approx(math.log(max(row)))
        assert got["loss"][n].item() == pytest.approx(math.log(row[y]))
        assert got["entropy"][n].item() == pytest.approx(sum(p * math.log(p) for p in row))
        rest = sum(p * math.log(1 - p) for i, p in enumerate(row) if i != y)
        assert got["modified entropy"][n].item() == pytest.approx((1 - row[y]) * math.log(row[y]) + rest)


def test_scores_of_sure_models_stay_apart() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0], [61.0, 0.0, 0.0], [0.0, 80.0, 0.0]])
    got = membership_scores(logits, torch.tensor([0, 0, 0]))
    assert all(score.isfinite().all() for score in got.values())
    for name in ("confidence", "loss", "entropy", "modified entropy"):
        assert got[name][1] > got[name][0], name
    assert got["loss"][0].item() == pytest.approx(-2 * math.exp(-60))
    assert got["modified entropy"][2].item() == pytest.approx(-160 + math.log(2), rel=1e-9)


def test_scores_of_several_models_at_once() -> None:
    logits, labels = torch.randn(2, 5, 7, 3, generator=seeded(0)), torch.arange(7) % 3
    got = membership_scores(logits, labels)
    for name, score in membership_scores(logits[1, 2], labels).items():
        assert torch.equal(got[name][1, 2], score)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 1), torch.tensor([torch.nan])])
def test_bad_scores(bad: Tensor) -> None:
    for name, given_ in (("members", (bad, torch.ones(1))), ("others", (torch.ones(1), bad))):
        finite = "" if bad.isfinite().all() else ", not all finite"
        message = re.escape(f"expected finite scores (n,) of some {name}, found {tuple(bad.shape)}{finite}")
        for function in (attack, area_under_curve):
            with pytest.raises(ValueError, match=message):
                function(*given_)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match=re.escape("fpr must be between 0 and 1, found 1.5")):
        attack(torch.ones(1), torch.ones(1), fpr=1.5)
    with pytest.raises(ValueError, match="resamples must be at least 1, found 0"):
        attack(torch.ones(1), torch.ones(1), resamples=0)


def test_bad_logits() -> None:
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for bad, found in ((logits, labels[:2]), (logits[:, :1], labels), (logits[0], labels)):
        with pytest.raises(
            ValueError, match=re.escape("expected logits (..., n, classes) of at least two classes and")
        ):
            membership_scores(bad, found)
    with pytest.raises(ValueError, match="logits must be finite, found NaN or infinity"):
        membership_scores(logits + torch.nan, labels)
    with pytest.raises(TypeError, match=re.escape("expected labels of torch.int64, found torch.int32")):
        membership_scores(logits, labels.int())
    with pytest.raises(ValueError, match="labels must be from 0 to 1, found 0 to 2"):
        membership_scores(logits, torch.tensor([0, 1, 2]))

"""Attacks with reference models against loops that follow the papers, and against an independent library."""

from __future__ import annotations

import math
import re
from statistics import NormalDist, mean, stdev, variance

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from stores import seeded
from torch import Tensor

from munkey.audit import (
    area_under_curve,
    classifier_scores,
    confidence_features,
    lira_scores,
    margins,
    rmia_scores,
)


def test_margins_are_logits_of_the_label_against_all_others() -> None:
    logits, labels = 5 * torch.randn(4, 9, 3, generator=seeded(0)), torch.arange(9) % 3
    p = logits.double().softmax(-1).gather(-1, labels.expand(4, 9)[..., None]).squeeze(-1)
    torch.testing.assert_close(margins(logits, labels), p.logit())
    sure = margins(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]))
    assert sure.item() == pytest.approx(100 - math.log(2))


def test_lira_is_a_ratio_of_two_normal_densities() -> None:
    found = torch.randn(6, generator=seeded(0))
    members, others = 2 + torch.randn(5, 6, generator=seeded(1)), torch.randn(7, 6, generator=seeded(2))
    members[:2, 3] = torch.nan
    got = lira_scores(found, members, others)
    for n in range(6):
        sides = [[v for v in side[:, n].tolist() if not math.isnan(v)] for side in (members, others)]
        inside, outside = (NormalDist(mean(side), stdev(side)) for side in sides)
        expected = math.log(inside.pdf(found[n].item())) - math.log(outside.pdf(found[n].item()))
        assert got[n].item() == pytest.approx(expected)


def test_lira_with_one_variance_for_all() -> None:
    found, others = torch.zeros(3), torch.randn(4, 3, generator=seeded(0))
    members = others + torch.tensor([1.0, 2.0, 3.0])
    shared = mean(variance(others[:, n].tolist()) for n in range(3))
    expected = [(others[:, n].mean() ** 2 - members[:, n].mean() ** 2).item() / (2 * shared) for n in range(3)]
    assert lira_scores(found, members, others, shared_variance=True).tolist() == pytest.approx(expected)


def test_lira_beats_one_threshold_where_instances_differ() -> None:
    """Margins of instance n are `N(a_n + 1, 1)` for members: the ratio finds `Phi(1 / sqrt 2)`, a threshold nothing."""
    count, models = 4000, 64
    base, draw = 10 * torch.randn(count, generator=seeded(0)), seeded(1)
    members, others = (base + shift + torch.randn(models, count, generator=draw) for shift in (1.0, 0.0))
    truth = torch.arange(count) < count // 2
    found = base + truth + torch.randn(count, generator=draw)
    scores = lira_scores(found, members, others, shared_variance=True)
    best = NormalDist().cdf(1 / math.sqrt(2))
    assert area_under_curve(scores[truth], scores[~truth]) == pytest.approx(best, abs=0.02)
    assert area_under_curve(found[truth], found[~truth]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("gamma", "offline"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.3), (0.5, 0.0)])
def test_rmia_follows_its_definition(gamma: float, offline: float) -> None:
    draws = [torch.rand(*shape, generator=seeded(n)) for n, shape in enumerate([(8,), (3, 8), (5,), (3, 5)])]
    got = rmia_scores(*(p.log() for p in draws), gamma=gamma, offline=offline)
    own, references, population, theirs = (p.double() for p in draws)

    def ratio(p: Tensor, q: Tensor) -> float:
        return float(p) / (((1 + offline) * float(q.mean()) + 1 - offline) / 2)

    for n in range(8):
        x = ratio(own[n], references[:, n])
        won = [x / ratio(population[z], theirs[:, z]) >= gamma for z in range(5)]
        assert got[n].item() == pytest.approx(sum(won) / 5)


def test_rmia_of_an_instance_beside_itself_wins_at_gamma_one() -> None:
    own, references = torch.tensor([0.25, 0.5]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert rmia_scores(own, references, own, references).tolist() == [0.5, 1.0]


def test_confidence_features_are_sorted_and_end_with_that_of_the_label() -> None:
    got = confidence_features(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2])).exp()
    logp = torch.tensor([3.0, 2.0, 1.0, 2.0], dtype=torch.float64) - math.log(sum(math.exp(v) for v in (1, 2, 3)))
    torch.testing.assert_close(got, logp.exp()[None])


def test_classifier_is_that_of_an_independent_library() -> None:
    members = torch.randn(300, 4, generator=seeded(0)) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 0.4
    others = torch.randn(120, 4, generator=seeded(1)) * torch.tensor([1.0, 3.0, 0.1, 2.0])
    asked = torch.randn(50, 4, generator=seeded(2))
    (got,) = classifier_scores(members, others, asked, penalty=0.01)
    known = np.concatenate([members, others]).astype(np.float64)
    scaler = StandardScaler().fit(known)
    # There the sum of losses is taken, each weighted by n / (2 n_class), beside half the squared weights over C.
    line = LogisticRegression(C=1 / (420 * 0.01), class_weight="balanced", tol=1e-10, max_iter=1000)
    line.fit(scaler.transform(known), [1] * 300 + [0] * 120)
    expected = line.decision_function(scaler.transform(asked.double().numpy()))
    assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_feature_that_never_changes_is_no_reason_to_fail() -> None:
    x = torch.cat([torch.randn(20, 1, generator=seeded(0)), torch.ones(20, 1)], 1)
    (both,) = classifier_scores(x[:10] + torch.tensor([1.0, 0.0]), x[10:], x)
    (alone,) = classifier_scores(x[:10, :1] + 1, x[10:, :1], x[:, :1])
    torch.testing.assert_close(both, alone)


def test_bad_references() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=re.escape("expected finite margins (n,) of the model under attack, found (1, 3)")
    ):
        lira_scores(ones[:1], ones, ones)
    with pytest.raises(ValueError, match=re.escape("expected margins (models, 3) of others, found (2, 2)")):
        lira_scores(ones[0], torch.randn(2, 3, generator=seeded(0)), ones[:, :2])
    with pytest.raises(ValueError, match="expected two models or more for each instance among members, found 1"):
        lira_scores(ones[0], ones[:1], ones)
    with pytest.raises(
        ValueError, match="margins of members do not vary over models; train these with different seeds"
    ):
        lira_scores(ones[0], ones, ones)
    log = torch.full((2, 3), -1.0)
    with pytest.raises(ValueError, match="gamma must be above 0, found 0"):
        rmia_scores(log[0], log, log[0], log, gamma=0)
    with pytest.raises(ValueError, match="offline must be between 0 and 1, found 2"):
        rmia_scores(log[0], log, log[0], log, offline=2)
    with pytest.raises(ValueError, match=re.escape("expected population (n,) and references (models, n), found")):
        rmia_scores(log[0], log, log[0], log[0])
    with pytest.raises(ValueError, match="log-probabilities of found must be at most 0, found greater ones or NaN"):
        rmia_scores(ones[0], log, log[0], log)
    with pytest.raises(ValueError, match="expected the same reference models twice, found 2 and 1"):
        rmia_scores(log[0], log, log[0], log[:1])
    with pytest.raises(ValueError, match=re.escape("expected finite features (n, 3) of others, found (2, 2)")):
        classifier_scores(ones, ones[:, :2])
    with pytest.raises(ValueError, match="expected known members and known others, found 2 and 0"):
        classifier_scores(ones, ones[:0])

"""Forget sets against loops that follow their definitions."""

from __future__ import annotations

import re

import pytest
import torch
from stores import seeded
from torch.nn import functional as F

from munkey.audit.forget_sets import at_random, cluster, low_density, memorised, mislabelled, of_class


def test_at_random() -> None:
    rows = at_random(10, 4, generator=seeded(0))
    assert len(set(rows.tolist())) == 4 and set(rows.tolist()) <= set(range(10))
    assert torch.equal(rows, at_random(10, 4, generator=seeded(0)))
    assert sorted(at_random(5, 5, generator=seeded(1)).tolist()) == [0, 1, 2, 3, 4]


def test_of_class() -> None:
    assert of_class(torch.tensor([2, 0, 2, 1]), 2).tolist() == [0, 2]
    with pytest.raises(ValueError, match="there is no instance of class 3"):
        of_class(torch.tensor([2, 0]), 3)


def test_cluster_is_what_is_most_alike() -> None:
    keys = torch.randn(30, 3, generator=seeded(0)) * torch.arange(1, 31)[:, None]
    cosines = F.cosine_similarity(keys.double(), keys[7].double(), dim=1)
    expected = sorted(range(30), key=lambda n: -cosines[n])[:6]
    assert cluster(keys, 7, 6).tolist() == expected and expected[0] == 7


def test_low_density_is_what_is_least_alike() -> None:
    keys = torch.randn(40, 4, generator=seeded(0))
    cosines = F.cosine_similarity(keys[:, None].double(), keys[None].double(), dim=2)
    means = [sum(sorted((cosines[n, m].item() for m in range(40) if m != n), reverse=True)[:5]) / 5 for n in range(40)]
    assert low_density(keys, 7, neighbours=5).tolist() == sorted(range(40), key=lambda n: means[n])[:7]


def test_memorised_is_known_only_where_seen() -> None:
    right, seen = (torch.rand(12, 9, generator=seeded(n)) > 0.5 for n in (0, 1))
    scores = []
    for n in range(9):
        inside, outside = right[seen[:, n], n].double(), right[~seen[:, n], n].double()
        scores.append((inside.mean() - outside.mean()).item())
    expected = sorted(range(9), key=lambda n: -scores[n])[:5]
    assert memorised(right, seen, 5).tolist() == expected


def test_mislabelled_are_wrong_and_the_others_right() -> None:
    labels = torch.arange(3000) % 3
    rows, wrong = mislabelled(labels, 1000, 3, generator=seeded(0))
    changed = (wrong != labels).nonzero().squeeze(1)
    assert torch.equal(changed, rows.sort().values)
    shifts = ((wrong - labels) % 3)[rows].bincount(minlength=3)
    assert shifts[0] == 0 and abs(int(shifts[1]) - 500) < 60, "each wrong label is as likely"
    assert torch.equal(labels, torch.arange(3000) % 3), "the labels given are left as they are"


def test_bad_input() -> None:
    keys, labels = torch.randn(5, 2, generator=seeded(0)), torch.zeros(5, dtype=torch.int64)
    for function in (
        lambda: at_random(5, 6, generator=seeded(0)),
        lambda: cluster(keys, 0, 6),
        lambda: low_density(keys, 6, neighbours=1),
        lambda: mislabelled(labels, 6, 2, generator=seeded(0)),
        lambda: memorised(torch.ones(2, 5).bool(), torch.eye(2, 5).bool(), 6),
    ):
        with pytest.raises(ValueError, match="count must be from 1 to 5, found 6"):
            function()
    with pytest.raises(ValueError, match="neighbours must be from 1 to 4, found 5"):
        low_density(keys, 1, neighbours=5)
    with pytest.raises(ValueError, match="a wrong label needs two classes or more, found 1"):
        mislabelled(labels, 1, 1, generator=seeded(0))
    with pytest.raises(ValueError, match=re.escape("expected (models, n) twice, found (2, 5) and (5,)")):
        memorised(torch.ones(2, 5).bool(), torch.ones(5).bool(), 1)
    with pytest.raises(ValueError, match="each instance must be seen by some models and not by others"):
        memorised(torch.ones(2, 5).bool(), torch.ones(2, 5).bool(), 1)

"""The audit against definitions and an independent library."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from classifiers import filled, images, labels
from hypothesis import given
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from munkey.audit import average_gap, instance_losses, loss_attack

LOSSES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5000001, 2.0, 7.0]), min_size=1, max_size=30)


@given(LOSSES, LOSSES)
def test_the_attack_is_the_area_under_its_curve(members: list[float], others: list[float]) -> None:
    truth = np.array([1] * len(members) + [0] * len(others))
    expected = roc_auc_score(truth, -np.array(members + others))
    got = loss_attack(torch.tensor(members, dtype=torch.float64), torch.tensor(others, dtype=torch.float64))
    assert got == pytest.approx(expected)
    swapped = loss_attack(torch.tensor(others, dtype=torch.float64), torch.tensor(members, dtype=torch.float64))
    assert got + swapped == pytest.approx(1.0)


def test_losses_are_those_of_each_instance() -> None:
    built = filled().train()
    x, y = images(9, seed=2), labels(9, seed=2)
    got = instance_losses(built, x, y, batch_size=4)
    assert built.training
    built.eval()
    torch.testing.assert_close(got, F.cross_entropy(built(x), y, reduction="none"))
    assert torch.equal(got, instance_losses(built, x, y, keys=built.key_encoder(x), batch_size=4))


def test_gap() -> None:
    oracle = {"test": 90.0, "retain": 99.0, "forget": 89.0, "attack": 50.0}
    assert average_gap(oracle, oracle) == 0
    assert average_gap({**oracle, "attack": 54.0, "test": 88.0}, oracle) == pytest.approx(1.5)
    for other in ({}, {"test": 1.0}):
        with pytest.raises(ValueError, match="expected the same metrics of both, found"):
            average_gap(oracle, other)
    with pytest.raises(ValueError, match="expected the same metrics of both"):
        average_gap({}, {})


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.zeros(2, 1), torch.tensor([torch.nan])])
def test_bad_losses(bad: Tensor) -> None:
    for given_, name in (((bad, torch.ones(1)), "members"), ((torch.ones(1), bad), "others")):
        with pytest.raises(
            ValueError, match=re.escape(f"expected finite losses (n,) of some {name}, found {tuple(bad.shape)}")
        ):
            loss_attack(*given_)

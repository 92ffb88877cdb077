"""Principal components, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from worlds import seeded

from treediff.layers import PrincipalComponents

ROWS = torch.randn(300, 7, generator=seeded(0)) @ torch.randn(7, 7, generator=seeded(1)) + 100


@pytest.mark.parametrize("components", [1, 4, 7])
@pytest.mark.parametrize("whiten", [False, True])
def test_they_are_those_of_scikit_learn(components: int, whiten: bool) -> None:
    known = PCA(components, whiten=whiten, svd_solver="full").fit(ROWS.numpy())
    expected = torch.from_numpy(known.transform(ROWS.numpy())).float()
    if whiten:
        expected *= (len(ROWS) / (len(ROWS) - 1)) ** 0.5  # there the variance is divided by n - 1
    else:
        expected /= expected.var(0, correction=0).mean().sqrt()
    found = PrincipalComponents.fit(ROWS, components, whiten=whiten, batch_size=64)(ROWS)
    torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.var(0, correction=0).mean(), torch.tensor(1.0))


def test_the_result_does_not_depend_on_batches_or_signs() -> None:
    first, second = (PrincipalComponents.fit(ROWS, 3, batch_size=size)(ROWS) for size in (300, 7))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    mirrored = PrincipalComponents.fit(200 - ROWS, 3)
    torch.testing.assert_close(mirrored(200 - ROWS), -first, rtol=1e-3, atol=1e-3)


def test_columns_without_variance_stay_finite() -> None:
    rows = torch.cat([ROWS[:, :2], torch.ones(300, 2)], 1)
    found = PrincipalComponents.fit(rows, 4, whiten=True)(rows)
    assert found.isfinite().all() and found[:, 2:].abs().max() < 1


@pytest.mark.parametrize(
    ("rows", "components", "message"),
    [
        (ROWS, 8, "7 features have at most as many components, found components=8"),
        (ROWS[:1], 1, r"expected at least two rows \(N, D\), found shape \(1, 7\)"),
        (torch.rand(4, 1, 3, 3), 1, "expected at least two rows"),
        (torch.ones(4, 3), 1, "expected rows that differ, found rows that are all alike"),
    ],
)
def test_misfits_are_refused(rows: torch.Tensor, components: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrincipalComponents.fit(rows, components)


def test_arrays_are_rows() -> None:
    found = PrincipalComponents.fit(np.asarray(ROWS), 2)(ROWS)
    torch.testing.assert_close(found, PrincipalComponents.fit(ROWS, 2)(ROWS))

"""What GaussianMixture refuses; its answers are tested by test_gaussian_tree.py."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from treediff.testing import GaussianMixture


def mixture(weights: int, means: tuple[int, ...], covariances: tuple[int, ...]) -> Callable[[], object]:
    return lambda: GaussianMixture(torch.zeros(weights), torch.zeros(means), torch.zeros(covariances))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            mixture(2, (1, 3), (1, 3, 3)),
            "expected log_weights (K,), means (K, F), covariances (K, F, F); found",
        ),
        (mixture(2, (1, 3), (1, 3, 3)), "found [(2,), (1, 3), (1, 3, 3)]"),
        (mixture(1, (3,), (1, 3, 3)), "expected log_weights (K,)"),
        (mixture(1, (1, 3), (1, 3)), "expected log_weights (K,)"),
        (mixture(2, (2, 3), (2, 3, 3)), "positive definite; the covariances of components [0, 1] are not"),
    ],
)
def test_errors_teach(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()

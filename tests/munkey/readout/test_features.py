"""Features are whole numbers that depend on their own key alone, and are close to what they stand for."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import seeded

from munkey.readout import Features, FourierFeatures, ReLUFeatures, UnitFeatures

KINDS: list[Features] = [UnitFeatures(7), FourierFeatures(7, width=11), ReLUFeatures(7, width=11)]
each_kind = pytest.mark.parametrize("features", KINDS, ids=lambda kind: type(kind).__name__)


@each_kind
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), exponent=st.integers(-60, 60))
def test_a_feature_depends_on_its_own_key_to_the_bit(features: Features, seed: int, count: int, exponent: int) -> None:
    keys = torch.randn(count, 7, generator=seeded(seed)) * 2.0**exponent
    found = features(keys)
    assert found.dtype == torch.float64 and torch.equal(found, found.round())
    assert float(found.abs().max()) <= 2**features.bits
    assert all(torch.equal(features(key[None])[0], row) for key, row in zip(keys, found, strict=True))


def test_unit_features_are_keys_of_length_one() -> None:
    keys = torch.randn(50, 30, generator=seeded(), dtype=torch.float64)
    expected = keys / keys.norm(dim=1, keepdim=True)
    torch.testing.assert_close(UnitFeatures(30)(keys) / 2**15, expected, rtol=0, atol=0.51 / 2**15)
    assert not UnitFeatures(3)(torch.zeros(1, 3)).any()


def test_products_of_fourier_features_are_a_gaussian_kernel() -> None:
    features = FourierFeatures(5, width=20_000, scale=1.5)
    keys = torch.nn.functional.normalize(torch.randn(6, 5, generator=seeded(), dtype=torch.float64))
    found = features(keys) / 2**features.bits
    kernel = (-(1.5**2) * torch.cdist(keys, keys).square() / 2).exp()
    torch.testing.assert_close(2 * found @ found.T / 20_000, kernel, rtol=0, atol=0.03)


def test_relu_features_are_positive_parts_of_a_projection() -> None:
    features = ReLUFeatures(5, width=9, scale=0.2)
    keys = torch.nn.functional.normalize(torch.randn(6, 5, generator=seeded(), dtype=torch.float64))
    expected = (keys @ features.weight.double() / 2**10).clamp(0, 1)
    torch.testing.assert_close(features(keys) / 2**features.bits, expected, rtol=0, atol=2e-3)


def test_weights_are_whole_numbers_in_any_precision_of_a_model() -> None:
    for kind in (FourierFeatures(4, width=3), ReLUFeatures(4, width=3)):
        keys = torch.randn(5, 4, generator=seeded())
        expected = kind(keys)
        assert torch.equal(kind.to(torch.bfloat16)(keys), expected)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="features have at most 15 bits, so that their sums are exact; found 16"):
        UnitFeatures(3, bits=16)
    with pytest.raises(ValueError, match=re.escape("scale must be above 0, and 64 at most, found 0.0")):
        FourierFeatures(3, width=2, scale=0.0)
    with pytest.raises(ValueError, match="key_width must be at least 1"):
        UnitFeatures(0)

"""Fréchet distances against scipy's matrix square root, closed forms and what must not change them."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from strategies import quick
from torch import Tensor
from worlds import seeded

from treediff.metrics import FeatureStatistics, frechet_bootstrap, frechet_distance

seeds = st.integers(0, 10**6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Nothing symmetric: every direction has a variance of its own, and a mean."""
    return normal(rows, features, seed=seed) @ normal(features, features, seed=seed + 1) + normal(
        features, seed=seed + 2
    )


def exactly(mean: Tensor, covariance: Tensor) -> FeatureStatistics:
    return FeatureStatistics(3, mean.double(), 2 * covariance.double())


def by_scipy(real: Tensor, generated: Tensor) -> float:
    """The formula as it stands, with numpy's moments and the square root of a matrix that is not symmetric."""
    a, b = real.numpy(), generated.numpy()
    s, t = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = np.asarray(sqrtm(s @ t))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * np.trace(root).real)


def rotation(features: int, seed: int) -> Tensor:
    matrix: Tensor = torch.linalg.qr(normal(features, features, seed=seed)).Q
    return matrix


# --- statistics -----------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 30), st.integers(1, 5), seeds)
def test_moments_are_those_of_numpy(rows: int, features: int, seed: int) -> None:
    x = correlated(rows + 1, features, seed)
    found = FeatureStatistics.of(x)
    assert found.count == rows + 1
    np.testing.assert_allclose(found.mean, x.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.atleast_2d(np.cov(x.numpy(), rowvar=False)), rtol=1e-9, atol=1e-10)


@quick
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.randoms(use_true_random=False), seeds)
def test_batches_add_up_to_all_rows_in_any_order(sizes: list[int], random: Random, seed: int) -> None:
    x = correlated(sum(sizes), 3, seed) + 1e4  # far from 0, where sums of squares would lose their digits
    parts = [FeatureStatistics.of(batch) for batch in x.split(sizes)]
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append(parts.pop() + parts.pop())
    (found,), whole = parts, FeatureStatistics.of(x)
    assert found.count == whole.count == len(x)
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_one_row_adds_nothing_but_itself() -> None:
    """Chan's formula by hand: 1 and 4 beside 7, then a row of each."""
    pair, one = FeatureStatistics.of(torch.tensor([[1.0], [4.0]])), FeatureStatistics.of(torch.tensor([[7.0]]))
    assert (one.count, one.mean.item(), one.scatter.item()) == (1, 7, 0)
    both = pair + one
    assert (both.count, both.mean.item(), both.scatter.item()) == (3, 4, 18)
    assert both.covariance.item() == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_computed_in_float64(dtype: torch.dtype) -> None:
    x = (correlated(50, 4) + 100).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = FeatureStatistics.of(x)
    expected = FeatureStatistics.of(x.double())
    assert found.mean.dtype == found.scatter.dtype == torch.float64 and not found.scatter.requires_grad
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.scatter, expected.scatter)


# --- the distance: oracles ------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 20), seeds)
def test_equals_scipy(features: int, more_real: int, more_generated: int, seed: int) -> None:
    real = correlated(features + 2 + more_real, features, seed)
    generated = correlated(features + 2 + more_generated, features, seed + 9)
    # The root of the product loses half of the digits of its smallest eigenvalues.
    assert frechet_distance(real, generated) == pytest.approx(by_scipy(real, generated), rel=1e-5, abs=1e-5)


def test_equals_scipy_on_features_as_wide_as_a_network_has_them() -> None:
    real, generated = correlated(400, 128), correlated(300, 128, seed=5)
    assert frechet_distance(real, generated) == pytest.approx(by_scipy(real, generated), rel=1e-9)


@quick
@given(st.lists(st.tuples(*[st.floats(0, 10)] * 4), min_size=1, max_size=6))
def test_diagonal_covariances_in_closed_form(numbers: list[tuple[float, ...]]) -> None:
    """`sum (m - n)^2 + (s - t)^2`, with zeros among the standard deviations."""
    m, n, s, t = torch.tensor(numbers, dtype=torch.float64).T
    found = frechet_distance(exactly(m, s.square().diag()), exactly(n, t.square().diag()))
    # A variance of a 1e-15th of the largest is taken for none.
    assert found == pytest.approx(float(((m - n) ** 2 + (s - t) ** 2).sum()), rel=1e-9, abs=1e-5)


def test_one_dimension_in_closed_form() -> None:
    real, generated = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[0.0], [10.0]])
    s, t = math.sqrt(7), math.sqrt(50)
    assert frechet_distance(real, generated) == pytest.approx(4 + (s - t) ** 2, rel=1e-14)


def test_covariances_that_commute_in_closed_form() -> None:
    """`S_b = 9 S_a` in any basis: `tr (S_a S_b)^(1/2) = 3 tr S_a`."""
    x = correlated(40, 7)
    centered = x - x.mean(0)
    expected = 4 * centered.square().sum() / 39
    assert frechet_distance(centered, 3 * centered) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [2, 3, 20])
def test_fewer_rows_than_features(rows: int) -> None:
    """Rows in a corner of 60 dimensions: what counts is their span, where scipy has nothing singular to take."""
    span = min(rows - 1, 5)
    real, generated = correlated(rows, span), correlated(rows, span, seed=7)
    wide = rotation(60, seed=3)[:span]
    found = frechet_distance(real @ wide, generated @ wide)
    assert found == pytest.approx(by_scipy(real, generated), rel=1e-9)


def test_spans_at_right_angles_share_nothing() -> None:
    x, y = correlated(4, 3), correlated(5, 3, seed=4)
    none = torch.zeros_like
    real, generated = torch.cat([x, none(x)], 1), torch.cat([none(y), y], 1)
    expected = sum((r - r.mean(0)).square().sum() / (len(r) - 1) + r.mean(0).square().sum() for r in (x, y))
    assert frechet_distance(real, generated) == pytest.approx(float(expected), rel=1e-12)


def test_rows_that_are_all_the_same_have_a_mean_only() -> None:
    same = torch.ones(3, 2)
    assert frechet_distance(same, same + 1) == 2
    assert frechet_distance(same, torch.tensor([[1.0, 3.0], [1.0, -1.0]])) == pytest.approx(8)


# --- the distance: properties ---------------------------------------------------------------------------------


@quick
@given(st.integers(2, 12), st.integers(1, 6), seeds)
def test_turning_and_moving_both_changes_nothing(rows: int, features: int, seed: int) -> None:
    real, generated = correlated(rows, features, seed), correlated(rows + 1, features, seed + 9)
    turn, move = rotation(features, seed), 10 * normal(features, seed=seed + 1)
    expected = frechet_distance(real, generated)
    assert frechet_distance(real @ turn + move, generated @ turn + move) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert frechet_distance(3 * real, 3 * generated) == pytest.approx(9 * expected, rel=1e-9, abs=1e-9)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@quick
@given(st.integers(2, 12), st.integers(1, 8), seeds)
def test_never_below_zero_and_zero_for_the_same(rows: int, features: int, seed: int) -> None:
    x = correlated(rows, features, seed)
    assert 0 <= frechet_distance(x, x) <= 1e-12 * x.square().sum().item()
    assert frechet_distance(x, x.flip(0)) >= 0
    assert frechet_distance(x, x + 1) == pytest.approx(features, rel=1e-9)


def test_statistics_and_rows_are_the_same_to_it() -> None:
    real, generated = correlated(30, 4), correlated(20, 4, seed=3)
    expected = frechet_distance(real, generated)
    assert frechet_distance(FeatureStatistics.of(real), generated) == expected
    assert frechet_distance(real, FeatureStatistics.of(generated)) == expected
    batches = reduce(add, map(FeatureStatistics.of, generated.split(7)))
    assert frechet_distance(real, batches) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(real.float(), generated.float()) == pytest.approx(expected, rel=1e-5)
    assert isinstance(expected, float)


# --- the bootstrap --------------------------------------------------------------------------------------------


def test_interval_is_that_of_resampling_row_by_row() -> None:
    """The slow definition with numpy's moments, on the row numbers the generator gives."""
    real, generated = correlated(40, 3), correlated(25, 3, seed=3)
    found = frechet_bootstrap(real, generated, rounds=11, level=0.8, generator=seeded(4))
    generator, distances = seeded(4), []
    for _ in range(11):
        rows = torch.randint(25, (25,), generator=generator).tolist()
        distances.append(by_scipy(real, torch.stack([generated[row] for row in rows])))
    # 11 rounds: the 10 % and 90 % points are the second smallest and the second largest.
    shift = by_scipy(real, generated) - sum(distances) / 11
    assert found == pytest.approx((sorted(distances)[1] + shift, sorted(distances)[-2] + shift), rel=1e-6)
    with_statistics = frechet_bootstrap(
        FeatureStatistics.of(real), generated, rounds=11, level=0.8, generator=seeded(4)
    )
    assert with_statistics == found


def test_interval_covers_a_mean_far_off_as_often_as_it_says() -> None:
    """One feature, the generated mean far from a real point mass: d^2 = mean^2 + variance, nearly unbiased."""
    real, inside = torch.zeros(2, 1), 0
    for seed in range(100):
        generated = 10 + normal(40, 1, seed=seed)
        low, high = frechet_bootstrap(real, generated, rounds=60, level=0.8, generator=seeded(seed))
        assert 0 <= low < high
        inside += low <= 101 <= high
    assert 65 < inside < 93  # 80 expected, three standard deviations of 4 to either side, and a little more below


def test_the_interval_lies_around_the_distance() -> None:
    """With many features and few rows, resampled distances alone would all lie above it."""
    real, generated = correlated(400, 30), correlated(60, 30)
    low, high = frechet_bootstrap(real, generated, generator=seeded(4))
    assert low < frechet_distance(real, generated) < high


def test_a_wider_level_is_a_wider_interval_and_no_randomness_is_left() -> None:
    real, generated = correlated(40, 3), correlated(25, 3, seed=3)
    intervals = [frechet_bootstrap(real, generated, level=p, generator=seeded(1)) for p in (0.5, 0.9, 0.9)]
    (low, high), (lower, higher), again = intervals
    assert lower < low < high < higher and again == (lower, higher)
    assert frechet_bootstrap(real, generated, level=0.9, generator=seeded(2)) != again


def test_equal_rows_leave_nothing_to_resample() -> None:
    low, high = frechet_bootstrap(correlated(9, 2), torch.ones(5, 2), rounds=3)
    assert low == pytest.approx(high) == pytest.approx(frechet_distance(correlated(9, 2), torch.ones(5, 2)))


def test_a_generator_keeps_the_global_state() -> None:
    before = torch.get_rng_state()
    frechet_bootstrap(correlated(9, 2), correlated(9, 2, seed=3), rounds=3, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


# --- errors ---------------------------------------------------------------------------------------------------

ROWS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (np.ones((3, 2)), TypeError, r"expected features as a tensor \(n, F\), found ndarray; torch.as_tensor"),
        (ROWS.long(), TypeError, r"expected floating-point features, found torch.int64; call .float\(\)"),
        (
            torch.ones(3),
            ValueError,
            r"expected one row of features per image, \(n, F\), found shape \(3,\); .flatten\(1\)",
        ),
        (torch.ones(3, 2, 1, 1), ValueError, r"expected one row of .*found shape \(3, 2, 1, 1\)"),
        (torch.ones(3, 0), ValueError, r"expected one row of .*found shape \(3, 0\)"),
        (ROWS / 0, ValueError, r"expected finite features, found NaN or infinity; check the images"),
        (ROWS * math.nan, ValueError, r"expected finite features"),
    ],
)
def test_refuses_features(features: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=f"^features: {message}"):
        FeatureStatistics.of(features)
    with pytest.raises(error, match=f"^real: {message}"):
        frechet_distance(features, ROWS)
    for score in (frechet_distance, frechet_bootstrap):
        with pytest.raises(error, match=f"^generated: {message}"):
            score(ROWS, features)


def test_refuses_widths_that_differ() -> None:
    wide = torch.ones(3, 5)
    for score in (frechet_distance, frechet_bootstrap):
        with pytest.raises(ValueError, match="real and generated features of one width, found 2 and 5; take both from"):
            score(ROWS, wide)
    with pytest.raises(ValueError, match="statistics of the same features, found widths 2 and 5; take both from one"):
        FeatureStatistics.of(ROWS) + FeatureStatistics.of(wide)


@pytest.mark.parametrize("count", [0, 1])
def test_refuses_too_few_rows(count: int) -> None:
    few = torch.ones(count, 2)
    message = f"a covariance needs at least two rows of features, found {count}; add more images"
    for real, generated in ((few, ROWS), (ROWS, few)):
        with pytest.raises(ValueError, match=message):
            frechet_distance(real, generated)
        with pytest.raises(ValueError, match=message):
            frechet_bootstrap(real, generated)


def test_refuses_statistics_that_are_none() -> None:
    mean, scatter = torch.zeros(2).double(), torch.zeros(2, 2).double()
    for count, m, s, found in (
        (-1, mean, scatter, r"found count -1, torch.float64 of shape \(2,\)"),
        (3, mean.float(), scatter, r"found count 3, torch.float32 of shape \(2,\) and torch.float64"),
        (3, mean, scatter[0], r"torch.float64 of shape \(2,\); FeatureStatistics.of\(features\) builds the statistics"),
        (3, mean[None], scatter, r"torch.float64 of shape \(1, 2\) and"),
    ):
        with pytest.raises(ValueError, match=r"float64 mean \(F,\) and a float64 scatter \(F, F\); .*" + found):
            FeatureStatistics(count, m, s)


def test_refuses_statistics_where_rows_are_resampled() -> None:
    with pytest.raises(TypeError, match=r"generated: expected features as a tensor .* found FeatureStatistics"):
        frechet_bootstrap(ROWS, FeatureStatistics.of(ROWS))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rounds", "level"), [(0, 0.9), (10, 0.0), (10, 1.0), (10, math.nan), (-1, 0.5)])
def test_refuses_rounds_and_levels(rounds: int, level: float) -> None:
    message = f"rounds must be at least 1 and level above 0 and below 1, found rounds={rounds} and level={level}"
    with pytest.raises(ValueError, match=message):
        frechet_bootstrap(ROWS, ROWS, rounds=rounds, level=level)


@pytest.mark.parametrize("settings", [{"rounds": 2.5}, {"rounds": "many"}, {"level": "95%"}])
def test_refuses_what_is_no_number(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="rounds must be a whole number and level a number, found"):
        frechet_bootstrap(ROWS, ROWS, **settings)

"""Fréchet distance between two sets of features: how far generated images are from real images, as Gaussians.

Letters: `n` rows, one per image; `F` features; `r` rank of a covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Self

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "frechet_bootstrap", "frechet_distance"]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of features, in float64; `+` adds batches.

    Statistics of batches add up to the statistics of all rows, in any order and up to rounding. So the rows never have
    to be in memory at once:

        n = n_a + n_b        mean = mean_a + (n_b / n) d        scatter = scatter_a + scatter_b + (n_a n_b / n) d d^T

    with `d = mean_b - mean_a`. A batch may have one row, or none.

    Args:
        count: number of rows `n`.
        mean: `(F,)` float64, in units of the features; zeros where there is no row.
        scatter: `(F, F)` float64, `sum_i (x_i - mean) (x_i - mean)^T`, in squared units of the features.

    Raises:
        ValueError: if count is negative, or mean and scatter are not float64 of these shapes.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Examples:
        >>> rows = torch.arange(6.0).view(3, 2)
        >>> total = FeatureStatistics.of(rows[:1]) + FeatureStatistics.of(rows[1:])
        >>> total.count, total.mean.tolist(), total.covariance.tolist()
        (3, [2.0, 3.0], [[4.0, 4.0], [4.0, 4.0]])
    """

    count: int
    mean: Tensor
    scatter: Tensor

    def __post_init__(self) -> None:
        found = [(tuple(t.shape), t.dtype) for t in (self.mean, self.scatter)]
        width = self.mean.numel()
        if self.count < 0 or found != [((width,), torch.float64), ((width, width), torch.float64)]:
            raise ValueError(
                "expected a count of at least 0, a float64 mean (F,) and a float64 scatter (F, F); found count "
                f"{self.count}, {found[0][1]} of shape {found[0][0]} and {found[1][1]} of shape {found[1][0]}; "
                "FeatureStatistics.of(features) builds the statistics"
            )

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Compute the statistics of one batch.

        Args:
            features: `(n, F)`, floating point; computed in float64 whatever the dtype.

        Raises:
            TypeError: if features is not a tensor or not floating point.
            ValueError: if features has another number of axes, or holds NaN or infinity.
        """
        _check_features(features)
        rows = features.detach().double()
        mean = rows.sum(0) / max(len(rows), 1)
        centered = rows - mean
        return cls(len(rows), mean, centered.mT @ centered)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance `scatter / (n - 1)`, `(F, F)`.

        Raises:
            ValueError: if there are fewer than two rows.
        """
        _check_count(self.count)
        return self.scatter / (self.count - 1)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"expected statistics of the same features, found widths {len(self.mean)} and {len(other.mean)}; "
                "take both from one network"
            )
        count = self.count + other.count
        share = other.count / max(count, 1)
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + self.count * share * torch.outer(step, step)
        return FeatureStatistics(count, self.mean + share * step, scatter)


def frechet_distance(real: Tensor | FeatureStatistics, generated: Tensor | FeatureStatistics) -> float:
    r"""Return the squared Fréchet distance between Gaussians fitted to two sets of features.

        d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2})

    With `S_a = A A^T` and `S_b = B B^T` from their eigendecompositions, `tr (S_a S_b)^{1/2}` is the sum of the singular
    values of `A^T B`. There are no complex numbers and nothing is added to the diagonal, so covariances of fewer rows
    than features are allowed.

    With features of the Inception network this is the FID. With features of a custom classifier, such as
    `FeatureClassifier`, the distance orders models in the same way, but its values hold for that classifier only.

    Args:
        real: `(n, F)` features of real images, or their statistics.
        generated: `(m, F)` features of generated images, or their statistics; `m` may differ from `n`.

    Returns:
        A number of at least 0, in squared units of the features; **lower is better**, and 0 means that means and
        covariances agree. Few rows make the distance too large, by about 1/n + 1/m times a constant. So compare models
        at the same number of rows, and with the distance between two sets of real images.

    Raises:
        TypeError: if an input is neither features nor statistics, or features are not floating point.
        ValueError: if features are not `(n, F)`, not finite or of different widths, or there are fewer than two rows.

    Source: Heusel et al., "GANs trained by a two time-scale update rule" (arXiv 1706.08500), eq. 6.

    Examples:
        >>> rows = torch.tensor([[0.0], [2.0]])  # variance 2
        >>> round(frechet_distance(rows, 3 * rows + 1), 6)  # 3^2 + (3 sqrt(2) - sqrt(2))^2
        17.0
    """
    a, b = _statistics("real", real), _statistics("generated", generated)
    _check_pair(a, b)
    return _distance(a.mean, _root(a.covariance), b)


def frechet_bootstrap(
    real: Tensor | FeatureStatistics,
    generated: Tensor,
    *,
    rounds: int = 100,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Estimate an interval of the Fréchet distance by resampling generated images; the real images stay the same.

    Each round draws `m` of the `m` generated rows with replacement. Resampled rows repeat, which moves all distances up
    by about as much as the finite number of rows already did. This shift is subtracted, so that the interval lies
    around `frechet_distance` of all rows:

        d^2 + quantiles of (d^2_r - mean of d^2_r over the rounds r)

    The interval shows how much the distance depends on the images that happened to be drawn. The bias of a finite
    number of rows stays in the interval: compare models at the same number of rows.

    Args:
        real: `(n, F)` features of real images, or their statistics.
        generated: `(m, F)` features of generated images; rows, since statistics cannot be resampled.
        rounds: number of resamplings; each costs the statistics of `m` rows and one eigendecomposition.
        level: share of the rounds inside the interval, above 0 and below 1.
        generator: source of the resampling; PyTorch's default generator if not given.

    Returns:
        `(low, high)` in squared units of the features, `high` at least 0; lower is better.

    Raises:
        TypeError: as `frechet_distance`; or if generated is not a tensor, or rounds is not a whole number.
        ValueError: as `frechet_distance`; or if rounds is below 1 or the level is out of range.

    Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> real, generated = torch.randn(2, 200, 3, generator=generator)
        >>> low, high = frechet_bootstrap(real, generated + 2, generator=generator)
        >>> low < frechet_distance(real, generated + 2) < high
        True
    """
    if not isinstance(rounds, Integral) or not isinstance(level, Real):
        raise TypeError(f"rounds must be a whole number and level a number, found {rounds!r} and {level!r}")
    if rounds < 1 or not 0 < level < 1:
        raise ValueError(
            f"rounds must be at least 1 and level above 0 and below 1, found rounds={rounds} and level={level}"
        )
    _check_features(generated, "generated")  # statistics, which _statistics would let pass, have no rows
    a, b = _statistics("real", real), FeatureStatistics.of(generated)
    _check_pair(a, b)
    root, n = _root(a.covariance), b.count
    distances = []
    for _ in range(rounds):
        rows = _resample(n, generator).to(generated.device)
        distances.append(_distance(a.mean, root, FeatureStatistics.of(generated[rows])))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    deviations = torch.tensor(distances, dtype=torch.float64)
    low, high = (deviations - deviations.mean()).quantile(tails).add(_distance(a.mean, root, b)).tolist()
    return low, high


def _root(covariance: Tensor) -> Tensor:
    """Return `A`, `(F, r)`, with `A A^T` the covariance.

    Eigenvalues of the size of rounding errors are left out: their square roots would not be small.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def _distance(mean: Tensor, root: Tensor, other: FeatureStatistics) -> float:
    other_root = _root(other.covariance)
    shift = (mean - other.mean).square().sum()
    shared = torch.linalg.svdvals(root.mT @ other_root).sum()
    squared = float(shift + root.square().sum() + other_root.square().sum() - 2 * shared)
    return max(0.0, squared)  # equal statistics may miss 0 by rounding


def _resample(n: int, generator: torch.Generator | None) -> Tensor:
    """Draw `n` row numbers with replacement, on the generator's device."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(n, (n,), generator=generator, device=device)


def _statistics(name: str, given: Tensor | FeatureStatistics) -> FeatureStatistics:
    if isinstance(given, FeatureStatistics):
        return given
    _check_features(given, name)
    return FeatureStatistics.of(given)


def _check_features(features: Tensor, name: str = "features") -> None:
    if not isinstance(features, Tensor):
        raise TypeError(
            f"{name}: expected features as a tensor (n, F), found {type(features).__name__}; torch.as_tensor(x) makes "
            "one of an array"
        )
    if not features.is_floating_point():
        raise TypeError(f"{name}: expected floating-point features, found {features.dtype}; call .float()")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name}: expected one row of features per image, (n, F), found shape {tuple(features.shape)}; "
            ".flatten(1) makes rows of maps"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name}: expected finite features, found NaN or infinity; check the images they come from")


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs at least two rows of features, found {count}; add more images")


def _check_pair(real: FeatureStatistics, generated: FeatureStatistics) -> None:
    if real.mean.shape != generated.mean.shape:
        raise ValueError(
            f"expected real and generated features of one width, found {len(real.mean)} and {len(generated.mean)}; "
            "take both from one network"
        )
    _check_count(min(real.count, generated.count))

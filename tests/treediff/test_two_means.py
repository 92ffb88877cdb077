"""Two clusters: against an independent k-means, by symmetry, and on points that cannot be told apart."""

import pytest
import torch
from sklearn.cluster import KMeans

from treediff.two_means import two_means


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_where_lloyds_algorithm_of_another_library_stays(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(300, 5, generator=generator) + 2 * torch.randn(300, 1, generator=generator).sign()
    side = two_means(points)
    centres = torch.stack([points[~side].mean(0), points[side].mean(0)])
    other = KMeans(2, init=centres.numpy(), n_init=1).fit(points.numpy())
    assert torch.equal(torch.as_tensor(other.labels_).bool(), side)


def test_unbalanced_clusters_are_found_although_the_start_is_balanced() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 3, 2, 2, generator=generator)
    points[:40] += 12
    side = two_means(points)
    assert torch.equal(side, side[0] == (torch.arange(400) < 40))


def test_points_that_are_all_alike_stay_together() -> None:
    assert len(two_means(torch.ones(6, 3)).unique()) == 1


def test_one_point_is_an_error() -> None:
    with pytest.raises(ValueError, match="two clusters need at least 2 points, found 1"):
        two_means(torch.zeros(1, 3))

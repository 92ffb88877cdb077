"""Nearest neighbours: against another library, and against every distance written out."""

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from treediff.growth.cut import nearest_neighbours


@pytest.mark.parametrize("n", [2, 50, 4500])  # the last takes two tiles each way
def test_another_library_finds_the_same(n: int) -> None:
    points = torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.double)
    k = min(7, n - 1)
    other = NearestNeighbors(n_neighbors=k).fit(points.numpy()).kneighbors(return_distance=False)
    assert torch.equal(nearest_neighbours(points, k), torch.from_numpy(other))


def test_a_point_is_as_near_as_its_nearest_view() -> None:
    generator = torch.Generator().manual_seed(0)
    points, *views = torch.randn(4, 60, 3, generator=generator, dtype=torch.double)
    away = torch.stack([torch.cdist(look, points) for look in (points, *views)]).amin(0).fill_diagonal_(torch.inf)
    assert torch.equal(nearest_neighbours(points, 5, views=views), away.argsort(1)[:, :5])


def test_points_on_one_another_are_neighbours_but_none_is_its_own() -> None:
    found = nearest_neighbours(torch.ones(30, 2), 4)
    assert found.shape == (30, 4)
    assert not (found == torch.arange(30)[:, None]).any()
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_bad_counts_and_shapes_are_errors() -> None:
    for count, points in ((4, torch.zeros(4, 2)), (0, torch.zeros(4, 2)), (1, torch.zeros(4))):
        with pytest.raises(ValueError, match=rf"{count} nearest neighbours need points of shape \(n, D\)"):
            nearest_neighbours(points, count)
    with pytest.raises(ValueError, match=r"views have the shape of the points, \(4, 2\); found \[\(3, 2\)\]"):
        nearest_neighbours(torch.zeros(4, 2), 1, views=[torch.zeros(3, 2)])

"""The normalised cut: against every cut of small graphs, another library, and clusters that k-means cannot part."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import SpectralClustering
from sklearn.datasets import make_circles, make_moons

from treediff.growth.cut import _graph, _second_eigenvector, nearest_neighbours, normalized_cut
from treediff.metrics import cluster_accuracy


def affinity(points: torch.Tensor, neighbours: int) -> torch.Tensor:
    """The graph as a matrix."""
    points = points - points.mean(0)
    graph = _graph(nearest_neighbours(points, neighbours), points.double())
    return torch.zeros(len(points), len(points), dtype=torch.double).index_put_(
        (graph.i, graph.j), graph.weight, accumulate=True
    )


def quotient(weight: torch.Tensor, side: torch.Tensor) -> float:
    """`cut / vol(A) + cut / vol(B)`, written out."""
    cut = sum(float(weight[i, j]) for i in range(len(side)) for j in range(len(side)) if side[i] and not side[j])
    return sum(cut / float(weight[half].sum()) for half in (side, ~side))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_cut_of_a_small_graph_is_better_by_much(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(9, 2, generator=generator) + 4 * (torch.arange(9) % 2)[:, None]
    weight = affinity(points, 4)
    sides = (torch.tensor(bits) for bits in itertools.product([False, True], repeat=9))
    best = min(quotient(weight, side) for side in sides if 0 < side.sum() < 9)
    found = quotient(weight, normalized_cut(points, neighbours=4, min_share=0.0))
    assert best <= found + 1e-6
    # Cheeger: the relaxed problem is never far off; with two blobs it is exact but for ties.
    assert found <= 1.2 * best + 1e-6


@pytest.mark.parametrize("make", [make_moons, make_circles])
def test_clusters_of_any_shape_are_found(make: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    settings = {"factor": 0.3} if make is make_circles else {}
    points, label = make(600, noise=0.04, random_state=0, **settings)
    side = normalized_cut(torch.from_numpy(points))
    assert cluster_accuracy(torch.from_numpy(label), side.long()) == 1


def test_it_agrees_with_another_library_on_the_same_graph() -> None:
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(300, 5, generator=generator)
    points[:110] += 2.5
    other = SpectralClustering(2, affinity="precomputed", random_state=0).fit(affinity(points, 10).numpy())
    side = normalized_cut(points)
    assert cluster_accuracy(torch.from_numpy(other.labels_).long(), side.long()) >= 0.98


def test_a_small_cluster_far_away_is_cut_off_only_if_its_share_is_large_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(400, 3, 2, 2, generator=generator)
    points[:30] += 12
    small = torch.arange(400) < 30
    free, bound = (normalized_cut(points, min_share=share) for share in (0.05, 0.2))
    assert torch.equal(free, free[0] == small)
    assert bound.sum().item() in range(80, 321)


def test_the_answer_depends_on_nothing_but_the_points() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert torch.equal(normalized_cut(points), normalized_cut(points.double()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_few_points_and_points_that_are_all_alike_are_cut_all_the_same(n: int) -> None:
    assert 0 < normalized_cut(torch.arange(n).float()[:, None]).sum() < n
    assert 0 < normalized_cut(torch.ones(n, 2)).sum() < n


def test_bad_points_and_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="two clusters need at least 2 points, found 1"):
        normalized_cut(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"views have the shape of the points, \(4, 2\); found \(4, 1\)"):
        normalized_cut(torch.zeros(4, 2), views=[torch.zeros(4, 1)])
    with pytest.raises(ValueError, match="points must be finite"):
        normalized_cut(torch.tensor([[0.0], [torch.nan]]))
    for settings in ({"neighbours": 0}, {"components": 0}, {"min_share": 0.6}):
        with pytest.raises(ValueError, match="min_share between 0 and"):
            normalized_cut(torch.zeros(4, 1), **settings)


@pytest.mark.parametrize("seed", range(6))
def test_among_clusters_that_no_edge_joins_the_widest_gap_is_cut(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(4, (400,), generator=generator)
    corners = torch.tensor([[0.0, 0.0], [0.0, 3.0], [5.0, 0.0], [5.0, 3.0]])
    points = corners[which] + 0.1 * torch.randn(400, 2, generator=generator)
    side = normalized_cut(points)
    assert torch.equal(side ^ side[0], (which >= 2) ^ (which[0] >= 2))


def test_views_decide_which_differences_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = 2 * torch.pi * torch.rand(600, generator=generator)
    radius = torch.where(torch.arange(600) % 2 == 0, 1.0, 3.0) + 0.1 * torch.randn(600, generator=generator)
    turned = torch.stack([angle + turn for turn in (0.0, *(2 * torch.pi * torch.rand(6, 600, generator=generator)))])
    points, *views = radius[:, None] * torch.stack([turned.cos(), turned.sin()], -1)
    # Two halves far apart, each holding points of both radii; only what a turn leaves alone can part the radii.
    which = torch.rand(600, generator=generator) < 0.5
    apart = torch.stack([torch.where(which, 20.0, 0.0), torch.zeros(600)], 1)
    points = points + apart
    plain = normalized_cut(points)
    assert torch.equal(plain ^ plain[0], which ^ which[0])
    moved = [
        view + torch.where(torch.rand(600, generator=generator) < 0.5, 20.0, 0.0)[:, None] * torch.tensor([1.0, 0])
        for view in views
    ]
    seen = normalized_cut(points, views=iter(moved))
    assert torch.equal(seen ^ seen[0], (radius > 2) ^ (radius[0] > 2))


def test_more_dimensions_than_components_are_projected_on_those_that_vary_most() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 4, generator=generator)
    points[:100] += 6
    turn = torch.linalg.qr(torch.randn(90, 90, generator=generator)).Q[:4]
    faint = 1e-3 * torch.randn(300, 90, generator=generator)
    assert torch.equal(normalized_cut(points @ turn + faint, components=4), normalized_cut(points))


@pytest.mark.parametrize("n", [40, 300])
def test_the_second_eigenvector_is_that_of_a_dense_solver(n: int) -> None:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    graph = _graph(nearest_neighbours(points, 6), points.double())
    root = graph.times(torch.ones(n, dtype=torch.double)).sqrt()
    dense = affinity(points, 6) / (root[:, None] * root)
    want = torch.linalg.eigh(dense).eigenvectors[:, -2]
    assert abs(float(_second_eigenvector(graph, root) @ want)) > 1 - 1e-8


@pytest.mark.parametrize(("rows", "share", "least"), [(3, 0.5, 1), (7, 0.5, 3), (29, 0.05, 2), (8, 0.5, 4)])
def test_each_side_has_at_least_its_share(rows: int, share: float, least: int) -> None:
    points = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01])
    points[0] += 100  # alone, if it were allowed
    side = normalized_cut(points, neighbours=2, min_share=share)
    assert min(int(side.sum()), int((~side).sum())) >= least

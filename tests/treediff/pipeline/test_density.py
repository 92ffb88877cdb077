"""Densities of paths: fitted against closed forms, drawn against a loop over images and the moments of a mixture."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import GROWN, KINDS, PRUNED, build, observations
from scipy import stats
from torch import Tensor
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.noise import combine_seeds, counter_normal, counter_uniform, seed_from
from treediff.pipeline.density import LeafDensity
from treediff.treevae.prior import TreeSample

TREES = {"lone root": TreeTopology.balanced(0), "chain": TreeTopology.chain(2), "grown": GROWN, "pruned": PRUNED}
each_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
CLOSE = {"rtol": 1e-8, "atol": 1e-9}  # in float64, where a product over more rows may add in another order


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def filled_density(
    model: TreeVAE, *, components: int = 3, seed: int = 5, dtype: torch.dtype | None = None
) -> LeafDensity:
    """Every number different; every other leaf has one component less, and the first of all leaves a small share."""
    density = LeafDensity(model.topology, model.latent, components, dtype=dtype or torch.float64)
    on_path = density.factors.diagonal(dim1=-2, dim2=-1) > 0  # in a new density
    generator = seeded(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    density.shares.copy_(draw(density.shares).softmax(0))
    weights = draw(density.weights).softmax(1)
    weights[1::2, -1] = 0
    density.weights.copy_(weights / weights.sum(1, keepdim=True))
    density.means.copy_(draw(density.means) * on_path)
    lower = torch.tril(0.5 * draw(density.factors), -1) + torch.diag_embed(0.3 + draw(density.means).abs())
    density.factors.copy_(lower * on_path[..., None] * on_path[..., None, :])
    return density


# --- drawing ------------------------------------------------------------------------------------------------


def pick(shares: list[float], point: float) -> int:
    """Counted through one by one."""
    point *= sum(shares)
    for i, share in enumerate(shares):
        if point < share:
            return i
        point -= share
    raise AssertionError("the point lies past the last share")


def slow_draw(
    density: LeafDensity, model: TreeVAE, node: int, seed: int, index: int, temperature: float
) -> tuple[int, Tensor, Tensor]:
    """One image: its leaf, the latents on the way, and the picture by the leaf's own decoder."""
    tree, who = model.topology, torch.tensor([index])
    points = [float(counter_uniform(seed, who, draw=draw, dtype=torch.float64)) for draw in (0, 1)]
    below = [leaf for leaf in tree.leaves if node in tree.path(leaf)]
    leaf = below[pick([float(density.shares[tree.leaves.index(leaf)]) for leaf in below], points[0])]
    k = tree.leaves.index(leaf)
    m = pick(density.weights[k].tolist(), points[1])
    noise = counter_normal(seed, who, density.means.shape[2:], draw=2, dtype=torch.float64)[0]
    z = (density.means[k, m] + temperature * density.factors[k, m] @ noise).view(-1, *model.latent)
    z = z[: len(tree.path(leaf))]
    return leaf, z, model.likelihood.mean(model.banks.decoders.module(leaf)(z[-1:]))[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@each_tree
def test_equals_a_loop_over_images(tree: TreeTopology, kind: str) -> None:
    model = build(tree, kind)
    density, seed = filled_density(model), combine_seeds(seed_from(seeded(1)), 2)
    for node in {tree.root, tree.leaves[-1], tree.path(tree.leaves[-1])[-1 - (len(tree) > 1)]}:
        found = density.sample(model, 9, node=node, temperature=0.7, first_index=4, generator=seeded(1))
        steps = max(len(tree.path(leaf)) for leaf in tree.leaves_under(node))
        assert found.path.shape == (9, steps) and found.z.shape == (9, steps, *model.latent)
        for i in range(9):
            leaf, z, picture = slow_draw(density, model, node, seed, 4 + i, 0.7)
            assert found.leaf[i] == leaf
            assert found.path[i].tolist() == [*tree.path(leaf), *[-1] * (steps - len(z))]
            close(found.z[i, : len(z)], z)
            assert not found.z[i, len(z) :].any()
            close(found.images[i], picture)


@pytest.mark.parametrize("leaf", GROWN.leaves)
def test_latents_have_the_moments_of_the_mixture(leaf: int) -> None:
    model, n = build(GROWN), 40_000
    density, k = filled_density(model), GROWN.leaves.index(leaf)
    numbers = len(GROWN.path(leaf)) * 2
    weights, means = density.weights[k], density.means[k, :, :numbers]
    factors = density.factors[k, :, :numbers, :numbers]
    mean = weights @ means
    inner = factors @ factors.mT + (means - mean)[:, :, None] * (means - mean)[:, None]
    covariance = torch.einsum("m,mij->ij", weights, inner)
    z = density.sample(model, n, node=leaf, generator=seeded(3)).z.flatten(1)
    variance = covariance.diagonal()
    assert ((z.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    products = (z - mean)[:, :, None] * (z - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / n**0.5).all()
    # The mixture is none of its components, and no single Gaussian of the wrong covariance would pass.
    assert (covariance - torch.diag_embed(variance)).abs().max() > 0.1


@pytest.mark.parametrize("node", GROWN.ids)
def test_leaves_are_as_frequent_as_their_shares_below_a_node(node: int) -> None:
    model, n = build(GROWN), 20_000
    density = filled_density(model)
    leaf = density.sample(model, n, node=node, generator=seeded(4)).leaf.tolist()
    shares = {k: float(density.shares[i]) for i, k in enumerate(GROWN.leaves) if node in GROWN.path(k)}
    assert set(leaf) == set(shares)
    expected = [n * share / sum(shares.values()) for share in shares.values()]
    assert len(shares) == 1 or stats.chisquare([leaf.count(k) for k in shares], expected).pvalue > 1e-6


def test_components_are_as_frequent_as_their_weights_and_drawn_apart_from_leaves() -> None:
    model, n = build(GROWN), 20_000
    density = filled_density(model)
    density.factors.zero_()  # so that a latent tells its component
    drawn = density.sample(model, n, generator=seeded(5))
    for k, leaf in enumerate(GROWN.leaves):
        z = drawn.z[drawn.leaf == leaf].flatten(1)[:, 0]
        counts = [int(torch.isclose(z, mean).sum()) for mean in density.means[k, :, 0]]
        assert sum(counts) == len(z)
        for count, weight in zip(counts, density.weights[k].tolist(), strict=True):
            assert abs(count - len(z) * weight) <= 5 * (len(z) * weight * (1 - weight)) ** 0.5


@pytest.mark.parametrize("node", [0, 2, 5])
def test_an_image_does_not_depend_on_its_batch(node: int) -> None:
    model = build(GROWN, "mlp")
    density = filled_density(model)
    whole = density.sample(model, 40, node=node, generator=seeded(6))
    for first, n in ((0, 1), (17, 3), (39, 1), (5, 30), (40, 0)):
        part = density.sample(model, n, node=node, first_index=first, generator=seeded(6))
        rows = slice(first, first + n)
        assert torch.equal(part.leaf, whole.leaf[rows]) and torch.equal(part.path, whole.path[rows])
        close(part.z, whole.z[rows])
        close(part.images, whole.images[rows])
    other = density.sample(model, 40, node=node, generator=seeded(7))
    assert not torch.isclose(other.z[:, 0], whole.z[:, 0]).any()


def test_one_decoder_runs_per_image() -> None:
    model, counts = build(GROWN, "mlp"), []
    density = filled_density(model)
    model.banks.decoders.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    density.sample(model, 11, generator=seeded())
    assert counts == [11]


def test_at_temperature_0_every_latent_is_the_mean_of_a_component() -> None:
    model = build(PRUNED, "maps")
    density = filled_density(model)
    cold, warm = (density.sample(model, 30, temperature=t, generator=seeded(8)) for t in (0, 1.0))
    assert torch.equal(cold.leaf, warm.leaf)
    for z, leaf in zip(cold.z.flatten(1), cold.leaf.tolist(), strict=True):
        means = density.means[PRUNED.leaves.index(leaf)]
        assert (means == z).all(1).any()


def test_the_seed_says_all_and_global_state_is_left_alone() -> None:
    model = build(GROWN)
    density, state = filled_density(model), torch.get_rng_state()
    generator = seeded(1)
    first, second, again = (density.sample(model, 4, generator=g) for g in (generator, generator, seeded(1)))
    assert torch.equal(first.z, again.z) and not torch.isclose(first.z[:, 0], second.z[:, 0]).any()
    assert torch.equal(torch.get_rng_state(), state)
    # The prior and the second stage draw other numbers from the same seed.
    density.means.zero_()
    density.factors.copy_(torch.eye(8).double())
    z = density.sample(model, 2000, node=5, generator=seeded(2)).z
    seed = seed_from(seeded(2))
    for own in (seed, combine_seeds(seed, 1)):
        for draw in (-1, *GROWN.path(5)):
            prior = counter_normal(own, torch.arange(2000), (2,), draw=draw, dtype=torch.float64)
            assert (z * prior[:, None]).mean(0).abs().max() < 0.15  # the mean of 2000, on each of 8 places


def test_tables_may_be_less_precise_than_the_tree() -> None:
    model = build(GROWN, "mlp")
    rough, fine = (filled_density(model, dtype=dtype) for dtype in (torch.float32, torch.float64))
    found, expected = (density.sample(model, 20, generator=seeded(1)) for density in (rough, fine))
    assert found.z.dtype == found.images.dtype == torch.float64
    assert torch.equal(found.leaf, expected.leaf)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-5, atol=1e-5)


@each_tree
def test_no_images_are_fine(tree: TreeTopology) -> None:
    model = build(tree, "maps")
    for density in (filled_density(model), LeafDensity(tree, model.latent)):
        for node in (None, tree.leaves[0]):
            found, like = density.sample(model, 0, node=node), model.sample(0, node=node)
            for name in ("images", "leaf", "path", "z"):
                assert getattr(found, name).shape == getattr(like, name).shape
                assert getattr(found, name).dtype == getattr(like, name).dtype


# --- what it is ---------------------------------------------------------------------------------------------


@each_tree
def test_a_new_density_is_standard_normal_with_equal_shares(tree: TreeTopology) -> None:
    model = build(tree, "mlp")
    density = LeafDensity(tree, model.latent, dtype=torch.float64)
    drawn = density.sample(model, 4000, generator=seeded(1))
    counts = [int((drawn.leaf == leaf).sum()) for leaf in tree.leaves]
    assert len(counts) == 1 or stats.chisquare(counts).pvalue > 1e-6
    there = drawn.path >= 0
    assert float(drawn.z[there].mean()) == pytest.approx(0, abs=0.05)
    assert float(drawn.z[there].std()) == pytest.approx(1, abs=0.05)
    assert not drawn.z[~there].any()


def test_tables_are_buffers_of_a_dtype_and_a_device() -> None:
    density = LeafDensity(GROWN, (2, 2, 2), 5, dtype=torch.float64)
    shapes = {"shares": (4,), "weights": (4, 5), "means": (4, 5, 32), "factors": (4, 5, 32, 32)}
    assert {name: tuple(table.shape) for name, table in density.state_dict().items()} == shapes
    assert {table.dtype for table in density.state_dict().values()} == {torch.float64}
    assert not list(density.parameters())
    assert LeafDensity(GROWN, (2,)).means.dtype == torch.float32
    assert "latent=(2, 2, 2), components=5" in repr(density)


def test_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        inside = LeafDensity(GROWN, (2,), 3)
    real = LeafDensity(GROWN, (2,), 3)
    for density in (inside, LeafDensity(GROWN, (2,), 3, device="meta")):
        assert all(table.is_meta for table in density.state_dict().values())
        density.to_empty(device="cpu").load_state_dict(real.state_dict())
        model = build(GROWN, "mlp")
        found, expected = (one.sample(model, 4, generator=seeded()) for one in (density, real))
        assert torch.equal(found.leaf, expected.leaf) and torch.equal(found.z, expected.z)


def test_a_density_in_float64_draws_the_same() -> None:
    model = build(GROWN, "mlp")
    density = filled_density(model, dtype=torch.float32)
    rough: TreeSample = density.sample(model, 20, generator=seeded(1))
    fine = density.double().sample(model, 20, generator=seeded(1))
    torch.testing.assert_close(rough.z, fine.z, rtol=1e-5, atol=1e-5)


# --- errors -------------------------------------------------------------------------------------------------


def test_scikit_learn_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(GROWN)
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    filled_density(model).sample(model, 1)  # drawing does without
    message = "mixtures are fitted by scikit-learn, which is not installed; pip install 'treediff[metrics]'"
    with pytest.raises(ImportError, match=re.escape(message)):
        LeafDensity.fit(model, observations(model, 60))


def test_a_density_belongs_to_one_tree_and_its_latents() -> None:
    model = build(GROWN)
    density = LeafDensity(PRUNED, (2,))
    message = (
        f"the density is for latents (2,) on {PRUNED}, found a TreeVAE with latents (2,) on {GROWN}; "
        "fit a density to this TreeVAE with LeafDensity.fit"
    )
    for call in (lambda: density.sample(model, 1), lambda: density.check(model)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    with pytest.raises(ValueError, match=re.escape("is for latents (3,) on")):
        LeafDensity(GROWN, (3,)).sample(model, 1)
    density = LeafDensity(GROWN, (2,))
    model.split(1)
    with pytest.raises(ValueError, match="fit a density to this TreeVAE with"):
        density.sample(model, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, m: d.sample(m, 2, node=99), KeyError, "node 99 is not in the tree; its nodes are"),
        (lambda d, m: d.sample(m, -1), ValueError, "n and temperature must be at least 0"),
        (lambda d, m: d.sample(m, 2, temperature=-0.1), ValueError, "n and temperature must be at least 0"),
        (lambda d, m: d.sample(m, 2.5), TypeError, "n and first_index must be integers"),
        (lambda d, m: d.sample(m, 2, first_index=0.5), TypeError, "n and first_index must be integers"),
        (lambda d, m: d.fit(m, observations(m, 9), components=0), ValueError, "components must be at least 1, found 0"),
        (lambda d, m: d.fit(m, observations(m, 9), batch_size=0), ValueError, "batch_size must be at least 1, found 0"),
        (lambda d, m: d.fit(m, observations(m, 9)[:, :2]), ValueError, r"expected observations of shape \(batch, 3\)"),
        (lambda d, m: d.fit(m, [[0.0]]), ValueError, r"expected observations of shape \(batch, 3\)"),
        (lambda d, m: LeafDensity(GROWN, (2,), 0), ValueError, "components must be at least 1, found 0"),
        (lambda d, m: LeafDensity(GROWN, (2,), 1.5), TypeError, "components must be a whole number, found 1.5"),
        (
            lambda d, m: LeafDensity(GROWN, (2, 2)),
            ValueError,
            r"latent must be \(width,\) or \(channels, height, width",
        ),
    ],
)
def test_errors_teach(call: Callable[..., Any], error: type[Exception], message: str) -> None:
    model = build(GROWN)
    with pytest.raises(error, match=message):
        call(LeafDensity(GROWN, (2,)), model)

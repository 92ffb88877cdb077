"""Guided denoisers against closed forms on trees of Gaussians, where every denoiser is exact."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import seeded, world

from treediff import TreeTopology
from treediff.core.noise import NoiseStream
from treediff.diffusion import (
    ClippedDenoiser,
    CosineSchedule,
    DDIMSampler,
    DDPMSampler,
    Denoiser,
    DPMSolverSampler,
    GuidedDenoiser,
    HeunSampler,
    LinearSchedule,
    NoiseSchedule,
    Sampler,
    uniform,
)
from treediff.testing import ExactDenoiser, GaussianTree

TIMES = [0.02, 0.3, 0.7, 1.0]
SAMPLERS: list[Sampler] = [DDIMSampler(), DDIMSampler(eta=0.5), DDPMSampler("large"), DPMSolverSampler(), HeunSampler()]


def points(known: GaussianTree, n: int = 6) -> Tensor:
    return known.sample(n, generator=seeded(1))[0]


@dataclass
class Counted:
    """A denoiser that remembers at which times it was asked."""

    inner: Denoiser
    asked: list[float] = field(default_factory=list)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.inner.schedule

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        self.asked.append(t)
        return self.inner(x_t, t)


def pair(schedule: NoiseSchedule | None = None) -> tuple[ExactDenoiser, ExactDenoiser]:
    """Of two leaves of the uneven tree."""
    known, schedule = world(), schedule or LinearSchedule()
    first, second = known.topology.leaves[:2]
    return known.denoiser(schedule, first), known.denoiser(schedule, second)


def score_of(denoiser: Denoiser, x: Tensor, t: float) -> Tensor:
    """By the formula of Tweedie."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha(time), denoiser.schedule.sigma(time)
    return (alpha * denoiser(x, t) - x) / sigma**2


# --- the formula --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize("weight", [-0.5, 0.0, 0.3, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("t", TIMES)
def test_scores_are_combined_at_every_noise_level(t: float, weight: float, schedule: NoiseSchedule) -> None:
    """The guided score is that of `p_positive^w p_negative^(1 - w)`, and its gradient is the closed form."""
    positive, negative = pair(schedule)
    guided, x = GuidedDenoiser(positive, negative, weight), points(world())
    expected = weight * positive.score(x, t) + (1 - weight) * negative.score(x, t)
    torch.testing.assert_close(score_of(guided, x, t), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
def test_between_two_gaussians_it_leads_to_the_gaussian_of_the_product(t: float) -> None:
    """`N(a)^w N(b)^(1 - w)` has the precision `w A + (1 - w) B`; its score by hand."""
    positive, negative = pair()
    time, x, w = torch.tensor(t, dtype=torch.float64), points(world()), 1.7
    alpha, sigma = (float(f(time)) for f in (positive.schedule.alpha, positive.schedule.sigma))
    expected = torch.zeros_like(x)
    for share, denoiser in ((w, positive), (1 - w, negative)):
        precision = torch.linalg.inv(alpha**2 * denoiser.mixture.covariances[0] + sigma**2 * torch.eye(3))
        expected -= share * (x - alpha * denoiser.mixture.means[0]) @ precision
    torch.testing.assert_close(score_of(GuidedDenoiser(positive, negative, w), x, t), expected, rtol=1e-6, atol=1e-6)


def test_the_formula_holds_for_images_too() -> None:
    def constant(seed: int) -> Any:  # noqa: ANN401
        value = torch.randn(2, 3, 4, 5, generator=seeded(seed))
        return lambda x, t: value

    x, weight = torch.zeros(2, 3, 4, 5), torch.tensor([0.5, 3.0])
    positive, negative = constant(1), constant(2)
    found = GuidedDenoiser(positive, negative, weight)(x, 0.5)
    for i, w in enumerate(weight.tolist()):
        torch.testing.assert_close(found[i], w * positive(x, 0.5)[i] + (1 - w) * negative(x, 0.5)[i])


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_weights_of_images_are_as_good_as_separate_runs(sampler: Sampler, dtype: torch.dtype) -> None:
    positive, negative = pair()
    weights, x = torch.tensor([1.0, 2.5, 0.0, -1.0], dtype=dtype), torch.randn(4, 3, generator=seeded(), dtype=dtype)
    times = uniform(LinearSchedule(), 8)

    def run(weight: float | Tensor, rows: slice) -> Tensor:
        noise = NoiseStream(3, torch.arange(4)[rows], (3,), dtype)
        return sampler(GuidedDenoiser(positive, negative, weight), x[rows], times, noise=noise)

    together = run(weights, slice(None))
    for i, weight in enumerate(weights.tolist()):
        torch.testing.assert_close(run(weight, slice(i, i + 1))[0], together[i], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_weight_1_never_asks_the_negative() -> None:
    positive, negative = pair()
    x = points(world())
    for weight in (1, 1.0):
        counted = Counted(negative)
        guided = GuidedDenoiser(positive, counted, weight, rescale=0.5)
        assert torch.equal(guided(x, 0.5), positive(x, 0.5)) and not counted.asked
    torch.testing.assert_close(GuidedDenoiser(positive, negative, torch.ones(len(x)))(x, 0.5), positive(x, 0.5))
    assert torch.equal(GuidedDenoiser(positive, negative)(x, 0.5), positive(x, 0.5))


def test_it_acts_inside_the_interval_only() -> None:
    positive, negative = pair()
    x = points(world())
    counted = Counted(negative)
    guided, everywhere = GuidedDenoiser(positive, counted, 3.0, interval=(0.25, 0.75)), GuidedDenoiser(*pair(), 3.0)
    for t in (0.0, 0.2, 0.2499, 0.7501, 1.0):
        assert torch.equal(guided(x, t), positive(x, t))
    assert not counted.asked
    for t in (0.25, 0.5, 0.75):
        assert torch.equal(guided(x, t), everywhere(x, t))
        assert not torch.isclose(guided(x, t), positive(x, t)).any()
    counted.asked.clear()
    HeunSampler()(guided, x, torch.tensor([0.9, 0.6, 0.5, 0.1, 0.0], dtype=torch.float64))
    assert counted.asked == [0.6, 0.6, 0.5, 0.5]  # Heun's method asks at the end of a step too


# --- rescaling ----------------------------------------------------------------------------------------------


def slow_rescale(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """Lin et al., equations 15 and 16, image by image."""
    rows = []
    for image, wanted in zip(guided, positive, strict=True):
        rescaled = image * (wanted.flatten().std(correction=0) / image.flatten().std(correction=0))
        rows.append(share * rescaled + (1 - share) * image)
    return torch.stack(rows)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4, 5)])
def test_rescaling_brings_the_spread_back(shape: tuple[int, ...], share: float) -> None:
    positive, negative = (torch.randn(shape, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    x, weight = torch.zeros(shape), torch.linspace(2, 5, shape[0], dtype=torch.float64)
    for w in (3.0, weight):
        guide = GuidedDenoiser(lambda x, t: positive, lambda x, t: negative, w, rescale=share)  # type: ignore[arg-type]
        column = torch.as_tensor(w).view(-1, *[1] * (len(shape) - 1))
        plain = negative + column * (positive - negative)
        torch.testing.assert_close(guide(x, 0.5), slow_rescale(plain, positive, share))
        if share == 1:
            torch.testing.assert_close(guide(x, 0.5).flatten(1).std(1), positive.flatten(1).std(1))


def test_an_image_of_one_colour_stays_what_it_is() -> None:
    one, two = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.25)
    guide = GuidedDenoiser(lambda x, t: one, lambda x, t: two, 2.0, rescale=1.0)  # type: ignore[arg-type]
    assert torch.equal(guide(torch.zeros(1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.75))


# --- what it is for -----------------------------------------------------------------------------------------


def overlapping() -> GaussianTree:
    """Eight leaves, siblings two standard deviations apart."""
    return GaussianTree.random(
        TreeTopology.balanced(3), latent=3, features=3, separation=2.0, variance=0.05, generator=seeded(4)
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_away_from_the_sibling_leaves_are_clearer(sampler: Sampler) -> None:
    """P(leaf | x) of samples, from the same noise, against no guidance."""
    known, schedule, n = overlapping(), CosineSchedule(), 200
    tree = known.topology
    x, noise = torch.randn(n, 3, generator=seeded(1), dtype=torch.float64), NoiseStream(2, torch.arange(n), (3,))
    for leaf in tree.leaves[::3]:
        (sibling,) = set(tree.children(tree.parent(leaf) or 0)) - {leaf}
        sharp = []
        for weight in (1.0, 1.5, 2.5):
            denoiser = GuidedDenoiser(known.denoiser(schedule, leaf), known.denoiser(schedule, sibling), weight)
            drawn = sampler(denoiser, x, uniform(schedule, 12), noise=lambda i: noise(i).double())
            sharp.append(float(known.leaf_log_posterior(drawn).exp()[:, tree.leaves.index(leaf)].mean()))
        assert sharp[0] + 0.03 < sharp[1] < sharp[2] - 0.03, (leaf, sharp)


def test_the_guided_are_denoisers_too() -> None:
    known, schedule = world(), LinearSchedule()
    (a, b, *_), root = known.topology.leaves, known.topology.root
    first, second, third = (known.denoiser(schedule, node) for node in (a, b, root))
    x = points(known)
    nested = GuidedDenoiser(GuidedDenoiser(first, third, 2.0), GuidedDenoiser(second, third, 3.0), 1.5)
    inner, outer = 2 * first(x, 0.4) - third(x, 0.4), 3 * second(x, 0.4) - 2 * third(x, 0.4)
    torch.testing.assert_close(nested(x, 0.4), 1.5 * inner - 0.5 * outer)
    assert nested.schedule is schedule and ClippedDenoiser(nested).schedule is schedule
    for sampler in SAMPLERS:
        noise = NoiseStream(1, torch.arange(len(x)), (3,), torch.float64)
        drawn = sampler(ClippedDenoiser(nested, -2, 3), x, uniform(schedule, 5), noise=noise)
        assert drawn.isfinite().all() and drawn.min() >= -2 and drawn.max() <= 3


def test_clipping_keeps_estimates_in_the_range() -> None:
    positive, _ = pair()
    x = 5 * points(world())
    estimate = positive(x, 0.5)
    expected = torch.tensor([[min(max(v, -1.0), 1.0) for v in row] for row in estimate.tolist()], dtype=torch.float64)
    assert torch.equal(ClippedDenoiser(positive)(x, 0.5), expected) and (estimate != expected).any()
    assert torch.equal(ClippedDenoiser(positive, -9e9, 9e9)(x, 0.5), estimate)


def test_an_empty_batch() -> None:
    positive, negative = pair()
    for weight in (2.0, torch.ones(0)):
        guided = GuidedDenoiser(positive, negative, weight, rescale=0.5)
        assert guided(torch.zeros(0, 3), 0.5).shape == (0, 3)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [-0.1, 1.1, float("nan")])
def test_rescale_is_a_share(rescale: float) -> None:
    with pytest.raises(ValueError, match=f"rescale must be between 0 and 1, found {rescale}"):
        GuidedDenoiser(*pair(), 2.0, rescale=rescale)


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.1), (float("nan"), 1.0)])
def test_the_interval_is_part_of_the_time(interval: tuple[float, float]) -> None:
    message = f"interval must be two times, 0 <= low <= high <= 1, found {interval}"
    with pytest.raises(ValueError, match=re.escape(message)):
        GuidedDenoiser(*pair(), 2.0, interval=interval)


@pytest.mark.parametrize("shape", [(5,), (7,), (6, 1), (1,)])
def test_there_is_one_weight_for_each_image(shape: tuple[int, ...]) -> None:
    message = f"expected one weight, or one for each of the 6 images; found {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        GuidedDenoiser(*pair(), torch.ones(shape))(points(world()), 0.5)

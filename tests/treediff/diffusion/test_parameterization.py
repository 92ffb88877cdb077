"""Predictions and loss weights: round trips, papers' formulas, and what each is worth in terms of the image."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from treediff.diffusion.parameterization import Prediction, as_noise, as_x0, target
from treediff.diffusion.weighting import min_snr, simple

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "x0", "v")
angles = st.floats(0.01, math.pi / 2 - 0.01)


def case(angle: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image, noise, both in one, alpha, sigma."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    alpha, sigma = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    return x0, noise, alpha * x0 + sigma * noise, alpha, sigma


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(angle=angles)
def test_image_and_noise_come_back(prediction: Prediction, angle: float) -> None:
    x0, noise, x_t, alpha, sigma = case(angle)
    output = target(prediction, x0, noise, alpha, sigma)
    torch.testing.assert_close(as_x0(prediction, output, x_t, alpha, sigma), x0)
    torch.testing.assert_close(as_noise(prediction, output, x_t, alpha, sigma), noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(angle=angles)
def test_image_and_noise_agree_for_any_output(prediction: Prediction, angle: float) -> None:
    """Also for a wrong output, the image and the noise that it means make up what the network was given."""
    *_, x_t, alpha, sigma = case(angle)
    output = torch.sin(7 * x_t)
    x0, noise = (f(prediction, output, x_t, alpha, sigma) for f in (as_x0, as_noise))
    torch.testing.assert_close(alpha * x0 + sigma * noise, x_t)
    torch.testing.assert_close(target(prediction, x0, noise, alpha, sigma), output)


def test_velocity_is_the_derivative_by_the_angle() -> None:
    """`x_t = cos(angle) x0 + sin(angle) noise`, and `v` its derivative (Salimans and Ho, appendix D)."""
    x0, noise, _, _, _ = case(0.0)
    angle = torch.tensor(0.7, dtype=torch.float64)
    _, velocity = torch.autograd.functional.jvp(
        lambda a: torch.cos(a) * x0 + torch.sin(a) * noise, angle, torch.ones_like(angle)
    )
    torch.testing.assert_close(target("v", x0, noise, angle.cos(), angle.sin()), velocity)


@pytest.mark.parametrize("function", [target, as_x0, as_noise])
def test_unknown_prediction(function: object) -> None:
    one = torch.ones(())
    with pytest.raises(ValueError, match=r"one of epsilon, x0, v; found 'score'"):
        function("score", one, one, one, one)  # type: ignore[operator]


# --- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(angle=angles, gamma=st.floats(0.1, 50))
def test_min_snr_is_one_loss_on_the_image(prediction: Prediction, angle: float, gamma: float) -> None:
    """Whatever is predicted, the weighted error is `min(SNR, gamma)` times the error of the image."""
    x0, noise, x_t, alpha, sigma = case(angle)
    output = target(prediction, x0, noise, alpha, sigma) + 0.3
    error = (output - target(prediction, x0, noise, alpha, sigma)).square()
    of_image = (as_x0(prediction, output, x_t, alpha, sigma) - x0).square()
    snr = (alpha / sigma) ** 2
    weight = min_snr(prediction, gamma)(snr.log())
    torch.testing.assert_close(weight * error, snr.clamp(max=gamma) * of_image)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_at_both_ends(prediction: Prediction) -> None:
    ends = torch.tensor([-math.inf, math.inf])
    expected = {"epsilon": [1.0, 0.0], "x0": [0.0, 5.0], "v": [0.0, 0.0]}[prediction]
    torch.testing.assert_close(min_snr(prediction)(ends), torch.tensor(expected))
    assert simple(ends).tolist() == [1, 1]


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_bad_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma must be above 0, found {gamma}"):
        min_snr("v", gamma)


def test_min_snr_of_an_unknown_prediction() -> None:
    with pytest.raises(ValueError, match="found 'score'"):
        min_snr("score")  # type: ignore[arg-type]

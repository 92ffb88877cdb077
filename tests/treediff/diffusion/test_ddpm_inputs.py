"""What the second stage refuses, in its settings and in its images."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import GROWN
from pairs import images, small
from worlds import seeded

from treediff import LeafConditionedDDPM, TreeCondition, TreeTopology
from treediff.diffusion import (
    Conditioners,
    CosineSchedule,
    DiscreteSchedule,
    NodeEmbedding,
    PathTokens,
    ReconstructionConcat,
    UNet,
    rescale_zero_terminal_snr,
    simple,
)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([0.5], TypeError, "expected images as a tensor, found list; torch.as_tensor(x) makes one"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, "expected floating-point images, found torch.uint8"),
        (torch.zeros(2, 8, 8), ValueError, "expected images of shape (batch, 1, 8, 8), found (2, 8, 8)"),
        (torch.zeros(2, 3, 8, 8), ValueError, "expected images of shape (batch, 1, 8, 8), found (2, 3, 8, 8)"),
        (torch.zeros(3, 1, 8, 8), ValueError, "condition must have one row for each of the 3 images, found 2"),
        (
            torch.zeros(2, 1, 8, 8).double(),
            TypeError,
            "dtype of the weights, torch.float32, found torch.float64",
        ),
        (torch.full((2, 1, 8, 8), 1.5), ValueError, "must lie in [0.0, 1.0], found values from 1.5 to 1.5"),
        (torch.full((2, 1, 8, 8), torch.nan), ValueError, "must be finite, found NaN or infinity"),
    ],
)
def test_images_must_be_what_the_model_takes(x: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    model, told = small(), TreeCondition.at(1, 2)
    with pytest.raises(error, match=re.escape(message)):
        model.loss(x, told)
    with pytest.raises(error, match=re.escape(message)):
        model.sample(told, start=x, start_time=0.5)


def parts(**settings: Any) -> dict[str, Any]:  # noqa: ANN401
    unet = UNet(1, 1, size=8, width=8, multipliers=(1,), blocks=1)
    chosen = {"unet": unet, "conditioner": NodeEmbedding(GROWN, 32), "topology": GROWN, "schedule": CosineSchedule()}
    return {**chosen, **settings}


def test_settings_are_checked() -> None:
    for name in ("coarsen", "condition_noise"):
        for share in (-0.1, 1.1):
            with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, found {share}"):
                LeafConditionedDDPM(**parts(**{name: share}))
    with pytest.raises(ValueError, match="prediction must be one of epsilon, x0, v; found 'noise'"):
        LeafConditionedDDPM(**parts(prediction="noise"))
    with pytest.raises(
        ValueError, match=re.escape("must take the 1 channels of the image and the 2 of the conditioner, found 1")
    ):
        LeafConditionedDDPM(**parts(conditioner=ReconstructionConcat(2, 8)))
    message = "reads tokens of width None, the conditioner gives tokens of width 6; build the network with context=6"
    with pytest.raises(ValueError, match=message):
        LeafConditionedDDPM(**parts(conditioner=PathTokens(GROWN, (2,), 6)))


def test_noise_cannot_be_predicted_where_nothing_is_left() -> None:
    ends = rescale_zero_terminal_snr(DiscreteSchedule.linear(20))
    message = re.escape(
        "prediction='epsilon' is undefined where nothing of the image is left, and this schedule has alpha(1) = 0; use "
    )
    for schedule in (ends, CosineSchedule(end=1.0)):
        with pytest.raises(ValueError, match=message):
            LeafConditionedDDPM(**parts(schedule=schedule, prediction="epsilon"))
        for prediction in ("v", "x0"):
            model = LeafConditionedDDPM(**parts(schedule=schedule, prediction=prediction, weighting=simple))
            assert model.loss(images(2), TreeCondition.at(1, 2), t=torch.ones(2)).isfinite()
            assert model.sample(TreeCondition.at([1, 6]), steps=3).isfinite().all()


def test_a_model_of_nothing_but_images() -> None:
    model = LeafConditionedDDPM(**parts(conditioner=Conditioners(), topology=TreeTopology.balanced(0)))
    assert model.sample(TreeCondition.at(0, 2), steps=2, generator=seeded()).shape == (2, 1, 8, 8)


def test_a_loss_needs_an_image() -> None:
    model = LeafConditionedDDPM.for_images(size=8, latent=(2,), topology=TreeTopology.balanced(1), width=8)
    with pytest.raises(ValueError, match="a loss is a mean over images, found an empty batch; leave it out"):
        model.loss(torch.zeros(0, 1, 8, 8), TreeCondition.at([]))

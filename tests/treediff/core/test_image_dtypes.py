"""Tensors of images that are no floats: what each door says of a dtype is tried, and gives the picture."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kornia.augmentation import RandomHorizontalFlip as RandomFlip
from models import build
from pairs import images, small
from torch import Tensor

from treediff import TreeCondition, TreeTopology
from treediff.augment import Augment
from treediff.diffusion import CosineSchedule
from treediff.metrics import FeatureClassifier
from treediff.pictures import draw_grid, summarize_tree

MOST = {torch.bool: 1, torch.uint8: 255, torch.uint16: 65535}
OTHERS = (torch.int16, torch.int32, torch.int64)


def doors() -> dict[str, Callable[[Tensor], Any]]:
    folder = Path(tempfile.mkdtemp())
    tree, ddpm = build(TreeTopology.balanced(1), "colour", dtype=torch.float32), small()
    classifier, schedule = FeatureClassifier(size=8, channels=1, classes=2, width=4), CosineSchedule()
    return {
        "TreeVAE": lambda x: tree.cluster(x.expand(-1, 3, -1, -1)),
        "loss": lambda x: ddpm.loss(x, TreeCondition.at(0, 2)),
        "start": lambda x: ddpm.sample(TreeCondition.at(0, 2), start=x, start_time=0.5, steps=2),
        "classifier": classifier,
        "augment": lambda x: Augment(RandomFlip())(x),
        "draw_grid": lambda x: draw_grid(x[None], folder / "grid.png"),
        "add_noise": lambda x: schedule.add_noise(x, torch.zeros(x.shape, dtype=x.dtype), 0.5),
    }


DOORS = doors()


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_the_advice_for_each_dtype_is_good(door: Callable[[Tensor], Any]) -> None:
    picture = images(2)
    for dtype, most in MOST.items():
        x = (picture * most).round().to(torch.int32).to(dtype)
        advice = "x.float()" if most == 1 else f"x.float() / {most}"
        with pytest.raises(TypeError, match=rf"found {dtype}; convert (it|them) with {re.escape(advice)}"):
            door(x)
        door(eval(advice, {"x": x}))
    for dtype in OTHERS:
        with pytest.raises(TypeError, match=r"with x\.float\(\), and divide images by what white is, 255 for"):
            door((picture * 255).to(dtype))


def test_a_whole_data_set_may_be_of_such_pixels() -> None:
    """They are converted a batch at a time, as the advice would."""
    tree, picture = build(TreeTopology.balanced(1), "colour", dtype=torch.float32), images(2).expand(-1, 3, -1, -1)
    for dtype, most in MOST.items():
        x = (picture * most).round().to(torch.int32).to(dtype)
        members = [summarize_tree(tree, each)[0].members for each in (x, x.float() / most)]
        assert np.array_equal(*members)
    for dtype in OTHERS:
        with pytest.raises(TypeError, match=r"with x\.float\(\), and divide images by what white is, 255 for"):
            summarize_tree(tree, (picture * 255).to(dtype))


def test_the_advice_for_a_range_is_good() -> None:
    picture, classifier = images(2), DOORS["classifier"]
    message = "divide 8-bit images by 255 and 16-bit ones by 65535, bring images from -1 to 1 to"
    for x, back in ((picture * 255, lambda x: x / 255), (picture * 65535, lambda x: x / 65535)):
        with pytest.raises(ValueError, match=message):
            classifier(x)
        classifier(back(x))
    with pytest.raises(ValueError, match=message):
        classifier(2 * picture - 1)
    classifier(((2 * picture - 1) + 1) / 2)

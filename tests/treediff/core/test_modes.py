"""Looking at a model does not depend on the mode it is in, and leaves the mode as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import seeded

from treediff import LeafDensity, TreeContrast, TreeTopology, TreeVAE
from treediff.growth.cut import cut_router
from treediff.growth.policy import Survey
from treediff.growth.reach import LeafProbabilities
from treediff.layers import NodeBank
from treediff.pipeline.conditions import condition_of

TREE = TreeTopology.balanced(2)


def moody() -> TreeVAE:
    """A model whose encoder and decoders say something else in training than in evaluation."""
    model = TreeVAE.for_vectors(features=6, latent=3, width=8, max_depth=2, topology=TREE, generator=seeded(0))
    model.encoder = nn.Sequential(model.encoder, nn.BatchNorm1d(8), nn.Dropout(0.5))
    model.banks.decoders = NodeBank(nn.Sequential(nn.Linear(3, 12), nn.Dropout(0.5), nn.Linear(12, 6)))
    for leaf in TREE.leaves:
        model.banks.decoders.add(leaf, generator=seeded(leaf))
    return model


def rows() -> Tensor:
    return torch.randn(40, 6, generator=seeded(1))


def cut(model: TreeVAE) -> dict[str, Tensor]:
    cut_router(model, 0, rows(), on="features", generator=seeded(2))
    return model.banks.posterior_routers.state_dict()


LOOKS: dict[str, Callable[[TreeVAE], Any]] = {
    "cluster": lambda model: model.cluster(rows()),
    "leaf probabilities": lambda model: LeafProbabilities(model)(rows()),
    "negative bounds": lambda model: Survey(model).negative_elbo(rows()),
    "condition": lambda model: vars(condition_of(model, rows(), generator=seeded(3))),
    "cut": cut,
    "contrast": lambda model: TreeContrast(model, generator=seeded(4)).state_dict(),
    "sample": lambda model: vars(model.sample(5, generator=seeded(5))),
    "sample of leaves": lambda model: vars(model.sample_leaves(5, generator=seeded(6))),
    "sample of a density": lambda model: vars(LeafDensity(TREE, (3,)).sample(model, 5, generator=seeded(7))),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_is_one_in_eval_mode_and_leaves_the_mode_as_it_was(look: str) -> None:
    model = moody().train()
    model.banks.heads.eval()  # parts may differ
    expected = LOOKS[look](copy.deepcopy(model).eval())
    modes, buffers = [part.training for part in model.modules()], copy.deepcopy(dict(model.named_buffers()))
    torch.testing.assert_close(LOOKS[look](model), expected, rtol=0, atol=0)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_clusters_carry_no_gradients() -> None:
    model, tracked = moody().eval(), []
    model.encoder.register_forward_hook(lambda _, __, y: tracked.append(y.requires_grad))
    model.cluster(rows())
    assert tracked == [False]

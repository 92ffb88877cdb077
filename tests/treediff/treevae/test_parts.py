"""Custom parts that do not fit are refused when a model is built, by name; parts that fit change no seed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.layers import MLPEncoder, Router
from treediff.testing import NaiveTreeVAE
from treediff.treevae.banks import NodeBanks


class Scale(nn.Module):
    """A layer with a weight and no way to draw it."""

    def __init__(self, *outputs: int) -> None:
        super().__init__()
        self.weight, self.outputs = nn.Parameter(torch.ones(1)), outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.new_zeros(len(x), *self.outputs)


class Drawn(Scale):
    def reset_parameters(self, *, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, generator=generator)


def vectors(**parts: Any) -> TreeVAE:  # noqa: ANN401
    """Features of width 8, latents of width 2, three numbers in an observation; a single root."""
    return TreeVAE.for_vectors(features=3, latent=2, width=8, max_depth=2, **parts)


def maps(**parts: Any) -> TreeVAE:  # noqa: ANN401
    return TreeVAE.for_images(size=8, latent=(2, 4, 4), width=6, max_depth=2, **parts)


ROLES = {"head": (4,), "transition": (4,), "posterior_router": (), "prior_router": (), "decoder": (3,)}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("depth", [0, 1])
def test_a_part_that_cannot_draw_weights_is_refused_at_once(role: str, depth: int) -> None:
    message = r"Scale owns the parameters \['weight'\] but has no reset_parameters\(generator=...\); add that method"
    with pytest.raises(TypeError, match=message):
        vectors(**{role: Scale(*ROLES[role])}, topology=TreeTopology.balanced(depth))
    with pytest.raises(TypeError, match=message):
        NodeBanks(TreeTopology.balanced(depth), **{**dict.fromkeys(ROLES, nn.Linear(1, 1)), role: Scale(1)})  # type: ignore[arg-type]


@pytest.mark.parametrize("role", ROLES)
def test_a_part_that_can_draw_weights_survives_a_split(role: str) -> None:
    model = vectors(**{role: Drawn(*ROLES[role])})
    model.split(0)
    assert model.elbo(torch.randn(4, 3)).elbo.isfinite().all()


MISFITS: list[tuple[Callable[..., TreeVAE], str, nn.Module, str]] = [
    (vectors, "head", nn.Linear(8, 2), "head= must map (B, 8) to (B, 4), the mean and the log-variance of a latent"),
    (vectors, "head", nn.Linear(7, 4), "head= does not run on its input (B, 8); build it for this shape (mat1 and"),
    (vectors, "transition", nn.Linear(2, 2), "transition= must map (B, 2) to (B, 4), the mean and the log-variance"),
    (vectors, "posterior_router", nn.Linear(8, 1), "posterior_router= must map (B, 8) to (B,), one logit for each row"),
    (vectors, "posterior_router", Router((7,)), "posterior_router= does not run on its input (B, 8); build it for"),
    (vectors, "prior_router", Router((8,)), "prior_router= does not run on its input (B, 2); build it for this shape"),
    (vectors, "prior_router", Drawn(2), "prior_router= must map (B, 2) to (B,), one logit for each row; nn.Flatten(0)"),
    (
        vectors,
        "decoder",
        nn.Linear(2, 4),
        "likelihood= does not read the decoder's output (B, 4) for observations (B, 3) (expected an output of",
    ),
    (vectors, "encoder", nn.Linear(4, 8), "encoder= does not run on its input (B, 3); build it for this shape"),
    (vectors, "encoder", MLPEncoder((3,), (9,)), "bottom_up[0]= does not run on its input (B, 9); build it for this"),
    (vectors, "encoder", nn.Flatten(0), "encoder= must return a tensor with a row for each row of its input (B, 3)"),
    (vectors, "encoder", nn.LSTM(3, 8), "encoder= must return a tensor with a row for each row of its input (B, 3)"),
    (vectors, "bottom_up", nn.ModuleList([nn.Linear(8, 7)]), "bottom_up[0]= must map (B, 8) to (B, 8), the shape of"),
    (maps, "head", nn.Conv2d(6, 5, 1), "head= must map (B, 6, 4, 4) to (B, 4, 4, 4), the mean and the log-variance"),
    (maps, "posterior_router", nn.Linear(4, 1), "posterior_router= must map (B, 6, 4, 4) to (B,), one logit for each"),
    (
        maps,
        "decoder",
        nn.Conv2d(2, 1, 1),
        "read the decoder's output (B, 1, 4, 4) for observations (B, 1, 8, 8)",
    ),
]


@pytest.mark.parametrize(
    ("make", "role", "part", "message"), MISFITS, ids=[f"{m[0].__name__} {m[1]} {i}" for i, m in enumerate(MISFITS)]
)
def test_a_part_of_another_shape_is_named(
    make: Callable[..., TreeVAE], role: str, part: nn.Module, message: str
) -> None:
    for depth in (0, 1):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**{role: part}, topology=TreeTopology.balanced(depth))


def test_parts_of_the_documented_shapes_make_a_model() -> None:
    parts = {
        "encoder": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        "bottom_up": [nn.Linear(8, 8), nn.Identity()],
        "head": nn.Linear(8, 4),
        "transition": nn.Linear(2, 4),
        "posterior_router": nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)),
        "prior_router": nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)),
        "decoder": nn.Linear(2, 3),
    }
    before, state = {k: v.clone() for k, v in parts["encoder"].state_dict().items()}, torch.get_rng_state()  # type: ignore[attr-defined]
    model = vectors(**parts)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(module.training for module in model.modules())
    model.split(0)
    model = model.double().eval()
    x, noise = torch.randn(4, 3, generator=seeded()).double(), torch.randn(4, 3, 2, generator=seeded()).double()
    torch.testing.assert_close(model.elbo(x, noise=noise).elbo, NaiveTreeVAE(model).elbo(x, noise).elbo)


def test_a_part_in_another_dtype_is_moved_with_the_model() -> None:
    model = vectors(encoder=nn.Linear(3, 8), dtype=torch.float64).double()
    assert model.elbo(torch.randn(4, 3, dtype=torch.float64)).elbo.isfinite().all()

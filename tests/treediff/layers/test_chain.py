"""Chains of layers: gradients are worked out where they are wanted, and nowhere else.

That values and gradients are right is tested in `test_grouped.py`, for every layer and for layers in a row.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from treediff.layers import Groups
from treediff.layers.decoders import ConvDecoder, MLPDecoder, PatchDecoder
from treediff.layers.grouped import _chain as chain
from treediff.layers.grouped import _products as products
from treediff.layers.grouped import call as grouped
from treediff.layers.heads import GaussianHead, LatentTransition
from treediff.layers.router import Router

TEMPLATES = {
    "router": (lambda: Router((4,), (8,)), (4,)),
    "head": (lambda: GaussianHead((4, 2, 2), 3), (4, 2, 2)),
    "head of a large map": (lambda: GaussianHead((4, 6, 5), 3), (4, 6, 5)),
    "transition": (lambda: LatentTransition((4, 2, 2), (8,)), (4, 2, 2)),
    "MLP decoder": (lambda: MLPDecoder((4,), (1, 3, 3), (5,)), (4,)),
    "patch decoder": (lambda: PatchDecoder((4,), 1, (9, 8), 6, 4, 6), (4,)),
    "convolutional decoder": (lambda: ConvDecoder((4,), 1, (12, 12), 4, 3), (4,)),
}


def problem(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, Groups]:
    """A template with the weights of three groups, one of them without a row."""
    build, shape = TEMPLATES[name]
    template, generator = build().double(), torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(3, *p.shape, generator=generator, dtype=torch.float64)
        for key, p in template.named_parameters()
    }
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    return template, weights, x, Groups(torch.tensor([0, 0, 0, 2, 2]), 3)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_network_of_the_library_is_one_chain(name: str) -> None:
    parts = grouped.parts_of(TEMPLATES[name][0]())
    assert [bool(part.links) for part in parts if part.names] == [True]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("trained", ["input", "weights"])
def test_what_is_frozen_changes_no_other_gradient(name: str, trained: str) -> None:
    template, weights, x, groups = problem(name)

    def gradients(of_input: bool, of_weights: bool) -> list[Tensor | None]:
        leaves = [x.clone().requires_grad_(of_input), *(w.clone().requires_grad_(of_weights) for w in weights.values())]
        y = grouped.grouped_call(template, dict(zip(weights, leaves[1:], strict=True)), leaves[0], groups)
        (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
        return [leaf.grad for leaf in leaves]

    every, some = gradients(True, True), gradients(trained == "input", trained == "weights")
    for i, (full, found) in enumerate(zip(every, some, strict=True)):
        if (i == 0) == (trained == "input"):
            torch.testing.assert_close(found, full, rtol=0, atol=0)
        else:
            assert found is None


def test_no_gradient_is_worked_out_in_vain() -> None:
    template, weights, x, groups = problem("router")
    with patch.object(products, "_outer", wraps=products._outer) as outer:
        grouped.grouped_call(template, weights, x.clone().requires_grad_(), groups).sum().backward()
        assert not outer.called  # no weight wants a gradient
        trained = {key: w.clone().requires_grad_() for key, w in weights.items()}
        with patch.object(products, "_multiply", wraps=products._multiply) as multiply:
            grouped.grouped_call(template, trained, x, groups).sum().backward()
        assert outer.call_count == 1
        assert multiply.call_count == 1  # forwards; the input wants none, and the last layer needs no product


def test_without_gradients_nothing_is_kept() -> None:
    template, weights, x, groups = problem("transition")
    with patch.object(chain._Chain, "apply", side_effect=AssertionError("kept for a backward pass")), torch.no_grad():
        grouped.grouped_call(template, weights, x, groups)

"""Gradients of grouped layers are worked out where they are wanted, and nowhere else, and have gradients.

That values and gradients are right is tested in `test_grouped.py`, for every layer and for layers in a row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from treediff.layers import Groups
from treediff.layers.decoders import ConvDecoder, MLPDecoder, PatchDecoder
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
def test_no_network_of_the_library_loops_over_groups(name: str) -> None:
    assert [layer.module for layer in grouped.layers_of(TEMPLATES[name][0]()) if layer.names and not layer.step] == []


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

    def products(call: Callable[[], Tensor]) -> tuple[int, int]:
        """How many products for rows and for weights the forward and the backward pass take."""
        with torch.profiler.profile() as profile:
            call().sum().backward()
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts.get("treediff::multiply", 0), counts.get("treediff::outer", 0)

    # The last layer needs no product: it has one output.
    assert products(lambda: grouped.grouped_call(template, weights, x.clone().requires_grad_(), groups)) == (2, 0)
    trained = {key: w.clone().requires_grad_() for key, w in weights.items()}
    assert products(lambda: grouped.grouped_call(template, trained, x, groups)) == (1, 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_gradients_have_gradients(name: str) -> None:
    """Those of the plain loop over groups."""
    template, weights, x, groups = problem(name)

    def second(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights.values())]
        y = call(template, dict(zip(weights, leaves[1:], strict=True)), leaves[0], groups)
        (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), leaves, materialize_grads=True))

    torch.testing.assert_close(second(grouped.grouped_call), second(grouped._each_group))

"""What a TreeVAE refuses, and in which words; and the right answer to an empty batch and to a single row."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from models import GROWN, KINDS, PRUNED, build, noise_for, observations
from torch import Tensor
from worlds import seeded

from treediff import TreePosterior, TreeTopology, TreeVAE

DOORS: dict[str, Callable[[TreeVAE, Tensor], object]] = {
    "posterior": lambda model, x: model.posterior(x),
    "elbo": lambda model, x: model.elbo(x),
    "iwae": lambda model, x: model.iwae(x, 2),
    "leaf_log_probs": lambda model, x: model.leaf_log_probs(x),
    "cluster": lambda model, x: model.cluster(x),
    "reconstruct": lambda model, x: model.reconstruct(x),
    "reconstruct a leaf": lambda model, x: model.reconstruct(x, leaf=1),
}
each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@lru_cache
def model_of(kind: str) -> TreeVAE:
    """One model for all the refusals, which leave it as it is."""
    return build(GROWN, kind)


def refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


# --- observations -------------------------------------------------------------------------------------------


@each_door
@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (2, 4, 3), (2, 1, 3, 4), (2, 2, 4, 3), (2, 1, 4, 3, 1), (0, 12)])
def test_wrong_shapes(door: Callable[[TreeVAE, Tensor], object], shape: tuple[int, ...]) -> None:
    model = model_of("mlp")
    message = f"expected observations of shape (batch, 1, 4, 3), found {shape}"
    refused(lambda: door(model, torch.rand(shape).double()), ValueError, message)


@each_door
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["vectors", "mlp"])
def test_numbers_that_are_none(door: Callable[[TreeVAE, Tensor], object], bad: float, kind: str) -> None:
    model = model_of(kind)
    x = observations(model, 3)
    x.view(-1)[-1] = bad
    refused(lambda: door(model, x), ValueError, "observations must be finite, found NaN or infinity; clean or mask")


@each_door
@pytest.mark.parametrize("kind", ["mlp", "conv", "colour"])
def test_images_outside_of_their_range(door: Callable[[TreeVAE, Tensor], object], kind: str) -> None:
    model = model_of(kind)
    x = observations(model, 2).clamp(0.25, 0.75)
    x.view(-1)[:2] = torch.tensor([0.0, 255.0])
    refused(
        lambda: door(model, x), ValueError, "observations must lie in [0.0, 1.0], found values from 0 to 255; divide"
    )
    x.view(-1)[:2] = torch.tensor([-1e-3, 1.0])
    refused(lambda: door(model, x), ValueError, "found values from -0.001 to 1; divide 8-bit images by 255")


def test_the_ends_of_the_range_belong_to_it_and_vectors_have_none() -> None:
    images, vectors = build(GROWN, "mlp"), build(GROWN)
    for value in (0.0, 1.0):
        assert images.elbo(torch.full((2, 1, 4, 3), value).double()).elbo.isfinite().all()
    assert vectors.elbo(torch.tensor([[-1e3, 0.0, 1e3]]).double()).elbo.isfinite().all()


@each_door
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_not_floating_point(door: Callable[[TreeVAE, Tensor], object], dtype: torch.dtype) -> None:
    x = torch.ones(2, 1, 4, 3, dtype=dtype)
    message = f"expected floating-point observations, found {dtype}; convert them with x.float()"
    refused(lambda: door(model_of("mlp"), x), TypeError, message)


@each_door
def test_numbers_of_another_precision(door: Callable[[TreeVAE, Tensor], object]) -> None:
    single, double = build(GROWN, dtype=torch.float32), build(GROWN)
    for model, x in ((single, torch.zeros(2, 3).double()), (double, torch.zeros(2, 3)), (double, torch.zeros(0, 3))):
        message = (
            f"expected observations of the dtype of the weights, {model.dtype}, found {x.dtype}; convert them with"
        )
        refused(lambda model=model, x=x: door(model, x), TypeError, message)


@each_door
@pytest.mark.parametrize("x", [np.zeros((2, 3)), [[0.0, 0.0, 0.0]], None], ids=["array", "list", "none"])
def test_what_is_no_tensor(door: Callable[[TreeVAE, Any], object], x: Any) -> None:  # noqa: ANN401
    refused(
        lambda: door(model_of("vectors"), x),
        TypeError,
        f"expected observations as a tensor, found {type(x).__name__}; ",
    )


# --- no row, one row ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tree", [TreeTopology.balanced(0), TreeTopology.chain(1), PRUNED], ids=["root", "chain", "tree"]
)
def test_answers_have_a_row_per_row(tree: TreeTopology, kind: str, n: int) -> None:
    model = build(tree, kind)
    x, k = observations(model, n), len(tree.leaves)
    shapes = {
        "cluster": ((n,), model.cluster(x)),
        "leaf_log_probs": ((n, k), model.leaf_log_probs(x)),
        "iwae": ((n,), model.iwae(x, 3)),
        "reconstruct": ((n, *model.inputs), model.reconstruct(x)),
        "reconstruct a leaf": ((n, *model.inputs), model.reconstruct(x, leaf=tree.leaves[-1])),
        "elbo": ((n,), model.elbo(x).elbo),
        "latents": ((n, *model.latent), model.posterior(x).latents(tree.leaves[0])),
        "sample": ((n, *model.inputs), model.sample(n).images),
        "sample_leaves": ((n, k, *model.inputs), model.sample_leaves(n).images),
    }
    for name, (shape, found) in shapes.items():
        assert tuple(found.shape) == shape, name
        assert found.dtype == (torch.int64 if name == "cluster" else torch.float64), name


@each_door
def test_a_look_in_inference_mode_can_be_followed_by_training(door: Callable[[TreeVAE, Tensor], object]) -> None:
    model = build(GROWN, "maps")
    x = observations(model, 3)
    with torch.inference_mode():
        door(model, x)
    model.elbo(x, generator=seeded()).loss().backward()
    model.reconstruct(x)


def test_training_on_no_row_gives_gradients_of_nothing() -> None:
    model = build(GROWN, "maps")
    model.elbo(observations(model, 0)).elbo.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


# --- leaves, nodes, noise -----------------------------------------------------------------------------------


def at(model: TreeVAE, x: Tensor, leaf: Any) -> list[Callable[[], object]]:  # noqa: ANN401
    return [lambda: model.posterior(x, leaf=leaf), lambda: model.reconstruct(x, leaf=leaf)]


def test_leaves_must_be_leaves_one_for_each_row() -> None:
    model = build(GROWN)  # leaves 1, 4, 5, 6
    x = observations(model, 3)
    for leaf, error, message in (
        (torch.tensor([1, 2, 4]), KeyError, "node 2 is not a leaf of the tree; the leaves are [1, 4, 5, 6]"),
        (torch.tensor([1, 4, 99]), KeyError, "node 99 is not a leaf of the tree; the leaves are [1, 4, 5, 6]"),
        (torch.tensor([1, 4]), ValueError, "leaf must be one id for each of the 3 images, found shape (2,)"),
        (torch.tensor([[1, 4, 5]]), ValueError, "leaf must be one id for each of the 3 images, found shape (1, 3)"),
        (torch.tensor([1.0, 4.0, 5.0]), TypeError, "leaf must hold node ids, which are integers, found torch.float32"),
        (torch.tensor([True, True, True]), TypeError, "leaf must hold node ids, which are integers, found torch.bool"),
    ):
        for call in at(model, x, leaf):
            refused(call, error, message)
    refused(lambda: model.reconstruct(x, leaf=0), KeyError, "node 0 is not a leaf of the tree")
    refused(lambda: model.reconstruct(x, leaf=7), KeyError, "node 7 is not a leaf of the tree")
    for dtype in (torch.int32, torch.int64, torch.uint8):
        model.reconstruct(x, leaf=torch.tensor([1, 4, 5], dtype=dtype))


def test_nodes_to_visit_must_be_part_of_the_tree() -> None:
    model = build(GROWN)
    x = observations(model, 2)
    starts = "a traversal starts at the root and visits the parent of every node, found nodes"
    refused(lambda: model.posterior(x, nodes=[0, 99]), KeyError, "node 99 is not in the tree")
    refused(lambda: model.posterior(x, nodes=[]), ValueError, f"{starts} []; add [0]")
    refused(lambda: model.posterior(x, nodes=[0, 5]), ValueError, f"{starts} [0, 5]; add [2, 3]")
    one = torch.tensor([1, 4])
    refused(
        lambda: model.posterior(x, nodes=[0, 1], leaf=one), KeyError, "node 4 is not a leaf among the nodes to visit"
    )
    refused(lambda: model.posterior(x, nodes=[0, 2], leaf=one), ValueError, "the nodes to visit hold no leaf")
    refused(lambda: model.posterior(x[:0], nodes=[0], leaf=one[:0]), ValueError, "the nodes to visit hold no leaf")


def test_latents_of_a_node_that_is_none() -> None:
    posterior = build(GROWN).posterior(torch.zeros(2, 3).double())
    assert isinstance(posterior, TreePosterior)
    refused(lambda: posterior.latents(99), KeyError, "node 99 is not in the tree; its nodes are [0, 1, 2, 3, 4, 5, 6]")


@pytest.mark.parametrize("shape", [(2, 7, 2), (4, 7, 2), (3, 6, 2), (3, 8, 2), (3, 7, 1), (3, 7), (3, 7, 2, 1), (7, 2)])
def test_noise_has_a_latent_for_each_row_and_node(shape: tuple[int, ...]) -> None:
    model = build(GROWN)
    x, noise = observations(model, 3), torch.zeros(shape).double()
    message = f"noise must have one standard normal latent for each image and node, shape (3, 7, 2); found {shape}"
    for call in (model.elbo, model.posterior):
        refused(lambda call=call: call(x, noise=noise), ValueError, message)  # type: ignore[misc]


def test_noise_of_another_precision_is_taken() -> None:
    model = build(GROWN)
    x, noise = observations(model, 3), noise_for(model, 3).float()
    torch.testing.assert_close(model.elbo(x, noise=noise).elbo, model.elbo(x, noise=noise.double()).elbo)


def test_errors_leave_the_model_as_it_was() -> None:
    model = build(GROWN)
    x = observations(model, 3)
    before = model.elbo(x, generator=seeded()).elbo
    for bad in (x[:, :2], x * float("nan"), x.float(), x.int()):
        with pytest.raises((TypeError, ValueError)):
            model.elbo(bad)
    assert torch.equal(model.elbo(x, generator=seeded()).elbo, before)

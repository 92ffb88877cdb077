"""What every conditioner promises, whatever it says; and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conditioner_cases import LATENT, MAKERS, E, each, make, told
from models import GROWN

from treediff import TreeCondition
from treediff.diffusion import (
    LatentEmbedding,
    LeafWeightsEmbedding,
    NodeEmbedding,
    PathEncoder,
    PathTokens,
    ReconstructionConcat,
)


@each
def test_rows_do_not_know_of_each_other(name: str) -> None:
    module, condition = make(name), told()
    together = module(condition)
    for rows in (torch.tensor([5]), torch.tensor([2, 7, 0]), torch.arange(7, -1, -1)):
        for whole, part in zip(together, module(condition[rows]), strict=True):
            assert (whole is None) == (part is None)
            if whole is not None:
                torch.testing.assert_close(part, whole[rows])


@each
def test_an_empty_batch(name: str) -> None:
    for condition in (told()[:0], TreeCondition.at([])):
        empty, whole = make(name)(condition), make(name)(told())
        for found, expected in zip(empty, whole, strict=True):
            assert expected is None or found.shape == (0, *expected.shape[1:])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_weights(name: str, dtype: torch.dtype) -> None:
    module = make(name, dtype=dtype)
    assert {t.dtype for t in module.state_dict().values()} == {dtype}
    precise = make(name)
    precise.load_state_dict(module.state_dict())
    for condition in (told(), TreeCondition.at([0, 5])):
        for found, expected in zip(module(condition)[:4:3], precise(condition)[:4:3], strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                slack = (0.1 if dtype == torch.bfloat16 else 1e-5) * (1 + expected.abs().max().item())
                assert found.dtype == dtype and (found - expected).abs().max() < slack


@each
def test_is_built_on_the_meta_device(name: str) -> None:
    before, real = torch.get_rng_state(), make(name)
    module = MAKERS[name](GROWN, device="meta", dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(t.is_meta for t in module.state_dict().values())
    with torch.device("meta"):
        default = MAKERS[name](GROWN, dtype=torch.float64)
    for empty in (module, default):
        for key, tensor in real.state_dict().items():
            assert empty.state_dict()[key].shape == tensor.shape
    assert "object at 0x" not in repr(real)
    # The tables of the tree are no weights: they are there at once, wherever those are.
    assert not any(table.is_meta for table in default.buffers())


@each
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(name: str, training: bool) -> None:
    torch.compiler.reset()
    module, condition = make(name).train(training), told()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        for what in (condition, TreeCondition.at(condition.node)):
            for found, expected in zip(compiled(what), module(what), strict=True):
                assert (found is None) == (expected is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected)


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node", "weights", "latent", "path", "tokens", "all"])
def test_a_node_must_be_in_the_tree(name: str) -> None:
    with pytest.raises(KeyError, match="there is no node 77 in the tree"):
        make(name)(TreeCondition.at([0, 77]))


@pytest.mark.parametrize("name", ["latent", "path", "tokens"])
def test_latents_must_fit_the_tree(name: str) -> None:
    for shape in ((3, *LATENT), (5, *LATENT), (4, 4), (4, 2, 1, 1)):
        message = f"expected latents of shape (B, 4, 2, 1, 2), one for each step down the tree, found {(1, *shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            make(name)(TreeCondition(torch.tensor([5]), z=torch.zeros(1, *shape)))
    with pytest.raises(TypeError, match=re.escape("latent must be a tuple of numbers, found 4; write (4,) for one")):
        LatentEmbedding(GROWN, 4, E) if name == "latent" else PathEncoder(GROWN, 4, E)  # type: ignore[arg-type]


def test_weights_and_images_must_fit() -> None:
    message = "weights must have one column for each of the 4 leaves, found the shape (1, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        make("weights")(TreeCondition(torch.tensor([5]), weights=torch.ones(1, 3)))
    for shape in ((1, 3, 4), (2, 4, 3), (3, 4)):
        message = f"expected an image of shape (1, 2, 3, 4), found {(1, *shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            make("image")(TreeCondition(torch.tensor([5]), image=torch.zeros(1, *shape)))


@pytest.mark.parametrize("name", ["node", "weights", "latent", "path", "tokens"])
def test_widths_must_be_above_0(name: str) -> None:
    kinds: dict[str, Any] = {"node": NodeEmbedding, "weights": LeafWeightsEmbedding, "latent": LatentEmbedding}
    kind = {**kinds, "path": PathEncoder, "tokens": PathTokens}[name]
    arguments = (GROWN,) if name in ("node", "weights") else (GROWN, LATENT)
    with pytest.raises(ValueError, match="embedding must be at least 1, found 0"):
        kind(*arguments, 0)
    with pytest.raises(ValueError, match="channels must be at least 1, found 0"):
        ReconstructionConcat(0, 8)

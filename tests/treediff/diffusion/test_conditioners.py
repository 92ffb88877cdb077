"""Every conditioner against a loop over rows that follows its formula."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conditioner_cases import LATENT, MAKERS, SIZE, E, each, make, told
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, PRUNED
from pairs import conditions
from strategies import quick, topologies
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import seeded

from treediff import TreeCondition, TreeTopology
from treediff.diffusion import (
    Conditioner,
    Conditioners,
    LatentEmbedding,
    LeafWeightsEmbedding,
    NodeEmbedding,
    PathEncoder,
    PathTokens,
    ReconstructionConcat,
    Signal,
)

OTHER_ROOT = TreeTopology.from_children({7: (8, 2), 2: (None, 5), 5: (9, 3)}, root=7, next_id=11)  # no node 0
Rows = dict[str, Tensor]


# --- row by row ---------------------------------------------------------------------------------------------


def perceptron(layers: nn.Sequential, z: Tensor) -> Tensor:
    first, second = layers[0], layers[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return second.weight @ F.silu(first.weight @ z.flatten() + first.bias) + second.bias


def slow_row(part: nn.Module, tree: TreeTopology, row: TreeCondition, known: bool) -> Rows:
    """What a conditioner should say of one image, from the formulas of its docstring; tokens that may be read only."""
    node = int(row.node)
    position = {n: i for i, n in enumerate(tree.ids)}
    if isinstance(part, Conditioners):
        found = [slow_row(inner, tree, row, known) for inner in part.parts]
        vectors = [rows["vector"] for rows in found if "vector" in rows]
        joined = {k: [rows[k] for rows in found if k in rows] for k in ("tokens", "image")}
        return {"vector": sum(vectors[1:], vectors[0]), **{k: torch.cat(v) for k, v in joined.items() if v}}
    if isinstance(part, LeafWeightsEmbedding) and known:
        assert row.weights is not None
        vectors = [w * part.table.weight[position[leaf]] for w, leaf in zip(row.weights[0], tree.leaves, strict=True)]
        return {"vector": torch.stack(vectors).sum(0)}
    if isinstance(part, NodeEmbedding):
        return {"vector": part.table.weight[position[node]]}
    if isinstance(part, ReconstructionConcat):
        image = 2 * row.require_image()[0] - 1 if known else part.null * torch.ones(SIZE)
        if part.level is None:
            return {"image": image}
        level = row.noise_level if row.noise_level is not None else torch.zeros(1)
        return {"image": image, "vector": part.level(level if known else torch.ones(1))[0]}
    assert isinstance(part, LatentEmbedding | PathEncoder)
    path = tree.path(node)
    known = known and row.z is not None
    latents = [perceptron(part.embed, row.z[0, i]) if known else part.null for i in range(len(path))]  # type: ignore[index]
    if isinstance(part, LatentEmbedding):
        return {"vector": latents[-1]}
    steps = [part.table.weight[position[above]] + latent for above, latent in zip(path, latents, strict=True)]
    if isinstance(part, PathTokens):
        return {"tokens": torch.stack([step + part.depths[i] for i, step in enumerate(steps)])}
    return {"vector": torch.stack(steps).sum(0)}


def row_of(signal: Signal, i: int) -> Rows:
    found = {name: x[i] for name, x in signal._asdict().items() if x is not None and name != "mask"}
    if signal.tokens is not None:
        assert signal.mask is not None and signal.mask.dtype == torch.bool
        found["tokens"] = signal.tokens[i][signal.mask[i]]
    return found


def check_rows(module: Conditioner, tree: TreeTopology, condition: TreeCondition) -> None:
    signal, known = module(condition), condition.is_known().tolist()
    for i in range(len(condition)):
        found, expected = row_of(signal, i), slow_row(module, tree, condition[i : i + 1], known[i])
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


@quick
@given(st.sampled_from(list(MAKERS)), topologies(max_steps=6), st.integers(0, 2**20), st.booleans())
def test_equals_the_loop_over_rows(name: str, tree: TreeTopology, seed: int, level: bool) -> None:
    check_rows(make(name, tree, seed), tree, told(tree, 6, seed, level=level))


@each
@pytest.mark.parametrize("tree", [OTHER_ROOT, PRUNED, TreeTopology.balanced(0)], ids=["root 7", "pruned", "lone root"])
def test_equals_the_loop_on_special_trees(name: str, tree: TreeTopology) -> None:
    check_rows(make(name, tree), tree, told(tree))
    check_rows(make(name, tree), tree, replace(told(tree), known=None))
    check_rows(make(name, tree), tree, TreeCondition.at(tree.ids))


# --- what is not known --------------------------------------------------------------------------------------


@each
def test_a_row_without_details_is_told_like_a_node_alone(name: str) -> None:
    module, condition = make(name), told()
    hidden = module(replace(condition, known=torch.zeros(len(condition), dtype=torch.bool)))
    for found, alone in zip(hidden, module(TreeCondition.at(condition.node)), strict=True):
        assert (found is None) == (alone is None)
        assert found is None or torch.equal(found, alone)


def gradients(module: nn.Module, signal: Signal, rows: Tensor) -> dict[str, Tensor]:
    """Of a sum over some rows that weighs every number differently."""
    module.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for x in (signal.vector, signal.tokens, signal.image):
        if x is not None:
            x = x if x is not signal.tokens or signal.mask is None else torch.where(signal.mask[..., None], x, 0)
            weight = torch.randn(x.shape[1:], generator=seeded(3), dtype=torch.float64)
            total = total + (x[rows] * weight).sum()
    total.backward()
    return {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["image", "latent", "path", "tokens"])
def test_a_null_learns_from_rows_without_details_only(name: str) -> None:
    module, condition = make(name), told()
    known = condition.is_known()
    of_unknown, of_known = (gradients(module, module(condition), rows) for rows in (~known, known))
    assert of_unknown["null"].abs().min() > 0
    assert not of_known["null"].any()
    for key in of_known:
        if key.startswith("embed"):
            assert of_known[key].any() and not of_unknown[key].any()


@each
def test_what_is_not_known_never_matters_not_even_to_gradients(name: str) -> None:
    """Neither what comes after the node, nor what is in rows without details, were it NaN."""
    module, condition = make(name), told()
    known, depth = condition.is_known(), torch.tensor([GROWN.depth(n) for n in condition.node.tolist()])
    assert condition.z is not None and condition.image is not None and condition.weights is not None
    after = torch.arange(condition.z.shape[1]) > depth[:, None]
    nan = torch.tensor(float("nan"), dtype=torch.float64)

    def hide(part: Tensor, where: Tensor) -> Tensor:
        return torch.where(where.view(*where.shape, *[1] * (part.ndim - where.ndim)), nan, part)

    other = replace(
        condition,
        z=hide(condition.z, after | ~known[:, None]),
        image=hide(condition.image, ~known),
        weights=hide(condition.weights, ~known),
        noise_level=hide(condition.noise_level, ~known),  # type: ignore[arg-type]
    )
    for found, expected in zip(module(other), module(condition), strict=True):
        assert expected is None or torch.equal(found, expected)
    everyone = torch.ones(len(known), dtype=torch.bool)
    found, expected = (gradients(module, module(c), everyone) for c in (other, condition))
    assert found.keys() == expected.keys() == dict(module.named_parameters()).keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)
        assert grad.abs().max() > 0


def test_order_matters_to_tokens_and_not_to_the_latents_of_a_sum() -> None:
    condition = conditions(n=1, latent=LATENT, dtype=torch.float64)
    condition = replace(condition, node=torch.tensor([5]))  # three steps down
    assert condition.z is not None
    swapped = replace(condition, z=condition.z[:, [0, 2, 1, 3]])
    tokens, path = make("tokens"), make("path")
    torch.testing.assert_close(path(swapped).vector, path(condition).vector)
    first, second = tokens(condition).tokens[0], tokens(swapped).tokens[0]
    changed = (first - second).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, True, True, False]
    # Not the same tokens in another order: each knows whose it is.
    assert not any(torch.allclose(a, b) for a in first[1:3] for b in second[1:3])


# --- several as one -----------------------------------------------------------------------------------------


def test_vectors_are_added_and_the_rest_stands_side_by_side() -> None:
    parts = [make(name, seed=i) for i, name in enumerate(("node", "image", "path", "tokens", "image", "tokens"))]
    both, condition = Conditioners(*parts), told()
    signals: list[Signal] = [part(condition) for part in parts]
    found: Signal = both(condition)
    vectors, tokens, masks, pictures = (
        [part for signal in signals if (part := getattr(signal, field)) is not None]
        for field in ("vector", "tokens", "mask", "image")
    )
    torch.testing.assert_close(found.vector, vectors[0] + vectors[1])
    assert found.tokens is not None and torch.equal(found.tokens, torch.cat(tokens, 1)) and found.tokens.shape[1] == 8
    assert found.mask is not None and torch.equal(found.mask, torch.cat(masks, 1))
    assert found.image is not None and torch.equal(found.image, torch.cat(pictures, 1))
    assert both.channels == 4 and both.context == E
    assert Conditioners(Conditioners(parts[0]), parts[2])(condition).vector.equal(vectors[0] + vectors[1])


class Words(Conditioner):
    """Tokens that may all be read."""

    context = E

    def forward(self, condition: TreeCondition) -> Signal:
        return Signal(tokens=torch.ones(len(condition), 2, E))


def test_tokens_without_a_mask_may_be_read() -> None:
    signal = Conditioners(Words(), make("tokens"))(TreeCondition.at([0, 5]))
    assert signal.mask.tolist() == [[True, True, True, False, False, False], [True] * 6]


def test_nothing_together_is_nothing() -> None:
    nothing = Conditioners()
    assert nothing(told()) == Signal() and nothing.channels == 0 and nothing.context is None


def test_tokens_of_two_widths_do_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("tokens of all conditioners must have one width, found [3, 5]")):
        Conditioners(make("tokens"), PathTokens(GROWN, LATENT, 3))

"""The batched model against the plain loop over nodes, in values and in the gradient of every weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import GROWN, KINDS, PRUNED, build, few, louder, noise_for, observations
from strategies import topologies
from torch import Tensor

from treediff import ELBO, TreeTopology, TreeVAE
from treediff.testing import NaiveTreeVAE

TERMS = ("reconstruction", "kl_root", "kl_nodes", "kl_decisions")
BANKS = ("heads", "transitions", "posterior_routers", "prior_routers", "decoders")
TREES = {
    "lone root": TreeTopology.balanced(0),
    "chain": TreeTopology.chain(3),
    "one split": TreeTopology.balanced(1),
    "balanced": TreeTopology.balanced(3),
    "grown": GROWN,
    "pruned": PRUNED,
    "leaves of all depths": TreeTopology.balanced(1).split(2).split(4).split(6),
    "root passes through": TreeTopology.balanced(1).split(1).prune(2),
}


def weighted(elbo: ELBO) -> Tensor:
    """One number to differentiate, in which terms and rows all count differently."""
    rows = torch.arange(1, len(elbo.kl_root) + 1, dtype=elbo.kl_root.dtype)
    return sum((getattr(elbo, term) * rows).sum() * (i + 1) for i, term in enumerate(TERMS))  # type: ignore[return-value]


def gradients(model: TreeVAE, naive: NaiveTreeVAE) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Each weight's gradient in the model beside that in the loop."""
    for part in ("encoder", "bottom_up", "likelihood"):
        ours, plain = (dict(getattr(m, part).named_parameters()) for m in (model, naive))
        for name in ours | plain:
            yield f"{part}.{name}", ours[name].grad, plain[name].grad
    for role in BANKS:
        bank, modules = getattr(model.banks, role), getattr(naive, role)
        assert {str(node) for node in bank.nodes} == set(modules)
        for node in bank.nodes:
            flat = bank.weights_of(node).grad
            views = {} if flat is None else {name: view[0] for name, view in bank._views(flat[None]).items()}
            for name, parameter in modules[str(node)].named_parameters():
                yield f"{role}.{node}.{name}", views.get(name), parameter.grad


def check_equal(model: TreeVAE, n: int) -> None:
    x, noise, naive = observations(model, n), noise_for(model, n), NaiveTreeVAE(model)
    found, expected = model.elbo(x, noise=noise), naive.elbo(x, noise)
    for term in TERMS:
        assert getattr(found, term).shape == (n,)
        torch.testing.assert_close(getattr(found, term), getattr(expected, term), rtol=1e-9, atol=1e-9, msg=term)
    torch.testing.assert_close(found.kl, found.kl_root + found.kl_nodes + found.kl_decisions)
    torch.testing.assert_close(found.elbo, -(found.reconstruction + found.kl))
    if n:
        torch.testing.assert_close(found.loss(0.3), (found.reconstruction + 0.3 * found.kl).mean())
    weighted(found).backward()
    weighted(expected).backward()
    seen = 0
    for name, ours, plain in gradients(model, naive):
        zero = torch.zeros(()) if plain is None else torch.zeros_like(plain)
        ours, plain = (zero if g is None else g for g in (ours, plain))
        scale = 1 + plain.abs().max().item() if plain.numel() else 1
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9 * scale, msg=name)
        seen += bool(plain.any())
    assert n == 0 or seen > 10  # the comparison was one of numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_equals_the_loop_over_nodes(tree: TreeTopology, kind: str) -> None:
    check_equal(build(tree, kind), n=3)


@few
@given(topologies(max_steps=9), st.sampled_from(["vectors", "mlp", "maps"]), st.integers(0, 4), st.integers(0, 2**32))
def test_equals_the_loop_on_any_tree(tree: TreeTopology, kind: str, n: int, seed: int) -> None:
    check_equal(build(tree, kind, seed=seed), n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1])
def test_equals_the_loop_on_no_row_and_on_one(kind: str, n: int) -> None:
    check_equal(build(PRUNED, kind), n)


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_equals_the_loop_with_flat_and_with_sure_routers(factor: float) -> None:
    check_equal(louder(build(GROWN), factor, only="routers"), n=4)


def test_equals_the_loop_after_growing_and_pruning_the_model_itself() -> None:
    model = build(TreeTopology.balanced(1))
    generator = torch.Generator().manual_seed(5)
    left, _ = model.split(2, generator=generator)
    model.split(left, warm_start=True, generator=generator)
    model.prune(1)
    check_equal(model, n=3)


def test_rows_do_not_see_each_other() -> None:
    model = build(PRUNED, "maps")
    x, noise = observations(model, 5), noise_for(model, 5)
    together = model.elbo(x, noise=noise).elbo
    alone = torch.cat([model.elbo(x[i : i + 1], noise=noise[i : i + 1]).elbo for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_agrees_with_float64(kind: str) -> None:
    model = build(PRUNED, kind)
    x, noise = observations(model, 3), noise_for(model, 3)
    exact = model.elbo(x, noise=noise).elbo
    found = model.float().elbo(x.float(), noise=noise.float()).elbo
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)

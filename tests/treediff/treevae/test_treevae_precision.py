"""Under torch.compile, autocast and in other precisions; and copies of a model, which share nothing with it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from models import GROWN, PRUNED, build, louder, noise_for, observations
from torch import Tensor
from worlds import seeded

from treediff import ELBO, TreeTopology, TreeVAE

TERMS = ("reconstruction", "kl_root", "kl_nodes", "kl_decisions")
CASES = {
    "vectors": ("vectors", PRUNED),
    "maps": ("maps", PRUNED),
    "chain": ("conv", TreeTopology.chain(1)),
}
each_case = pytest.mark.parametrize(("kind", "tree"), CASES.values(), ids=CASES)


def gradients(model: TreeVAE, elbo: ELBO) -> dict[str, Tensor]:
    model.zero_grad()
    elbo.loss(0.5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- torch.compile ------------------------------------------------------------------------------------------


@each_case
def test_the_elbo_compiles_into_one_graph(kind: str, tree: TreeTopology) -> None:
    model = build(tree, kind, dtype=torch.float32)
    x, noise = observations(model, 3), noise_for(model, 3)

    def elbo(x: Tensor, noise: Tensor) -> ELBO:
        return model.elbo(x, noise=noise)

    torch.compiler.reset()
    # The backend that runs the traced graph as it is: whatever differs, tracing did it.
    compiled = torch.compile(elbo, fullgraph=True, backend="eager")
    found, expected = compiled(x, noise), elbo(x, noise)
    for term in TERMS:
        torch.testing.assert_close(getattr(found, term), getattr(expected, term), rtol=1e-5, atol=1e-5, msg=term)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_compiled_elbo_follows_weights_and_tree() -> None:
    model = build(TreeTopology.balanced(1), dtype=torch.float32).eval()
    x = observations(model, 3)

    def step(noise: Tensor) -> Tensor:
        return model.elbo(x, noise=noise).elbo

    with torch.no_grad():
        step(noise_for(model, 3))  # a layout of the tree is kept from now on
        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        for change in (lambda: None, lambda: louder(model, 1.2), lambda: model.split(2)):
            change()
            noise = noise_for(model, 3)
            torch.testing.assert_close(compiled(noise), step(noise))


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vectors", "mlp", "conv", "maps", "colour"])
def test_the_elbo_trains_under_bfloat16_autocast(kind: str) -> None:
    model = build(PRUNED, kind, dtype=torch.float32)
    x, noise = observations(model, 4), noise_for(model, 4)
    exact = model.elbo(x, noise=noise)
    true = gradients(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.elbo(x, noise=noise)
    for term in TERMS:
        # Three digits, of terms of the size of the bound.
        close = {"rtol": 0.03, "atol": 0.03 * (1 + exact.elbo.abs().max().item())}
        torch.testing.assert_close(getattr(found, term).float(), getattr(exact, term), **close, msg=term)
    assert found.reconstruction.dtype == torch.float32 and found.kl_decisions.dtype == torch.float32
    rough = gradients(model, found)
    assert rough.keys() == true.keys()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in rough.values())
    flat, other = (torch.cat([g[name].flatten() for name in true]) for g in (true, rough))
    assert torch.cosine_similarity(flat, other, dim=0) > 0.98


def test_under_autocast_observations_may_be_of_low_precision() -> None:
    model = build(PRUNED, "mlp", dtype=torch.float32)
    x = observations(model, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.elbo(x, generator=seeded()).elbo.isfinite().all()
        probabilities = model.leaf_log_probs(x).exp().sum(1)
    torch.testing.assert_close(probabilities, torch.ones(3))  # added up in float32, whatever the routers use


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_can_change_its_precision(dtype: torch.dtype) -> None:
    model = build(GROWN, "maps", dtype=torch.float32)
    x = observations(model, 3)
    expected = model.leaf_log_probs(x)
    model.to(dtype)
    assert model.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    found = model.leaf_log_probs(x.to(dtype))
    rough = dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05 if rough else 1e-5, atol=0.05 if rough else 1e-5)
    assert model.sample(2, generator=seeded()).images.dtype == dtype
    model.split(4, generator=seeded())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.elbo(x.to(dtype), generator=seeded()).elbo.isfinite().all()


# --- copies -------------------------------------------------------------------------------------------------


def by_deepcopy(model: TreeVAE) -> TreeVAE:
    return copy.deepcopy(model)


def by_pickle(model: TreeVAE) -> TreeVAE:
    copied: TreeVAE = pickle.loads(pickle.dumps(model))
    return copied


def by_state(model: TreeVAE) -> TreeVAE:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    twin = build(model.topology, seed=9)
    twin.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return twin


@pytest.mark.parametrize("make", [by_deepcopy, by_pickle, by_state])
def test_a_copy_is_equal_and_on_its_own(make: Any) -> None:  # noqa: ANN401
    model = build(PRUNED)
    x, noise = observations(model, 3), noise_for(model, 3)
    model.eval()
    with torch.no_grad():
        before = model.elbo(x, noise=noise).elbo
        twin = make(model)
        assert twin.topology == model.topology and twin.config == model.config
        assert torch.equal(twin.elbo(x, noise=noise).elbo, before)
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert not torch.isclose(twin.elbo(x, noise=noise).elbo, before).any()
    twin.split(7)
    twin.prune(6)
    with torch.no_grad():
        assert torch.equal(model.elbo(x, noise=noise).elbo, before)
    assert model.topology == PRUNED and twin.topology.leaves == (8, 9, 10)


def test_results_can_be_copied() -> None:
    model = build(PRUNED)
    with torch.no_grad():
        posterior = model.posterior(observations(model, 3), generator=seeded())
    for twin in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert torch.equal(twin.leaf_log_probs(), posterior.leaf_log_probs())
        assert torch.equal(twin.latents(8), posterior.latents(8))
    assert "TreeTopology(0(1(4(7 8)) 2(6)), next_id=9)" in repr(model)

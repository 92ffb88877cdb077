"""State that growth leaves behind: which parameters are frozen, and optimisers that miss new nodes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from growing import SETTINGS, blobs, small

from treediff import EMA, TreeGrowth, TreeTopology, TreeVAE
from treediff.core.checkpoint import save_checkpoint


def frozen(model: TreeVAE) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


@pytest.mark.parametrize("stages", [1, 2, 3, 99])
def test_a_loop_that_is_left_early_leaves_nothing_frozen(stages: int) -> None:
    model = small()
    growth = TreeGrowth(model, **{**SETTINGS, "max_leaves": 4})
    for number, _ in enumerate(growth.stages(blobs(30, 30, 30)), 1):
        if number == stages:
            break
    assert frozen(model) == set()


def test_what_its_owner_froze_stays_frozen_and_untouched() -> None:
    model, data = small(), blobs(30, 30, 30)
    model.encoder.requires_grad_(False)
    own, before = frozen(model), {name: w.clone() for name, w in model.encoder.state_dict().items()}
    growth = TreeGrowth(model, **{**SETTINGS, "max_leaves": 4})
    kinds = set()
    for stage in growth.stages(data):
        kinds.add(stage.kind)
        assert own <= frozen(model) and not {id(w) for w in model.encoder.parameters()} & {
            id(w) for w in stage.parameters()
        }
        optimizer = torch.optim.Adam(stage.parameters(), lr=0.01)
        stage.loss(data[stage.rows]).backward()
        optimizer.step()
    assert {"initial", "final"} <= kinds and len(kinds) > 2
    assert frozen(model) == own
    assert all(torch.equal(w, before[name]) for name, w in model.encoder.state_dict().items())


def steps(model: TreeVAE, optimizer: torch.optim.Optimizer, count: int) -> None:
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        optimizer.zero_grad()
        model.elbo(x, generator=torch.Generator().manual_seed(0)).loss().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimiser_that_misses_new_nodes_is_named(fused: bool) -> None:
    model = TreeVAE.for_vectors(features=3, width=8, latent=2, topology=TreeTopology.balanced(1))
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    model.split(1)
    with pytest.warns(UserWarning, match=r"the weights of node \d had 50 gradients and did not change; an optimiser"):
        steps(model, optimizer, 50)
    model.split(2)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 60)


def test_the_state_of_a_run_is_not_saved_with_averages_in_the_place_of_weights(tmp_path: object) -> None:
    model = small()
    ema = EMA(model)
    with ema.average(), pytest.raises(ValueError, match=r"save the state of a run outside of ema\.average"):
        save_checkpoint(f"{tmp_path}/a", {"model": model, "ema": ema})


def test_an_average_follows_the_model_to_another_dtype() -> None:
    model, plain = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    plain.load_state_dict(model.state_dict())
    ema = EMA(model, decay=0.5, warm_up=False)
    model.double()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    assert ema.weights["weight"].dtype == torch.float64
    torch.testing.assert_close(ema.weights["weight"], plain.weight.double() + 0.5)


def test_weights_that_are_exchanged_through_data_are_seen_at_once() -> None:
    """As averages of other libraries do."""
    model = TreeVAE.for_vectors(features=3, width=8, latent=2, topology=TreeTopology.balanced(2)).eval()
    x, noise = torch.rand(5, 3), torch.zeros(5, 7, 2)
    with torch.no_grad():
        model.elbo(x, noise=noise)
        for weight in model.parameters():
            weight.data.copy_(weight.data * 1.5)
        found = model.elbo(x, noise=noise).elbo
        twin = TreeVAE.for_vectors(features=3, width=8, latent=2, topology=TreeTopology.balanced(2)).eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(found, twin.elbo(x, noise=noise).elbo)


def test_an_entry_of_a_tensor_of_ids_is_a_node() -> None:
    model = TreeVAE.for_vectors(features=3, width=8, latent=2, topology=TreeTopology.balanced(1))
    leaf = model.cluster(torch.rand(4, 3))[0]
    tree = model.topology
    assert tree.path(leaf) == tree.path(int(leaf)) and tree.parent(np.int64(leaf)) == 0
    assert torch.equal(
        model.sample(2, node=leaf, generator=torch.Generator().manual_seed(0)).images,  # type: ignore[arg-type]
        model.sample(2, node=int(leaf), generator=torch.Generator().manual_seed(0)).images,
    )
    for wrong in (True, 1.0, torch.tensor([1, 2]), "1", None):
        with pytest.raises(KeyError, match="is not in the tree; its nodes are"):
            tree.path(wrong)  # type: ignore[arg-type]
    children = model.split(leaf)  # type: ignore[arg-type]
    assert children == model.topology.children(leaf) and all(type(child) is int for child in children)

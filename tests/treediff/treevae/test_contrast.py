"""The contrastive terms of a TreeVAE, against a loop over levels and routers."""

import pytest
import torch
from torch.nn import functional as F

from treediff import Stage, TreeContrast, TreeTopology, TreeVAE
from treediff.growth import KLAnnealing
from treediff.layers import nt_xent

TREE = TreeTopology.balanced(2).split(4)


@pytest.fixture
def model() -> TreeVAE:
    generator = torch.Generator().manual_seed(0)
    made = TreeVAE.for_images(size=8, channels=3, latent=4, width=16, topology=TREE, generator=generator)
    with torch.no_grad():  # routers that have made up their minds, or every reach would be alike
        for node in made.banks.posterior_routers.nodes:
            made.banks.posterior_routers.named_weights(node)["logit.weight"].mul_(8)
    return made.double()


def views(pairs: int = 5) -> torch.Tensor:
    return torch.rand(2 * pairs, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def naive_decisions(model: TreeVAE, ladder: list[torch.Tensor], only: int | None = None) -> torch.Tensor:
    """Node by node with plain probabilities: every item against every other, weighted by its reach."""
    reach = {model.topology.root: torch.ones(len(ladder[0]), dtype=torch.float64)}
    total = torch.zeros((), dtype=torch.float64)
    half = len(ladder[0]) // 2
    for node in model.topology:
        children = model.topology.children(node)
        if len(children) != 2:
            continue
        left = torch.sigmoid(model.banks.posterior_routers.module(node)(ladder[model.topology.depth(node)]))
        units = F.normalize(torch.stack([left, 1 - left], 1))
        similar = (units @ units.T).exp().fill_diagonal_(0)
        partner = torch.arange(2 * half).roll(half)
        losses = similar.sum(1).log() - (units * units[partner]).sum(1)
        if only in (None, node):
            total = total + (reach[node] * losses).sum() / reach[node].sum()
        reach |= {children[0]: reach[node] * left, children[1]: reach[node] * (1 - left)}
    return total


@pytest.mark.parametrize("decision_weight", [None, 0.0, 5.0])
def test_both_terms_are_those_of_the_loop(model: TreeVAE, decision_weight: float | None) -> None:
    seed = torch.Generator().manual_seed(0)
    contrast = TreeContrast(model, weight=3.0, decision_weight=decision_weight, temperature=0.7, generator=seed)
    ladder = model.features(views())
    levels = [nt_xent(*h(d).split(5), temperature=0.7) for h, d in zip(contrast.heads, ladder, strict=True)]
    weight = 3.0 if decision_weight is None else decision_weight
    expected = 3 * sum(levels) / len(levels) + weight * naive_decisions(model, ladder)
    torch.testing.assert_close(contrast(ladder, model.route(ladder)), expected)


@pytest.mark.parametrize("split", TREE.routed)
def test_one_split_alone(model: TreeVAE, split: int) -> None:
    ladder = model.features(views())
    nodes = (*TREE.path(split), *TREE.children(split))
    found = TreeContrast(model, weight=1.0)(ladder, model.route(ladder, nodes=nodes), splits=(split,))
    torch.testing.assert_close(found, naive_decisions(model, ladder, only=split))


def test_several_splits_count_as_the_sum_of_each(model: TreeVAE) -> None:
    ladder, contrast = model.features(views()), TreeContrast(model, weight=1.0)
    visits = model.route(ladder)
    alone = [contrast(ladder, visits, splits=(split,)) for split in TREE.routed[-2:]]
    torch.testing.assert_close(contrast(ladder, visits, splits=TREE.routed[-2:]), torch.stack(alone).sum())


@pytest.mark.parametrize("split", [None, 4])
def test_a_stage_adds_it_to_the_negative_elbo(model: TreeVAE, split: int | None) -> None:
    contrast = TreeContrast(model, weight=2.0)
    kind = "final" if split is None else "subtree"
    stage = Stage(model, kind, 0, 1, torch.arange(5), KLAnnealing.constant(), () if split is None else (split,))
    x = views()
    first, second = x.chunk(2)
    alone, both = (
        stage.loss(first, 0.5, generator=torch.Generator().manual_seed(7), **extra)
        for extra in ({}, {"view": second, "contrast": contrast})
    )
    ladder = model.features(x)
    nodes = None if split is None else (*TREE.path(split), *TREE.children(split))
    torch.testing.assert_close(
        both - alone, contrast(ladder, model.route(ladder, nodes=nodes), splits=() if split is None else (split,))
    )
    both.backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in stage.parameters())
    assert all((p.grad is not None) == (split is None) for p in contrast.parameters())


def test_the_same_seed_gives_the_same_heads_and_the_global_state_is_left_alone(model: TreeVAE) -> None:
    state = torch.get_rng_state()
    first, second = (TreeContrast(model, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in first.parameters()} == {torch.float64}
    assert "weight=100.0" in repr(first)


def test_no_images_cost_nothing(model: TreeVAE) -> None:
    ladder = model.features(views(0))
    assert TreeContrast(model)(ladder, model.route(ladder)) == 0


def test_a_view_and_a_contrast_go_together(model: TreeVAE) -> None:
    stage = Stage(model, "final", 0, 1, torch.arange(5), KLAnnealing.constant())
    x, contrast = views()[:5], TreeContrast(model)
    with pytest.raises(ValueError, match=r"view and contrast go together.* found a view of none and a contrast"):
        stage.loss(x, contrast=contrast)
    with pytest.raises(ValueError, match=r"view and contrast go together.* and no contrast"):
        stage.loss(x, view=x)
    with pytest.raises(ValueError, match=r"a view has the shape of x, \(5, 3, 8, 8\); found a view of \(4, 3, 8, 8\)"):
        stage.loss(x, view=x[:4], contrast=contrast)
    with pytest.raises(ValueError, match="must be finite"):
        stage.loss(x, view=x * torch.nan, contrast=contrast)


def test_rows_without_a_partner_are_an_error(model: TreeVAE) -> None:
    contrast, ladder = TreeContrast(model), model.features(views()[:5])
    with pytest.raises(ValueError, match=r"first views and then the second views .* found 5 rows"):
        contrast(ladder, model.route(ladder))
    with pytest.raises(ValueError, match="weight must be finite and at least 0, found -1"):
        TreeContrast(model, weight=-1)
    with pytest.raises(ValueError, match="decision_weight must be finite and at least 0, found nan"):
        TreeContrast(model, decision_weight=torch.nan)


@pytest.mark.parametrize("split", [None, 4])
def test_a_threshold_leaves_no_decision_out_of_it(model: TreeVAE, split: int | None) -> None:
    contrast, x = TreeContrast(model, weight=2.0), views()
    kind = "final" if split is None else "subtree"
    stage = Stage(
        model, kind, 0, 1, torch.arange(5), KLAnnealing.constant(), () if split is None else (split,), threshold=0.3
    )
    first, second = x.chunk(2)
    alone, both = (
        stage.loss(first, generator=torch.Generator().manual_seed(7), **extra)
        for extra in ({}, {"view": second, "contrast": contrast})
    )
    ladder = model.features(x)
    if split is None:
        heads = zip(contrast.heads, ladder, strict=True)
        levels = [nt_xent(*head(d).split(5), temperature=contrast.temperature) for head, d in heads]
        expected = 2 * (sum(levels) / len(levels) + naive_decisions(model, ladder))
    else:
        expected = 2 * naive_decisions(model, ladder, only=split)
    torch.testing.assert_close(both - alone, expected)


def test_visits_that_a_threshold_thinned_out_are_an_error(model: TreeVAE) -> None:
    ladder = model.features(views())
    visits = model.route(ladder, threshold=0.3)
    message = rf"every row must visit every node; found {len(visits.node)} visits of 10 rows to {len(TREE)} nodes"
    with pytest.raises(ValueError, match=message):
        TreeContrast(model)(ladder, visits)
    TreeContrast(model, decision_weight=0.0)(ladder, visits)

"""The cut with which a split begins: what it looks at, and how well the router learns it."""

import copy
from typing import Any

import pytest
import torch
from growing import blobs, growth_of, small
from torch import Tensor, nn
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.growth.cut import cut_router, normalized_cut
from treediff.layers import Router


def sides(model: TreeVAE, x: Tensor) -> Tensor:
    """Which rows go left at the root."""
    return model.cluster(x) == model.topology.children(0)[0]


def agreement(one: Tensor, other: Tensor) -> float:
    same = (one == other).double().mean().item()
    return max(same, 1 - same)


def shuffled(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Rows that keep their second and third number, with first numbers dealt anew."""
    return torch.cat([x[torch.randperm(len(x), generator=generator), :1], x[:, 1:]], 1)


@pytest.mark.parametrize("on", ["inputs", "features"])
def test_a_cut_is_made_where_it_is_asked_for(on: str) -> None:
    x, model = blobs(60, 60, 60, 60), small(width=32)
    cut_router(model, 0, x, on=on, generator=seeded(0))
    where = x if on == "inputs" else model.features(x)[0]
    assert agreement(sides(model, x), normalized_cut(where)) > 0.98


def test_the_smaller_side_has_the_share_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    monkeypatch.setattr(
        "treediff.growth.cut.normalized_cut", lambda *a, **k: found.append(normalized_cut(*a, **k)) or found[-1]
    )
    for min_share in (0.05, 0.3):
        cut_router(small(), 0, blobs(20, 180), min_share=min_share, generator=seeded(0))
    few, more = (min(int(side.sum()), int((~side).sum())) for side in found)
    assert few == 20
    assert more >= 60


def test_views_reach_the_cut_batch_by_batch_from_the_generator() -> None:
    x, model = blobs(60, 60, 60, 60), small(width=32)
    wide = x[:, 0] > 0
    cut_router(model, 0, x, generator=seeded(1))
    assert agreement(sides(model, x), wide) > 0.98  # the widest gap
    # Where first numbers do not matter, the second widest gap is left.
    cut_router(model, 0, x, augment=shuffled, views=6, batch_size=100, generator=seeded(1))
    generator = seeded(1)
    views = [torch.cat([shuffled(part, generator=generator) for part in x.split(100)]) for _ in range(6)]
    assert agreement(sides(model, x), normalized_cut(x, views=views)) > 0.98
    assert agreement(sides(model, x), x[:, 1] > 0) > 0.98


def test_a_function_says_what_is_cut() -> None:
    x, model = blobs(60, 60, 60, 60), small(width=32)
    seen: list[tuple[int, ...]] = []

    def second(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape))
        return part[:, 1:2]

    cut_router(model, 0, x, on=second, batch_size=100, generator=seeded(1))
    assert agreement(sides(model, x), x[:, 1] > 0) > 0.98, "the router reads its own features"
    assert set(seen) == {(100, 3), (40, 3)}
    cut_router(model, 0, x, on=lambda part: part[:, 1:2], augment=shuffled, views=2, generator=seeded(1))
    assert agreement(sides(model, x), x[:, 1] > 0) > 0.98
    growth = growth_of(small(width=32), cut_on=second)
    next(growth.stages(x))


def test_a_growth_hands_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "treediff.growth.growth.cut_router", lambda _, node, x, **given: seen.append({"n": len(x), **given})
    )
    growth = growth_of(small(), cut_on="features", augment=shuffled, views=3, cut_share=0.3, cut_rows=50, batch_size=7)
    next(growth.stages(blobs(40, 40)))
    assert [{name: call[name] for name in call if name != "generator"} for call in seen] == [
        {
            "n": 50,
            "on": "features",
            "augment": shuffled,
            "views": 3,
            "neighbours": 10,
            "min_share": 0.3,
            "batch_size": 7,
        }
    ]


class Linear(nn.Module):
    """A linear router that is no `Router`; the dropout is not there when it is fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 1), nn.Dropout(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x)).squeeze(1)


def with_router(router: nn.Module) -> TreeVAE:
    return TreeVAE.for_vectors(
        features=3, latent=2, width=8, topology=TreeTopology.balanced(1), posterior_router=router, generator=seeded(0)
    )


def test_a_router_of_another_class_learns_the_cut_that_a_router_learns() -> None:
    x, ours, theirs = blobs(60, 60, 60, 60), with_router(Router((8,), ())), with_router(Linear())
    before = ours.banks.posterior_routers.weights_of(0).clone()
    assert torch.equal(before, theirs.banks.posterior_routers.weights_of(0))
    state = torch.get_rng_state()
    for model in (ours, theirs):
        cut_router(model, 0, x, on="features", generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    found = theirs.banks.posterior_routers.weights_of(0)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, ours.banks.posterior_routers.weights_of(0))
    assert agreement(sides(theirs, x), normalized_cut(theirs.features(x)[0])) > 0.98


def test_a_router_without_weights_stays_as_it_is() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

    model, x = with_router(First()), blobs(20, 20)
    before = model.leaf_log_probs(x)
    cut_router(model, 0, x, generator=seeded(0))
    assert torch.equal(model.leaf_log_probs(x), before)


def test_a_cut_of_something_else_is_an_error() -> None:
    with pytest.raises(ValueError, match="on must be 'inputs', 'features' or a function, found 'latents'"):
        cut_router(small(), 0, blobs(20, 20), on="latents")


def test_a_node_without_router_and_a_lone_row_are_errors() -> None:
    model = small(TreeTopology.balanced(1))
    with pytest.raises(KeyError, match="1"):
        cut_router(model, 1, blobs(20, 20))
    with pytest.raises(ValueError, match="two clusters need at least 2 points, found 1"):
        cut_router(model, 0, blobs(1))


# --- Router.fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_router_learns_a_cut_that_no_plane_makes_and_is_as_sure_as_asked(dtype: torch.dtype) -> None:
    x = torch.randn(2000, 2, generator=seeded(0), dtype=dtype)
    left = (x[:, 0] > 0) == (x[:, 1] > 0)
    torch.manual_seed(0)
    router = Router((2,), (64,)).to(dtype)
    router.fit(x, left, confidence=0.9, generator=seeded(1))
    prob = router(x).sigmoid()
    assert ((prob > 0.5) == left).double().mean() > 0.97
    assert prob[left].median().item() == pytest.approx(0.9, abs=0.03)


def test_a_fit_depends_on_its_generator_and_leaves_the_global_state() -> None:
    x = torch.randn(3000, 4, generator=seeded(0))
    torch.manual_seed(0)
    first = Router((4,))
    routers = [copy.deepcopy(first) for _ in range(3)]
    for router, seed in zip(routers, (1, 1, 2), strict=True):
        state = torch.get_rng_state()
        with torch.no_grad():
            router.fit(x, x[:, 0] > 0, steps=5, generator=seeded(seed))
        assert torch.equal(torch.get_rng_state(), state)
    weights = [router.get_parameter("logit.weight") for router in routers]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_fit_of_nothing_or_without_a_side_for_each_is_an_error() -> None:
    router = Router((3,))
    for x, left in ((torch.zeros(0, 3), torch.zeros(0)), (torch.zeros(4, 3), torch.zeros(3))):
        with pytest.raises(ValueError, match="a cut needs at least one input and one boolean for each"):
            router.fit(x, left.bool())
    with pytest.raises(ValueError, match=r"confidence must be above 0\.5 and below 1, found 1"):
        router.fit(torch.zeros(4, 3), torch.ones(4).bool(), confidence=1)

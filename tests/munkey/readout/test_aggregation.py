"""Aggregations against their formulas, neighbour by neighbour."""

from __future__ import annotations

import re

import pytest
import torch
from stores import seeded
from torch import Tensor

from munkey import Classification, Ensemble, RankMix, Retrieved, SoftmaxMix
from munkey.readout.aggregate import AGGREGATIONS, Aggregation, Attend

B, K, V, N = 5, 4, 3, 6
WEIGHT = torch.randn(V, N, generator=seeded(9))
average_of = Classification(N).average


def found(there: list[int]) -> Retrieved:
    """Neighbours of queries of which some have fewer than `K`."""
    tokens, scores = torch.randn(B, K, V, generator=seeded()), torch.rand(B, K, generator=seeded(1)).double()
    ids = torch.arange(B * K).view(B, K)
    for b, count in enumerate(there):
        tokens[b, count:], scores[b, count:], ids[b, count:] = 0.5, -torch.inf, -1
    return Retrieved(tokens, scores.sort(1, descending=True).values, ids)


def predict(values: Tensor, there: Tensor | None = None) -> Tensor:
    return (3 * values).sin() @ WEIGHT


def one(values: Tensor) -> Tensor:
    return predict(values[None, None])[0, 0]


NULL = one(torch.full((V,), 0.5))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_ensemble(average: str) -> None:
    near = found([4, 3, 1, 0, 2])
    got = Ensemble(average)(near, predict, average_of)
    for b, count in enumerate([4, 3, 1, 0, 2]):
        runs = torch.stack([one(near.tokens[b, j]) for j in range(count)] or [NULL])
        expected = runs.softmax(1).mean(0).log() if average == "probabilities" else runs.mean(0)
        torch.testing.assert_close(got[b], expected)


@pytest.mark.parametrize("kind", ["softmax", "rank"])
def test_mixtures(kind: str) -> None:
    near = found([4, 3, 1, 0, 2])
    mix: Aggregation = SoftmaxMix(0.2) if kind == "softmax" else RankMix(K)
    if isinstance(mix, RankMix):
        mix.weights.data = torch.tensor([0.3, -1.0, 2.0, 0.0])
    got, tokens = mix(near, predict, average_of), mix.one(near, torch.zeros(B))
    for b, count in enumerate([4, 3, 1, 0, 2]):
        if not count:
            token = torch.full((V,), 0.5)
        else:
            logits = near.scores[b, :count].float() / 0.2 if kind == "softmax" else mix.weights[:count]  # type: ignore[index]
            token = sum(w * near.tokens[b, j] for j, w in enumerate(logits.softmax(0)))  # type: ignore[assignment,misc]
        torch.testing.assert_close(tokens[b], token[None])
        torch.testing.assert_close(got[b], one(token))


def test_an_ensemble_trains_any_neighbour_there_is_and_all_equally_often() -> None:
    near = found([4, 3, 1, 0, 2])
    seen = torch.zeros(B, K)
    for number in torch.arange(0, 1, 1 / 600):
        picked = Ensemble().one(near, number.expand(B))
        for b in range(B):
            seen[b, int((near.tokens[b] == picked[b]).all(1).nonzero()[0])] += 1
    assert seen.tolist() == [[150, 150, 150, 150], [200, 200, 200, 0], [600, 0, 0, 0], [600, 0, 0, 0], [300, 300, 0, 0]]


def test_all_neighbours_are_read_at_once() -> None:
    near, seen = found([4, 3, 1, 0, 2]), []

    def predict(values: Tensor, there: Tensor) -> Tensor:
        seen.extend((values, there))
        return values.sum((2, 3))[..., None].expand(-1, -1, N)

    got = Attend()(near, predict, average_of)
    assert seen[1].sum(2)[:, 0].tolist() == [4, 3, 1, 1, 2], "without neighbours, the null token"
    assert torch.equal(seen[0], near.tokens[:, None]) and torch.equal(Attend().one(near, torch.zeros(B)), near.tokens)
    torch.testing.assert_close(got, near.tokens.sum((1, 2))[:, None].expand(-1, N))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_gradients_are_finite_where_nothing_is_near(name: str) -> None:
    near, aggregation = found([0, 4, 0, 2, 1]), AGGREGATIONS[name](K)
    tokens = near.tokens.clone().requires_grad_()
    aggregation(Retrieved(tokens, near.scores, near.ids), predict, average_of).sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in aggregation.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Ensemble("votes"), ValueError, "average must be 'probabilities' or 'logits', found 'votes'"),
        (lambda: SoftmaxMix(0.0), ValueError, "temperature must be above 0, found 0.0"),
        (lambda: RankMix(0), ValueError, "count must be at least 1, found 0"),
        (
            lambda: RankMix(2)(found([4] * 5), predict, average_of),
            ValueError,
            "there are weights for 2 neighbours, found 4",
        ),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()  # type: ignore[operator]

"""Features on disk: computed once, of one encoder, and erased by what forgets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from stores import seeded
from torch import Tensor, nn

from munkey import FeatureCache, KeyMemoryTransformer, ModuleEncoder, Projection


class Counting(nn.Module):
    """A network that counts its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x[:, :3] * 2


X = torch.rand(600, 4, generator=seeded())


def test_features_are_computed_once_and_are_those_of_the_encoder(tmp_path: Path) -> None:
    network = Counting()
    encoder, seen = ModuleEncoder(network, 3, fitted_on="other data"), []

    def progress(batches: range) -> range:
        seen.append(len(batches))
        return batches

    with FeatureCache(tmp_path, encoder) as cache:
        found = cache(range(600), X, progress=progress)  # type: ignore[arg-type]
        assert torch.equal(found, encoder.keys(X)) and seen == [3]
        network.seen.clear()
        assert torch.equal(cache([5, 599, 0]), found[[5, 599, 0]]) and not network.seen
        assert torch.equal(cache([700, 3], X[[1, 3]]), found[[1, 3]]) and sum(network.seen) == 1
    with FeatureCache(tmp_path, encoder) as again:
        assert len(again) == 601 and 700 in again and 701 not in again
        assert torch.equal(again(range(600)), found)


def test_what_a_model_forgets_is_erased_from_the_medium_before_it_is_gone(tmp_path: Path) -> None:
    encoder = Projection.random((4,), 3)
    with FeatureCache(tmp_path, encoder) as cache:
        features = cache(range(20), X[:20])
        model = KeyMemoryTransformer.for_features(features=3, classes=2)
        model.remember(range(20), features, torch.arange(20) % 2)
        cache.follow(model.memory.store)
        piece = features[7].numpy().tobytes()
        assert piece in (tmp_path / "features").read_bytes()
        model.forget([7, 8])
        assert piece not in (tmp_path / "features").read_bytes()
        assert 7 not in cache and 9 in cache and len(cache) == 18
        model.remember([30], features[:1], torch.tensor([0]))
        model.forget([30])  # never in the cache
        model.memory.store.unfollow(cache)
        model.forget([9])
        assert 9 in cache


def test_a_cache_that_cannot_erase_stops_the_forgetting(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, Projection.random((4,), 3))
    model = KeyMemoryTransformer.for_features(features=3, classes=2)
    model.remember(range(4), cache(range(4), X[:4]), torch.arange(4) % 2)
    cache.follow(model.memory.store)
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        model.forget([1])
    assert 1 in model.memory.store and len(model.memory.store) == 4


def test_what_is_refused(tmp_path: Path) -> None:
    with FeatureCache(tmp_path, Projection.random((4,), 3)) as cache:
        cache([1, 2], X[:2])
        with pytest.raises(KeyError, match="1 of the ids are not in the cache; pass their inputs"):
            cache([1, 3])
        with pytest.raises(ValueError, match="expected one id for each of 2 inputs, found 1"):
            cache([1], X[:2])
        with pytest.raises(BlockingIOError):
            FeatureCache(tmp_path, Projection.random((4,), 3))
    with pytest.raises(ValueError, match=re.escape("holds features of an encoder with fingerprint")):
        FeatureCache(tmp_path, Projection.random((4,), 3, seed=1))

"""What tests of files begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from durables import create
from rank_pool import RankPool


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one store, not open."""
    folder = tmp_path_factory.mktemp("filled")
    with create(folder / "store") as store:
        store.forget([11])  # so that there is room
    return folder


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], RankPool]]:
    """So many ranks; they are started once."""
    made: list[RankPool] = []

    @cache
    def pool(size: int) -> RankPool:
        made.append(RankPool(size))
        return made[-1]

    yield pool
    for each in made:
        each.close()


@pytest.fixture(params=[1, 2, 3])
def pool(pools: Callable[[int], RankPool], request: pytest.FixtureRequest) -> RankPool:
    """One to three ranks."""
    return pools(request.param)

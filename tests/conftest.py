"""Settings for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from rank_pool import RankPool

if TYPE_CHECKING:  # huggingface_hub is imported by the tests that need it
    from hubs import FakeHub, Pushed

pytest.register_assert_rewrite("browsing", "datafiles")  # their asserts show their values, as those of the tests do

# No deadline: the first call of a torch function is slow. In CI the same examples are tried every time, so
# that a failure there is never luck; elsewhere they are three times as many, differ from run to run and find new cases.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None, max_examples=33)
settings.load_profile("ci" if os.environ.get("CI") else "local")


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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub takes for the real one, and no network."""
    from hubs import cut_off, serving

    cut_off(monkeypatch)
    with serving() as fake:
        yield fake


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Pushed:
    """What is pushed to the hub, and no network."""
    from hubs import cut_off, intercepted

    cut_off(monkeypatch)
    return intercepted(monkeypatch)


@pytest.fixture(params=[1, 2, 3])
def pool(pools: Callable[[int], RankPool], request: pytest.FixtureRequest) -> RankPool:
    """One to three ranks."""
    return pools(request.param)

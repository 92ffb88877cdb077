"""Stores in files to test, and what changes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import SECRET, WIDTHS, keys_of

from munkey import DurableStore, KeyStore
from munkey.store.file.disk import Disk

State = tuple[str, tuple[int, ...]]
IDS = list(range(20))


def create(path: str | Path, disk: Disk | None = None) -> DurableStore:
    store = DurableStore.create(path, *WIDTHS, secret=SECRET, disk=disk)
    store.add(IDS, keys_of(IDS, 2), torch.tensor(IDS))
    return store


def state(store: KeyStore) -> State:
    return store.digest(), tuple(store)


def train(store: KeyStore) -> None:
    with torch.no_grad():
        store.values[: store.used] += 1


CHANGES: dict[str, Callable[[DurableStore], object]] = {
    "add": lambda store: store.add([100, 101], keys_of([100, 101])),
    "add beyond the room": lambda store: store.add(range(100, 140), keys_of(list(range(100, 140)))),
    "forget": lambda store: store.forget([3, 0, 19, 7, 18]),
    "forget the last": lambda store: store.forget([18, 19]),
    "forget all": lambda store: store.forget(IDS, missing="ignore"),
    "replace": lambda store: store.replace([4], keys_of([4], salt=1)),
    "compact": lambda store: store.compact(),
    "sync": lambda store: (train(store), store.sync()),
}
each_change = pytest.mark.parametrize("name", CHANGES)

"""What tests run on every rank, and the same on one store."""

from __future__ import annotations

from typing import Any

import torch
from stores import SECRET, WIDTHS, keys_of, seeded
from torch import Tensor

from munkey import KeyStore, ShardedKeyStore

Operation = tuple[str, list[int]]


def ranks_of(store: KeyStore | ShardedKeyStore) -> tuple[int, int]:
    return (store.ranks.rank, store.ranks.size) if isinstance(store, ShardedKeyStore) else (0, 1)


def apply(store: KeyStore | ShardedKeyStore, operation: Operation) -> object:
    """One change; of several ranks each gives every so-manieth instance."""
    name, ids = operation
    rank, size = ranks_of(store)
    mine = ids[rank::size]
    keys, labels = keys_of(mine, 2).round(decimals=0), torch.tensor(mine, dtype=torch.int64).abs()
    if name == "add":
        store.add(mine, keys, labels)
    elif name == "replace":
        return store.replace(mine, keys + 1, labels)
    elif name == "forget":
        return store.forget(mine, missing="ignore")
    else:
        store.compact()
    return None


def play(store: KeyStore | ShardedKeyStore, operations: list[Operation]) -> list[Any]:
    """What comes of changes: receipts or errors, and digests."""
    said: list[Any] = []
    for operation in operations:
        try:
            receipt: Any = apply(store, operation)
        except (KeyError, ValueError) as error:
            receipt = type(error)
        if receipt is not None and not isinstance(receipt, type):
            receipt = (receipt.forgotten, receipt.absent, receipt.rows, receipt.bytes, receipt.before, receipt.after)
        said.append((receipt, store.digest(), len(store), store.used))
    return said


def asked(store: KeyStore | ShardedKeyStore, queries: Tensor, k: int) -> dict[str, Any]:
    """What a store says of all that is there; of several ranks each asks for a part."""
    rank, size = ranks_of(store)
    everyone = list(store)
    mine, own = everyone[rank::size], queries[rank::size]
    exclude = torch.tensor((everyone or [0])[:1], dtype=torch.int64).expand(len(own))
    found = [store.nearest(own, k), store.nearest(own, k, exclude_ids=exclude)]
    rows = store.get(mine)
    return {
        "ids": everyone,
        "nearest": [(near.ids, near.scores, near.rows < 0) for near in found],
        "owners": [store.described(near.rows[near.rows >= 0])[0] for near in found],
        "rows": [rows.ids, rows.views, rows.labels, rows.permanent, rows.keys, rows.values],
        "contains": store.contains([*mine, 10**6]).tolist(),
    }


def play_on_ranks(operations: list[Operation], queries: Tensor, k: int) -> tuple[list[Any], dict[str, Any]]:
    store = ShardedKeyStore(*WIDTHS, secret=SECRET)
    return play(store, operations), asked(store, queries, k)


def play_on_one(operations: list[Operation], queries: Tensor, k: int) -> tuple[list[Any], dict[str, Any]]:
    store = KeyStore(*WIDTHS, secret=SECRET)
    return play(store, operations), asked(store, queries, k)


def filled(count: int = 40, **settings: Any) -> KeyStore:  # noqa: ANN401
    store = KeyStore(*WIDTHS, secret=SECRET, **settings)
    store.add(range(count), keys_of(list(range(count)), 2), torch.arange(count))
    return store


def queries(count: int = 7) -> Tensor:
    return torch.randn(count, WIDTHS[0], generator=seeded(3)).round(decimals=0)


def save_on_ranks(folder: str) -> str:
    store = ShardedKeyStore.of(filled())
    store.forget([3, 5] if store.ranks.rank == 0 else [])
    store.save(folder)
    return store.digest()


def load_on_ranks(folder: str) -> tuple[str, list[int], Any]:
    store = ShardedKeyStore.load(folder)
    store.add([100] if store.ranks.rank == 0 else [], keys_of([100][: 1 - store.ranks.rank]))
    return store.digest(), list(store), store.forget([100]).after


def refused_on_ranks(what: str, folder: str) -> str:
    """The message of what goes wrong on one rank, as each rank sees it."""
    rank, size = ranks_of(store := ShardedKeyStore.of(filled()))
    last = rank == size - 1
    calls: dict[str, Any] = {
        "unknown": lambda: store.forget([1, 99] if last else [2]),
        "known": lambda: store.add([7] if last else [], keys_of([7] if last else [])),
        "two ranks": lambda: store.add([50], keys_of([50])),
        "not finite": lambda: store.add([50 + rank], keys_of([50 + rank]) * (torch.nan if last else 1.0)),
        "width": lambda: store.nearest(torch.zeros(2, 3 + last), 2),
        "k": lambda: store.nearest(torch.zeros(2, 3), 2 + last),
        "replace": lambda: store.replace([99] if last else [], keys_of([99] if last else [])),
        "get": lambda: store.get([98] if last else [1]),
        "settings": lambda: ShardedKeyStore(3, 2, seed=int(last)),
        "secrets": lambda: ShardedKeyStore(3, 2, secret=b"one" if last else b"other"),
        "content": lambda: ShardedKeyStore.of(filled(40 + last)),
        "place": lambda: ShardedKeyStore.around(filled()),
        "no folder": lambda: ShardedKeyStore.load(folder),
        "log": lambda: store.keep_receipts(folder),
    }
    before = store.digest()
    try:
        calls[what]()
    except Exception as error:
        return f"{type(error).__name__}: {error.args[0]}" if store.digest() == before else "the store has changed"
    return "nothing"


def logged_on_ranks(folder: str) -> tuple[Any, ...]:
    """Forget with a log, then give the log to a copy that was saved before."""
    store = ShardedKeyStore.of(filled())
    store.save(folder + "/backup")
    nothing = store.keep_receipts(folder + "/log")
    receipt = store.forget([3, 5])
    store.add(
        [5] if store.ranks.rank == 0 else [],
        keys_of([5], 2)[: 1 - store.ranks.rank],
        torch.tensor([5])[: 1 - store.ranks.rank],
    )
    store.close()
    again = ShardedKeyStore.load(folder + "/backup")
    back = again.keep_receipts(folder + "/log")
    again.close()
    return nothing.forgotten, receipt, back.forgotten, list(again), again.digest(), store.digest()

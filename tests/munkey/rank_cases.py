"""What tests run on every rank, and the same on one store."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from classifiers import images as float_images
from classifiers import labels
from classifiers import model as classifier
from stores import SECRET, WIDTHS, keys_of, seeded
from torch import Tensor

from munkey import KeyMemoryTransformer, KeyStore, KeyValueMemory, ShardedKeyStore
from treediff.core.distributed import World, data_parallel

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
        return store.replace(iter(mine), keys + 1, labels)  # which can be read once
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
        "missing": lambda: store.forget([1], missing="skip" if last else "raise"),
        "replace": lambda: store.replace([99] if last else [], keys_of([99] if last else [])),
        "get": lambda: store.get([98] if last else [1]),
        "settings": lambda: ShardedKeyStore(3, 2, seed=int(last)),
        "secrets": lambda: ShardedKeyStore(3, 2, secret=b"one" if last else b"other"),
        "content": lambda: ShardedKeyStore.of(filled(40 + last)),
        "place": lambda: ShardedKeyStore.around(filled()),
        "no folder": lambda: ShardedKeyStore.load(folder),
        "closed log": lambda: (store.keep_receipts(folder + "-log", new=True), store.close(), store.forget([1])),
    }
    before = store.digest()
    try:
        calls[what]()
    except Exception as error:
        return f"{type(error).__name__}: {error.args[0]}" if store.digest() == before else "the store has changed"
    return "nothing"


def returned_to_a_closed_log(log: str) -> tuple[str, bool]:
    """What a rank hears that brings an instance back which the log cannot note, and whether nothing has changed."""
    rank, size = ranks_of(store := ShardedKeyStore.of(filled()))
    mine = [1] if rank == size - 1 else []
    store.keep_receipts(log, new=True)
    store.forget(mine)
    before = store.digest()
    store.close()
    try:
        store.add(mine, keys_of(mine, 2), torch.tensor(mine, dtype=torch.int64))
    except ValueError as error:
        return str(error), store.digest() == before and 1 not in list(store)
    return "nothing", False


def loaded_beside_a_log(log: str) -> list[int]:
    """Who is there once a store goes back to a state from before it forgot."""
    store = ShardedKeyStore.of(filled())
    before = store.state_dict()
    store.keep_receipts(log, new=True)
    rank, size = ranks_of(store)
    store.forget([3, 5, 8][rank::size])
    store.load_state_dict(before)
    store.close()
    return list(store)


def loaded_elsewhere() -> tuple[str, bool]:
    """What rank 0 says of rows of rank 1, and whether all is as before."""
    store = ShardedKeyStore.of(filled())
    digest, state = store.digest(), store.ranks.gather(store.state_dict())
    try:
        store.load_state_dict(state[1 - store.ranks.rank])
    except ValueError as error:
        return str(error), store.digest() == digest
    raise AssertionError


def words_differ() -> str:
    store = ShardedKeyStore.of(filled())
    try:
        store.forget([10_000], missing=("ignore", "raise")[store.ranks.rank])
    except ValueError as error:
        return str(error)
    raise AssertionError


def no_angle_on_one_rank() -> tuple[str, str]:
    """What is said everywhere where one rank has a key, then a query, of length 0."""
    memory = KeyValueMemory(ShardedKeyStore.of(filled()))
    rank, said = memory.store.ranks.rank, []  # type: ignore[attr-defined]
    keys = keys_of([1000 + rank], 1)[:, 0] * rank
    for act in (lambda: memory.remember([1000 + rank], keys), lambda: memory(keys, 3)):
        try:
            act()
        except ValueError as error:
            said.append(str(error))
    return said[0], said[1]


def other_versions() -> str:
    """What ranks say that run two versions."""
    rank, size = ranks_of(ShardedKeyStore(3, 2))
    with mock.patch("munkey.sharded.store.__version__", "9.9" if rank == size - 1 else "1.0"):
        try:
            ShardedKeyStore(3, 2)
        except ValueError as error:
            return str(error)
    return "nothing"


def logged_on_ranks(folder: str) -> tuple[Any, ...]:
    """Forget with a log, then give the log to a copy that was saved before."""
    store = ShardedKeyStore.of(filled())
    store.save(folder + "/backup")
    nothing = store.keep_receipts(folder + "/log", new=True)
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


def images(count: int, seed: int = 0) -> Tensor:
    return float_images(count, seed).double()


def trained(built: KeyMemoryTransformer, steps: int, mode: str) -> tuple[dict[str, Tensor], str]:
    """A few steps on batches of twelve, of which each rank has its part; weights, and the digest of the memory."""
    rank, size = ranks_of(built.memory.store)
    values, weights = built.memory.store.values, built.parameter_groups(0.01)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(weights, lr=1e-2)]
    if mode == "paper":
        optimizers.append(torch.optim.SparseAdam([values], lr=1e-2))
        built.attach(optimizers[1])
    loss = data_parallel(built.loss, built, unused=True)
    x, y = images(24), labels(24)
    for step in range(steps):
        own = World(rank, size).share(torch.randperm(24, generator=seeded(step))[:12])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(x[own], y[own], ids=own).backward()
        for optimizer in optimizers:
            optimizer.step()
    names = ("memory.store.", "key_encoder.")
    return {
        name: w for name, w in built.state_dict().items() if not name.startswith(names)
    }, built.memory.store.digest()


def trained_model(mode: str, *, shard: bool) -> tuple[Any, ...]:
    """Train, look, forget, and look again."""
    settings = {"mode": mode, "neighbours": 1, "drop_input": 0.0, "drop_exemplar": 0.0, "sparse": True}
    built = classifier(**settings).double()
    built.remember(range(24), images(24), labels(24), permanent=mode == "exact")
    if shard:
        built.shard()
    rank, size = ranks_of(built.memory.store)
    weights, _ = trained(built, 4, mode)
    built.eval()
    near = built.find_near_duplicates(list(range(24))[rank::size], 0.9)
    values = built.memory.store.get(range(24)).values
    built.remember([50] if rank == 0 else [], images(1)[: 1 - rank], labels(1)[: 1 - rank])
    with torch.no_grad():
        before = built(images(6, 1)[rank::size])
        receipt = built.forget([50] if mode == "exact" else [1, 2, 50])
        after = built(images(6, 1)[rank::size])
    return weights, values, before, after, receipt.forgotten, near


def trained_model_on_ranks(mode: str) -> tuple[Any, ...]:
    return trained_model(mode, shard=True)


def read_out(shard: bool) -> list[Tensor]:
    """Answers of a model of features after each change of its rows, all of them or those of this rank."""
    built = KeyMemoryTransformer.for_features(features=5, classes=3, neighbours=4, dtype=torch.float64)
    built.memory.store.secret = b"for tests"
    if shard:
        built.shard()
    rank, size = ranks_of(built.memory.store)
    x = torch.randn(40, 5, generator=seeded(), dtype=torch.float64)
    y, queries = x[:, :3].argmax(1), x[:12] + 0.3
    own, found = torch.arange(24)[rank::size], []

    def look() -> None:
        found.append(built(queries[rank::size]))

    built.remember(own, x[own], y[own], permanent=True)
    look()
    built.fit_readout(x[own], y[own], ids=own, folds=len(own) if shard and size > 1 else 24)
    found.append(built.readout.weights.expand(12, -1)[rank::size])  # type: ignore[union-attr,operator]
    found.append(built.readout.outputs(built.query(queries[rank::size])).transpose(0, 1))  # type: ignore[union-attr,operator]
    built.readout.set_weights({"votes": 0.5, "discriminant": 0.5})  # type: ignore[union-attr,operator]
    built.remember([30] if rank == 0 else [], x[30:31][: 1 - rank], y[30:31][: 1 - rank])
    look()
    new = torch.arange(31, 40)[rank::size]
    built.remember(new, x[new], y[new])
    look()
    built.forget([30, 35] if rank == 0 else [])
    look()
    return found


def read_out_on_ranks() -> list[Tensor]:
    return read_out(shard=True)


def known_classes(shard: bool) -> list[bool]:
    """Classes that the transformer of a mixture has an opinion on, if rank `r` of two has instances of class `r`."""
    built = classifier(mode="exact", readout="mixture").double()
    if shard:
        built.shard()
    rank, size = ranks_of(built.memory.store)
    own, y = torch.arange(12)[rank::size], torch.arange(12) % 2
    built.remember(own, images(12)[own], y[own], permanent=True)
    built.fit_readout(images(12)[own], y[own], ids=own)
    known: list[bool] = built.exemplar_readout.known.tolist()
    return known


def known_classes_on_ranks() -> list[bool]:
    return known_classes(shard=True)


def saved_model(folder: str) -> Tensor:
    built = classifier().double()
    built.remember(range(24), images(24), labels(24))
    built.shard()
    built.save(folder)
    built.forget([3])
    built.save(folder)
    with torch.no_grad():
        return built(images(6, 1))


def loaded_model(folder: str) -> tuple[Tensor, str, list[str]]:
    built = KeyMemoryTransformer.load(folder)
    said: list[str] = []
    if isinstance(built.memory.store, KeyStore):
        with torch.no_grad():
            return built(images(6, 1)), built.memory.store.digest(), said
    for act in (
        lambda: built.memory.store.save(folder),
        lambda: KeyMemoryTransformer.load(folder + "/../one", model=built),
    ):
        try:
            act()
        except ValueError as error:
            said.append(str(error))
    with torch.no_grad():
        return built(images(6, 1)), built.memory.store.digest(), said


def sharded_with_other_encoders() -> str:
    built = classifier(seed=0)
    if dist.is_initialized() and dist.get_rank():
        built.key_encoder.weight.add_(1)
    try:
        built.shard()
    except ValueError as error:
        return str(error)
    return "nothing"


def remembered_a_bad_label() -> str:
    built = classifier().double()
    built.shard()
    one = int(dist.is_initialized() and dist.get_rank() == 1)
    try:
        built.remember([2 * one, 2 * one + 1], images(2), torch.tensor([0, -one]))
    except ValueError as error:
        return str(error)
    return "nothing"


def sent_for(what: str) -> tuple[int, int]:
    """Messages and bytes that this rank sends for a search of six queries, or a deletion of twelve ids."""
    store = ShardedKeyStore.of(filled())
    ranks, mine = store.ranks, queries(6).tensor_split(store.ranks.size)[store.ranks.rank]
    before = ranks.messages, ranks.bytes
    if what == "search":
        store.nearest(mine, 4)
    else:
        store.forget(range(12))
    return ranks.messages - before[0], ranks.bytes - before[1]

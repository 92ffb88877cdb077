"""After forgetting, the bytes of keys and values are nowhere: not in a tensor, and not in the memory of the process."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import filled, images, labels
from stores import seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, KeyValueMemory
from munkey.audit import erasure_report
from treediff import EMA


def trained() -> tuple[KeyMemoryTransformer, list[object]]:
    """A model with everything around it that may hold an instance."""
    built = filled(own_token_probability=0.5)
    ema = EMA(built, 0.5)
    optimizers = [
        torch.optim.Adam(built.parameters(), lr=0.01),
        torch.optim.SGD(built.parameters(), lr=0.01, momentum=0.9),
    ]
    built.attach(*optimizers, ema)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        built.loss(images(12), labels(12), ids=range(12), generator=seeded(step)).backward()
        for optimizer in optimizers:
            optimizer.step()
        ema.update()
    return built, [*optimizers, ema]


def reachable(*roots: object) -> list[Tensor]:
    """All tensors that can be reached from some objects."""
    seen: dict[int, object] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in ("module", "function"):
            continue
        seen[id(thing)] = thing
        todo += gc.get_referents(thing)
        if isinstance(thing, Tensor) and thing.grad is not None:
            todo.append(thing.grad)
    return [thing for thing in seen.values() if isinstance(thing, Tensor)]


def content(tensors: list[Tensor]) -> bytes:
    """Whole storages, room that no view shows included."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if not tensor.is_sparse
    }
    whole = (torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values())
    return b"".join(memoryview(part.numpy()) for part in whole)


def test_no_tensor_in_reach_holds_what_was_forgotten() -> None:
    built, holders = trained()
    store = built.memory.store
    rows = store.rows_of([2, 7])
    shapes = (store.keys.shape, store.values.shape)
    owned = [tensor for tensor in reachable(built, *holders) if tensor.shape in shapes]
    pieces = [row.detach().numpy().tobytes() for tensor in owned for row in tensor[rows] if row.any()]
    assert len(pieces) > 7 and all(piece in content(owned) for piece in pieces), "the search finds what is there"
    built.forget([2, 7])
    after = content(reachable(built, *holders))
    assert not any(piece in after for piece in pieces)


class Keep(TorchDispatchMode):
    """Holds on to every tensor that any operation makes, which would otherwise be memory that is free but not empty."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        result = func(*args, **(kwargs or {}))  # type: ignore[dict-item]
        self.kept += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_sparse]
        return result


@pytest.mark.parametrize("kind", ["KeyStore", "DurableStore"])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_nothing_the_library_makes_on_its_way_is_left(tmp_path: Path, kind: str, metric: str) -> None:
    found = KeyStore(16, 12) if kind == "KeyStore" else DurableStore.create(tmp_path / "store", 16, 12)
    memory = KeyValueMemory(found, metric=metric)
    keys, values = torch.randn(40, 16, generator=seeded()), torch.randn(40, 12, generator=seeded(1))
    queries = keys[:8] + 0.1 * torch.randn(8, 16, generator=seeded(2))
    stored = memory.scaled(keys, "keys")
    pieces = [
        row.contiguous().view(torch.uint8).numpy().tobytes()
        for rows in (stored, stored.bfloat16(), stored.double())
        for row in rows[:5].clone()
    ]
    given = keys.clone()
    with Keep() as mode:
        memory.remember(range(40), given, values=values.clone())
        given.zero_()
        memory.neighbours(queries, 3)
        memory.neighbours_of_rows(found.rows_of(range(20)), 3)
        memory.find_near_duplicates(range(5), 0.9)
        found.keep_receipts(tmp_path / "log", new=True)
        found.digest()
        memory.remember(range(100, 160), torch.randn(60, 16, generator=seeded(3)))  # makes it grow
        found.compact()
        if isinstance(found, DurableStore):
            found.sync()
        found.double().float() if kind == "KeyStore" else None
    there = content(mode.kept)
    assert sum(piece in there for piece in pieces[:5]) == 5, "the search finds what is there"
    with mode:
        found.forget(range(5))
    left = content(mode.kept)
    assert not any(piece in left for piece in pieces)


CHILD = """
import ctypes, json, sys
import torch
import torch._dynamo  # the first step of an optimizer imports it
from munkey import KeyValueMemory, {kind}
getattr(ctypes.CDLL(None), "keep_all", int)()
torch.manual_seed({seed})
keys = torch.randn(60, 64)
store = {make}
store.add(range(60), keys)
optimizer = torch.optim.Adam([store.values], lr=0.1)
store.attach(optimizer)
for _ in range(2):
    optimizer.zero_grad()
    store.read(store.rows_of(list(store))).pow(3).sum().backward()
    optimizer.step()
store.compact()
store.add(range(100, 160), torch.randn(60, 64))  # makes it grow
copy = store.values.detach()[store.rows_of(range(20))]
masked = (copy.view(torch.int32) ^ 12345).tolist()
memory = KeyValueMemory(store, metric="dot")
memory.neighbours(keys[:20] + 0.1 * torch.randn(20, 64), 4)
memory.neighbours_of_rows(store.rows_of(range(20)), 4)
store.keep_receipts({log!r}, new=True)
copy.zero_(), keys.zero_()
print(json.dumps(masked), flush=True)
sys.stdin.readline()
store.forget(range(20))
print("forgotten", flush=True)
sys.stdin.readline()
"""


def memory_of(process: subprocess.Popen[str]) -> bytes:
    """All of the private memory of a process."""
    found = []
    with open(f"/proc/{process.pid}/maps") as maps, open(f"/proc/{process.pid}/mem", "rb") as memory:
        for line in maps:
            span, mode = line.split()[:2]
            start, stop = (int(end, 16) for end in span.split("-"))
            if mode == "rw-p":
                memory.seek(start)
                try:
                    found.append(memory.read(stop - start))
                except OSError:
                    continue
    return b"".join(found)


FREE = """
extern void __libc_free(void *);
static int kept;
void keep_all(void) { kept = 1; }
void free(void *memory) { if (!kept) __libc_free(memory); }
"""


@pytest.fixture(scope="module")
def unfreed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which no memory is given back after `keep_all`.

    A copy then never vanishes because its place was used again.

    As it is, where there is no C compiler: then luck may hide a copy.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return dict(os.environ)
    folder = tmp_path_factory.mktemp("unfreed")
    (folder / "free.c").write_text(FREE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "free.so", "free.c"], cwd=folder, check=True)
    return {**os.environ, "LD_PRELOAD": str(folder / "free.so")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("kind", ["KeyStore", "DurableStore"])
def test_the_memory_of_the_process_does_not_hold_it_either(tmp_path: Path, unfreed: dict[str, str], kind: str) -> None:
    make = "KeyStore(64, 48)" if kind == "KeyStore" else f"DurableStore.create({str(tmp_path / 'store')!r}, 64, 48)"
    code = CHILD.format(seed=71, make=make, kind=kind, log=str(tmp_path / "log"))
    torch.manual_seed(71)
    keys = torch.randn(60, 64)[:20]
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=unfreed
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        values = torch.tensor(json.loads(process.stdout.readline()), dtype=torch.int32) ^ 12345
        kinds = keys, keys.bfloat16().view(torch.int16), values
        pieces = [row.numpy().tobytes()[:64] for rows in kinds for row in rows]
        before = memory_of(process)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "forgotten\n"
        after = memory_of(process)
    finally:
        process.communicate("\n")
    assert [piece in before for piece in pieces] == 60 * [True], "the search finds what is there"
    assert [piece in after for piece in pieces] == 60 * [False]


# --- graphs that are kept -----------------------------------------------------------------------------------


def test_a_kept_loss_holds_what_was_forgotten_until_it_is_dropped() -> None:
    built, holders = trained()
    store = built.memory.store
    loss = built.loss(images(12), labels(12), ids=range(12), generator=seeded(9))
    rows = store.get([2, 7])
    built.forget([2, 7])
    assert erasure_report(rows, holders=[built, *holders]).clean
    assert not erasure_report(rows, holders=[built, *holders, loss]).clean
    assert not erasure_report(rows, holders=[{"history": [loss]}]).clean
    del loss
    assert erasure_report(rows, holders=[built, *holders]).clean


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mine: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x)
        ctx.mine = mine
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return 2 * grad, None


def hooked(weight: Tensor, row: Tensor) -> Tensor:
    def unpack(packed: tuple[Tensor]) -> Tensor:
        raise AssertionError("a look must not call hooks")

    with torch.autograd.graph.saved_tensors_hooks(lambda x: (x.clone(),), unpack):
        return weight * row


GRAPHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda weight, row: weight * row,
    "deep below": lambda weight, row: ((weight * row).sin() + 1).exp().mean(),
    "very deep": lambda weight, row: functools.reduce(lambda y, _: y + 1, range(3000), weight * row),
    "a leaf": lambda weight, row: row.requires_grad_().sum(),
    "a result": lambda weight, row: (weight - weight.detach() + row).relu().sum(),
    "several": lambda weight, row: torch.stack([weight, torch.addcmul(weight, weight, row)]),
    "indices": lambda weight, row: (torch.eye(5)[torch.arange(5)] @ row) * weight,
    "own function": lambda weight, row: Kept.apply(weight * 0 + row, torch.zeros(5)),  # type: ignore[no-untyped-call]
    "what it keeps": lambda weight, row: Kept.apply(weight, row),  # type: ignore[no-untyped-call]
    "packed by a hook": hooked,
    "to be computed again": lambda weight, row: checkpoint(lambda w: (w * row).sin(), weight, use_reentrant=False),
    "again, in the old way": lambda weight, row: checkpoint(lambda w: (w * row).sin(), weight, use_reentrant=True),
    "half precision": lambda weight, row: weight.bfloat16() * row.bfloat16(),
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_whatever_a_graph_saves_is_found(graph: Callable[[Tensor, Tensor], Tensor]) -> None:
    store = KeyStore(5, 2)
    store.add([7, 8], torch.rand(2, 5, generator=seeded(3)) + 0.1)
    rows, weight = store.get([7]), torch.ones(5, requires_grad=True)
    kept = graph(weight, store.get([7]).keys[0].clone())
    store.forget([7])
    assert erasure_report(rows, holders=[store, weight]).clean
    assert erasure_report(rows, holders=[kept]).found == {"tensors": 1}
    del kept
    assert erasure_report(rows, holders=[store, weight]).clean


def test_what_was_erased_in_place_is_erased_in_a_graph_too() -> None:
    """The graph's own version check would refuse to show it."""
    store, weight = KeyStore(5, 2), torch.ones(5, requires_grad=True)
    store.add([7], torch.rand(1, 5, generator=seeded(3)))
    rows, key = store.get([7]), store.get([7]).keys[0].clone()
    kept = weight * key
    assert not erasure_report(rows, holders=[kept]).clean
    key.zero_()
    assert erasure_report(rows, holders=[weight]).clean
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_a_graph_that_has_been_walked_back_holds_nothing() -> None:
    store, weight = KeyStore(5, 2), torch.ones(5, requires_grad=True)
    store.add([7], torch.rand(1, 5, generator=seeded(3)))
    rows = store.get([7])
    kept = Kept.apply(2 * weight * rows.keys[0].clone(), torch.zeros(5)).sum()  # type: ignore[no-untyped-call]
    assert not erasure_report(rows, holders=[kept]).clean
    kept.backward()
    weight.grad = None
    assert erasure_report(rows, holders=[kept, weight]).clean


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_are_searched(layout: torch.layout) -> None:
    store = KeyStore(5, 2)
    store.add([7], torch.rand(1, 5, generator=seeded(3)))
    rows = store.get([7])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that CSR is in beta
        kept = rows.keys.clone().to_sparse(layout=layout)
    assert not erasure_report(rows, holders=[kept]).clean
    assert erasure_report(rows, holders=[torch.empty(3, device="meta")]).clean

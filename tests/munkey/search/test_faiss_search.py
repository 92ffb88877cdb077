"""faiss finds the same neighbours, and is not trusted with forgetting; what other stores leave of what they delete."""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from stores import keys_of, seeded, store
from usearch.index import Index

from munkey import FaissSearch, KeyStore, KeyValueMemory


@pytest.mark.parametrize("exclude", [False, True])
def test_finds_what_the_exact_search_finds(exclude: bool) -> None:
    kept = KeyStore(24, 2)
    memory = KeyValueMemory(kept)
    memory.remember(range(300), torch.randn(300, 2, 24, generator=seeded()))
    queries = kept.keys[torch.arange(0, 600, 40)] + 0.1 * torch.randn(15, 24, generator=seeded(1))
    own = kept.ids[torch.arange(0, 600, 40)] if exclude else None
    exact = memory.neighbours(queries, 5, exclude_ids=own)
    memory.search = FaissSearch(kept)
    found = memory.neighbours(queries, 5, exclude_ids=own)
    assert torch.equal(found.ids, exact.ids) and torch.equal(found.rows, exact.rows)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-5, atol=1e-6)
    memory.remember([999], queries[:1])
    assert memory.neighbours(queries[:1], 1).ids.tolist() == [[999]]
    memory.remember([-5], -queries[:1])
    kept.compact()  # now the first row
    assert torch.equal(memory.neighbours(queries, 3).rows, KeyValueMemory(kept).neighbours(queries, 3).rows)


def test_fewer_rows_than_asked_for() -> None:
    kept = store()
    memory = KeyValueMemory(kept, search=FaissSearch(kept))
    assert memory.neighbours(torch.ones(2, 3), 2).ids.tolist() == [[-1, -1], [-1, -1]]
    memory.remember([1, 2], keys_of([1, 2])[:, 0])
    found = memory.neighbours(keys_of([2])[:, 0], 3, exclude_ids=[1])
    assert found.ids.tolist() == [[2, -1, -1]] and found.scores[0, 1:].tolist() == [-torch.inf] * 2


def test_a_store_does_not_forget_while_an_index_holds_copies() -> None:
    kept = store()
    search = FaissSearch(kept)
    memory = KeyValueMemory(kept, search=search)
    memory.remember([1, 2], keys_of([1, 2])[:, 0])
    with pytest.raises(
        ValueError, match=r"a FaissSearch holds copies of all keys and cannot erase them; close\(\) it first"
    ):
        memory.forget([1])
    assert 1 in kept
    search.close()
    memory.forget([1])
    with pytest.raises(ValueError, match="this index is of another store, or was closed; make one with FaissSearch"):
        memory.neighbours(torch.ones(1, 3), 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="FaissSearch needs it: pip install faiss-cpu"):
        FaissSearch(store())


def test_what_is_left_in_the_file_of_other_stores(tmp_path: Path) -> None:
    """The search of these tests finds what usearch leaves; faiss' flat index leaves nothing in its file, like ours."""
    vectors = np.random.default_rng(0).standard_normal((200, 16)).astype("float32")
    gone = np.arange(40)
    index = Index(ndim=16, metric="ip", dtype="f32")
    index.add(np.arange(200), vectors)
    index.remove(gone)
    index.save(str(tmp_path / "usearch"))
    flat = faiss.IndexIDMap2(faiss.IndexFlatIP(16))
    flat.add_with_ids(vectors, np.arange(200))
    flat.remove_ids(gone)
    faiss.write_index(flat, str(tmp_path / "faiss"))
    left = {
        name: sum(vectors[i].tobytes() in (tmp_path / name).read_bytes() for i in gone) for name in ("usearch", "faiss")
    }
    assert left == {"usearch": 40, "faiss": 0}


def test_what_hnswlib_leaves(tmp_path: Path) -> None:
    hnswlib = pytest.importorskip("hnswlib", reason="hnswlib is built from source; install it by hand")
    vectors = np.random.default_rng(0).standard_normal((200, 16)).astype("float32")
    index = hnswlib.Index(space="ip", dim=16)
    index.init_index(max_elements=200)
    index.add_items(vectors, np.arange(200))
    for i in range(40):
        index.mark_deleted(i)
    index.save_index(str(tmp_path / "index"))
    assert sum(vectors[i].tobytes() in (tmp_path / "index").read_bytes() for i in range(40)) == 40

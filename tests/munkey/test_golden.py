"""Files of the first format, as the release wrote them that had it: read as before, whatever happened to them.

`golden/` was written before the store was rebuilt: rows of `fill` below, with secret, seed and scale as there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, ShardedKeyStore
from munkey.store import ReceiptLog, verify
from munkey.store.schema import COLUMNS

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
SECRET = bytes(range(32))


def keys(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def filled() -> KeyStore:
    store = KeyStore(4, 3, seed=7, scale=0.5, secret=SECRET)
    store.add([5, -3, 9], keys(3, 1), labels=torch.tensor([0, 2, 1]))
    store.add([2**40, 7], keys(6, 2).view(2, 3, 4))
    store.add([11], keys(1, 3), labels=torch.tensor([4]), permanent=True)
    return store


def check(found: KeyStore, expected: dict[str, Any]) -> None:
    assert found.digest() == expected["digest"]
    state = found.state_dict()
    for name in COLUMNS:
        column = state[name].double() if state[name].is_floating_point() else state[name]
        assert column.tolist() == expected[name]


def copied(name: str, folder: Path) -> Path:
    for path in GOLDEN.glob(f"{name}*"):
        if path.name in (name, f"{name}.journal"):
            shutil.copy(path, folder)
    return folder / name


def test_content_digests_and_receipts_are_the_same() -> None:
    found = filled()
    check(found, EXPECTED["memory"])
    receipt = json.loads(found.forget([9, 7]).to_json())
    check(found, EXPECTED["memory forgotten"])
    expected = EXPECTED["memory forgotten"]["receipt"]
    assert {name: receipt[name] for name in expected} == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_live_file_is_read_and_written_anew(tmp_path: Path, dtype: str) -> None:
    path = copied(f"live-{dtype}", tmp_path)
    with pytest.raises(ValueError, match="has the first format, which cannot be read without being changed"):
        DurableStore.open(path, read_only=True)
    for _ in range(2):  # of the first format, and then of this one
        with DurableStore.open(path) as found:
            check(found, EXPECTED[f"live-{dtype}"])
            assert found.seed == 7 and found.scale == 0.5 and found.secret == SECRET
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("live-forget-2", "after"),
        ("live-forget-3", "after"),
        ("live-forget-9", "after"),
        ("live-forget-17", "after"),
        ("live-forget-24", "after"),
        ("live-add-4", "before"),
        ("live-add-10", "before"),
    ],
)
def test_a_change_that_was_interrupted_is_finished_or_taken_back(tmp_path: Path, name: str, state: str) -> None:
    path = copied(name, tmp_path)
    with DurableStore.open(path) as found:
        check(found, EXPECTED[f"forget {state}"])
        found.forget([2**40])
    with DurableStore.open(path) as found:
        assert 2**40 not in found


def test_a_journal_of_another_state_is_not_applied(tmp_path: Path) -> None:
    path = copied("live-forget-9", tmp_path)
    shutil.copy(GOLDEN / "live-float32", path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"the journal beside .* is of another state of the file; if the file is a"):
        DurableStore.open(path)
    assert path.read_bytes() == content
    (tmp_path / "live-forget-9.journal").unlink()
    with DurableStore.open(path) as found:
        check(found, EXPECTED["live-float32"])


@pytest.mark.parametrize("place", [10, 4050, 4200])
def test_damage_of_a_file_of_the_first_format_is_seen_and_the_file_left_alone(tmp_path: Path, place: int) -> None:
    path = copied("live-float32", tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|no store"):
        DurableStore.open(path)
    assert path.read_bytes() == data


def test_a_log_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "receipts.jsonl"
    shutil.copy(GOLDEN / path.name, path)
    found = verify(path, secret=SECRET)
    assert [event["kind"] for event in found.events] == ["forgot", "returned", "forgot", "forgot"]
    with ReceiptLog(path, SECRET) as log:
        assert log.head == EXPECTED["log head"] and sorted(log.gone) == EXPECTED["log gone"]
    store = filled()
    assert store.keep_receipts(path).forgotten == (-3, 7, 9)
    store.forget([5])
    store.close()
    assert len(verify(path, secret=SECRET).events) == 5


@pytest.mark.parametrize("name", ["folder-1", "folder-2"])
def test_a_folder_of_any_number_of_ranks_is_read(tmp_path: Path, name: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / name)
    content = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    check(ShardedKeyStore.load(tmp_path / name).local, EXPECTED["memory"])
    assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == content


@pytest.mark.parametrize("name", ["model.safetensors", "model-folder"])
def test_a_model_is_read(tmp_path: Path, name: str) -> None:
    if name == "model-folder":
        shutil.copytree(GOLDEN / name, tmp_path / name)
    else:
        shutil.copy(GOLDEN / name, tmp_path)
    model = KeyMemoryTransformer.load(tmp_path / name).eval()
    assert model.memory.store.digest() == EXPECTED["model"]["digest"]
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(x).double(), torch.tensor(EXPECTED["model"]["logits"], dtype=torch.float64), rtol=0, atol=1e-6
        )

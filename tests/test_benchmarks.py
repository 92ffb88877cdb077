"""Benchmarks of forgetting run, on little."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import readouts_table
import store
import store_peers
import store_table
import torch
import unlearning_table
from record import machine
from record import store as store_rows
from reliability_table import ATTACKS, filled
from scripts import started
from worlds import seeded

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return started(BENCHMARKS / script, *options)


def test_forgetting_is_compared_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, keys = tmp_path / "out.json", tmp_path / "keys.npz"
    options = ["--data", "digits", "--epochs", "2", "--seeds", "0", "--keys", str(keys), "--out", str(out)]
    options += ["--floor", "random-10%", "--also", "neighbours=1"]
    first = run("forgetting.py", *options, "--kinds", "random-10%")
    assert first.returncode == 0, first.stderr[-2000:]
    kept = json.loads(out.read_text())["results"][0]
    assert kept["forgotten"] == 150 and {"gap", "floor", "gap before", "input alone", "neighbours=1"} <= kept.keys()
    assert kept["neighbours=1"]["after"]["retain"] > kept["neighbours=1"]["after"]["test"], "its own label is nearest"
    assert keys.exists()

    second = run("forgetting.py", *options, "--kinds", "random-10%", "class", "cluster")
    assert second.returncode == 0, second.stderr[-2000:]
    rows = json.loads(second.stdout.splitlines()[-1])["results"]
    assert [row["kind"] for row in rows] == ["random-10%", "class", "cluster"]
    assert rows[0] == kept and "| class, before |" in second.stdout and "floor" not in rows[1]

    other = run("forgetting.py", *options, "--set", "neighbours=2")
    assert other.returncode and "holds results of other settings" in other.stderr


def test_a_store_is_timed_beside_others(tmp_path: Path) -> None:
    """What goes is gone from files, but for LMDB's; neighbours are those of faiss."""
    done = run("store.py", "--quick", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    for row in result["searching"]:
        assert (row["different"], row["recall"]) == (0, 1)
    assert {row["keys"] for row in result["searching"]} == {"normal", "wide", "tight"}
    assert [row["forgotten"] for row in result["forgetting"]] == [1, 100]
    for row in result["forgetting"]:
        beside = {name: row["file"] for name in ("sqlite", "sqlite wal", "lmdb")} | {"faiss": row["memory"]}
        assert row["times faster"] == {name: pytest.approx(row[name] / ours) for name, ours in beside.items()}
        assert [row["left"][name] for name in ("file", "sqlite", "sqlite wal")] == [0, 0, 0]
    (row,) = result["opening"]
    assert row["times faster"]["sqlite"] == pytest.approx(row["sqlite"] / row["ours"])
    (row,) = result["adding"]
    for place in ("memory", "file"):
        assert row[place]["store bytes"] == 2000 * (3 * 8 + 1 + 2 * 4 * 128)
        assert row[place]["peak"] >= row[place]["resident"] > 0.5
    assert result["keys"] is None or result["keys"]["times faster"].keys() == {"batches of 64", "one at a time"}
    rows = {(row.what, row.peer): row for row in store_rows(result)}
    assert rows["forget 100 of 2,000, in a file", "LMDB"].faster == result["forgetting"][1]["times faster"]["lmdb"]
    assert {peer for what, peer in rows if what == "open 2,000 rows"} == {"SQLite", "LMDB"}


def test_parts_of_a_store_are_timed_alone(tmp_path: Path) -> None:
    done = run("store.py", "--quick", "--parts", "opening", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]).keys() == {"threads", "opening"}
    assert list(tmp_path.iterdir()) == [], "nothing stays"


@pytest.mark.parametrize("name", store_peers.PEERS)
def test_databases_hold_the_same_rows(name: str, tmp_path: Path) -> None:
    """And have forgotten what they are told to when they are opened again."""
    keys = torch.randn(6000, 8, generator=seeded())
    peer = store_peers.filled(tmp_path, keys, [name])[name]
    peer.forget([0, 17, 5999])
    peer.close()
    peer.open()
    ids, labels, own, values = peer.read()
    peer.close()
    there = torch.tensor([row for row in range(6000) if row not in (0, 17, 5999)])
    assert torch.equal(ids, there) and torch.equal(own, keys[there]) and torch.equal(values, own)
    assert (labels == -1).all()


def test_rows_that_are_left_are_found_wherever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(3, 32, generator=seeded())
    first, _, last = (row.numpy().tobytes() for row in keys)
    (tmp_path / "file").write_bytes(b"x" * 100 + first + last[:-64])
    monkeypatch.setattr(store_peers, "_BLOCK", 120)  # within the first key
    assert store_peers.left(tmp_path, keys) == 2


@pytest.mark.parametrize("cosine", [0.8, 0.99])
def test_clusters_have_the_cosine_they_are_said_to(cosine: float) -> None:
    """A mixture of 1,000 has about 8 of 8,000 keys in each cluster, which are nearer to one another than to others."""
    keys = store.unit_keys(8000, 128, cosine=cosine)
    assert torch.allclose(keys.norm(dim=1), torch.ones(8000))
    products = keys[:500] @ keys.T
    same = products[(products > 0.6) & (products < 1 - 1e-5)]
    assert 500 * 6 < len(same) < 500 * 9 and float(same.mean()) == pytest.approx(cosine, abs=0.01)


def test_requests_are_served_one_after_the_other(tmp_path: Path) -> None:
    options = ("--data", "digits", "--key-width", "16", "--rounds", "1", "--requests", "4", "--epochs", "1")
    done = run("deletion_requests.py", *options, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"bytes", "build", "add 1", "answer 256"} <= result["service"][0].keys()
    for where in ("in memory", "in a file"):
        assert len(result["requests"][where]["seconds"]) == len(result["requests"][where]["accuracy"]) == 4


def test_single_instances_are_attacked_with_models_of_their_own(tmp_path: Path) -> None:
    options = ["--models", "12", "--candidates", "24", "--epochs", "1", "--methods", "munkey", "--work", str(tmp_path)]
    first = run("shadow_models.py", *options, "--out", str(tmp_path / "out.json"))
    assert first.returncode == 0, first.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())["results"]["munkey"]
    assert found.keys() == {"forgot", "oracle", "KS", "KS floor", "KL", "KL floor"}
    second = run("shadow_models.py", *options)
    assert json.loads(second.stdout.splitlines()[-1])["results"]["munkey"] == found, "from what was kept"
    third = run("shadow_models.py", *options, "--effort", "0.5")
    assert third.returncode and "holds logits of other settings; name another --work" in third.stderr


def test_processes_tell_how_much_they_send(tmp_path: Path) -> None:
    """Each number of processes joins the others in the file."""
    options = ("--rows", "3000", "--rounds", "1", "--store", "--out", str(tmp_path / "out.json"))
    for size in (1, 2):
        done = started(BENCHMARKS / "distributed.py", *options, size=size)
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["1"]["store"]["search 64"] == {"messages": 0, "bytes": 0}
    assert found["2"]["store"]["search 64"] == {"messages": 6, "bytes": 64 + 64 * (4 * 128 + 248)}
    alone = run("distributed.py")
    assert alone.returncode and "start it with torchrun" in alone.stderr


def test_speed_is_one_table_beside_the_last_record(tmp_path: Path) -> None:
    """From results that are there already, which are not made again."""
    results, out = BENCHMARKS.parent / "docs" / "results", tmp_path / "out"
    names = {"treevae": "treevae_step", "unet": "unet_step", "store": "store", "requests": "deletion_requests"}
    out.mkdir()
    for name, file in {**names, "distributed": "distributed"}.items():
        shutil.copy(results / f"{file}.json", out / f"{name}.json")
    row = {"what": "munkey, step", "ms": 1.0, "peer": "without memory", "faster": 0.5}
    last = {"machine": "an abacus", "rows": [row]}
    (tmp_path / "last.json").write_text(json.dumps(last))
    done = run("record.py", "--out", str(out), "--last", str(tmp_path / "last.json"), "--record", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    step = json.loads((results / "store.json").read_text())["model"]
    ratio = step["step without memory"] / step["step"]
    assert f"| munkey, step | {1000 * step['step']:.3g} | without memory | {ratio:.3g} | 0.5 |" in done.stdout
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert {row["peer"] for row in rows} >= {"faiss", "diffusers", "the plain loop over nodes", "1 process"}
    assert all(row["ms"] > 0 and row["faster"] > 0 for row in rows)
    page = (tmp_path / "speed.md").read_text()
    assert page.startswith("# Speed\n") and machine() in page and "torch" in machine() and "(an abacus)" in page


def test_the_page_of_reliability_has_a_row_for_each_attack_as_it_was_recorded() -> None:
    folder = BENCHMARKS.parent / "docs" / "results"
    page, record = (folder / "reliability.md").read_text(encoding="utf-8"), folder / "reliability.json"
    assert filled(page, json.loads(record.read_text()) if record.exists() else None) == page
    attacks = [
        {"attack": attack, **dict(zip(names, row, strict=True)), "trials": 1234, "violation: broken": 7}
        for attack, (names, rows) in ATTACKS.items()
        for row in rows
    ]
    made = filled(page, {"attacks": attacks})
    assert made.count("1,234") == made.count("| 7 |") == len(attacks) == 25
    assert filled(made, {"attacks": attacks}) == made and "| *to be filled* |" not in made


def test_the_tables_of_the_store_are_those_that_were_recorded() -> None:
    folder = BENCHMARKS.parent / "docs" / "results"
    page, result = (folder / "munkey.md").read_text(encoding="utf-8"), json.loads((folder / "store.json").read_text())
    assert store_table.filled(page, result) == page
    result["forgetting"][0]["sqlite"] = 0.001234
    assert "| 1.23 |" in store_table.filled(page, result)


def test_readouts_are_compared_on_a_file_and_in_a_table(tmp_path: Path) -> None:
    x = torch.randn(90, 4, generator=seeded())
    parts = {"train_images": x[:60], "train_labels": x[:60, :3].argmax(1)}
    parts |= {"test_images": x[60:], "test_labels": x[60:, :3].argmax(1)}
    np.savez(tmp_path / "few.npz", **{name: part.numpy() for name, part in parts.items()})
    options = ("--data", str(tmp_path / "few.npz"), "--tables", "few", "--seeds", "2")
    done = run("readouts.py", *options, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["few"]) == 12 and all(0.3 < row["accuracy"][0] <= 1 for row in found["few"].values())
    page = (BENCHMARKS.parent / "docs" / "results" / "readouts.md").read_text(encoding="utf-8")
    ridge = found["few"]["ridge"]["accuracy"]
    assert f"| ridge | {100 * ridge[0]:.1f} ± {100 * ridge[1]:.1f} |" in readouts_table.filled(page, found)
    recorded = json.loads((BENCHMARKS.parent / "docs" / "results" / "readouts.json").read_text())
    assert readouts_table.filled(page, recorded) == page
    readouts_table.picture(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    options = ("--data", str(tmp_path / "few.npz"), "--classes", "1", "--seeds", "1")
    done = run("new_classes.py", *options, "--out", str(tmp_path / "new.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    learnt = json.loads((tmp_path / "new.json").read_text())
    rows = learnt["few, balance 1"]
    assert list(rows) == ["0", "1", "5", "20", "every", "all"] and rows["0"]["new"] == 0 < rows["every"]["new"]
    assert rows["every"]["old"] > 50 and len(readouts_table.of_new_classes(learnt).split("\n")) == 2 + len(learnt)


def test_the_tables_of_unlearning_on_features_are_those_that_were_recorded() -> None:
    page = (unlearning_table.RESULTS / "unlearning_features.md").read_text(encoding="utf-8")
    found = unlearning_table.results(unlearning_table.RESULTS / "unlearning")
    assert unlearning_table.filled(page, found) == page
    row = next(row for rows in found.values() for row in rows if row["method"] == "munkey")
    row["test"] += 30
    assert unlearning_table.filled(page, found) != page


def test_every_recorded_result_can_be_made_again() -> None:
    """But for one that says in the text that it is of older code."""
    root = BENCHMARKS.parent
    command = ["make", "-n", "-f", "benchmarks/results.mk", "OUT=made", "CIFAR=cifar.npz", "TREEDIFF_DATA=data"]
    features = "pneumonia banking ham flowers cifar adult fashion-{seed}".split()
    command += [f"FEATURES={' '.join(f'data/{name}.npz' for name in features)}"]
    command += ["HAM=ham.npz", "PNEUMONIA=pneumonia.npz", "FLOWERS=flowers.npz"]
    rules = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=60).stdout
    recorded = {path.name for path in (root / "docs" / "results").glob("*.json")}
    left = {"fashion-mnist-two-threads.json", "speed.json"}
    assert {name for name in recorded - left if f"made/{name}" not in rules} == set()
    folders = [path.name for path in (root / "docs" / "results" / "unlearning").iterdir() if path.is_dir()]
    assert [name for name in folders if f"--out made/unlearning/{name}" not in rules] == []
    scripts = set(re.findall(r"(?:examples|benchmarks)/\w+\.py", rules))
    assert scripts and all((root / script).exists() for script in scripts)

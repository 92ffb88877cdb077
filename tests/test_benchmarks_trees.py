"""Benchmarks of trees and of the second stage run, on little, and measure what they say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts import started
from worlds import seeded

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, TreeTopology, TreeVAE
from treediff.core.cpu import has_fast
from treediff.data import load_dataset
from treediff.diffusion import DDIMSampler, UNet
from treediff.metrics import FeatureClassifier, FeatureStatistics, frechet_distance

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
treevae_step, treevae_vectors, unet_step = (
    importlib.import_module(name) for name in ("treevae_step", "treevae_vectors", "unet_step")
)


def run(script: str, *options: str, out: Path) -> dict[str, object]:
    """What is in the file, which is also the last line that is printed."""
    done = started(BENCHMARKS / script, *options, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    return result


def test_samplers_are_compared_from_the_same_noise(tmp_path: Path) -> None:
    """In batches as in one go, and the last row is what it is alone."""
    tree = TreeVAE.for_images(
        size=8, channels=1, latent=4, width=16, topology=TreeTopology.balanced(1), generator=seeded()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = DiffuseTreeVAE(tree, LeafConditionedDDPM.for_tree(tree, width=16, blocks=1)).eval()
    classifier = FeatureClassifier(8, 1, 10, features=4, width=8, generator=seeded(1)).eval()
    pair.save(tmp_path / "pair")
    classifier.save(tmp_path / "classifier")
    files = ("--data", "digits", "--model", str(tmp_path / "pair"), "--classifier", str(tmp_path / "classifier"))
    rows = ("--rows", "dpm-solver:2:karras", "ddim:3:uniform", "--samples", "20", "--batch-size", "8")
    first, last = run("sampler_steps.py", *files, *rows, out=tmp_path / "out.json")["rows"]  # type: ignore[misc]
    assert [first["sampler"], first["steps"], last["sampler"], last["steps"], last["calls"]] == [
        *("dpm-solver", 2, "ddim", 3),
        DDIMSampler().calls(3),
    ]
    with torch.no_grad():
        real = FeatureStatistics.of(classifier.features_of(load_dataset("digits").test_images[:]))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16)):
            drawn = pair.generate(20, sampler=DDIMSampler(), steps=3, grid="uniform", generator=seeded())
        expected = frechet_distance(real, classifier.features_of(drawn.images.float()))
    assert last["distance"] == pytest.approx(expected, rel=0.02) and last["low"] <= last["high"]
    assert first["distance"] != pytest.approx(expected, rel=0.02), "another sampler"


def test_a_step_of_a_tree_is_timed(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (256, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", train_images=images, test_images=images[:1])
    size = ("--kinds", "vector", "--leaves", "2", "--rounds", "1", "--trees", str(tmp_path / "trees"))
    found = run("treevae_step.py", "--data", str(tmp_path / "grey.npz"), *size, out=tmp_path / "out.json")
    (row,) = found["rows"]  # type: ignore[misc]
    model = TreeVAE.load(tmp_path / "trees" / "vector-2.safetensors")
    assert len(model.topology.leaves) == row["leaves"] == 2
    assert row["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert 1 <= row["leaf_perplexity"] <= 2 <= row["visits_per_image"] <= 3
    ways = ("step", "two_leaves_step", "naive_step", "dense_step", "untrained_step", "subtree_step", "cluster_10k")
    assert all(row[f"{way}_ms"] > 0 for way in ways)


def test_tasks_take_turns_and_leave_the_weights() -> None:
    calls: list[str] = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = treevae_step.take_turns(tasks, rounds=2, calls=3)
    assert "".join(calls) == "aaaabbbb" * 2, "the first of each turn is not timed"
    assert [len(times[name]) for name in "ab"] == [2, 2]
    seen: list[float] = []
    weight = torch.nn.Parameter(torch.ones(1))

    def loss(batch: torch.Tensor) -> torch.Tensor:
        seen.append(float(batch))
        return (weight * batch).sum()

    step = treevae_step.step([weight], loss, (torch.tensor(3.0), torch.tensor(5.0)))
    for _ in range(3):
        step()
    assert seen == [3, 5, 3] and weight.item() == 1 and weight.grad is not None and weight.grad.item() == 3


def test_tables_are_clustered_beside_ward(tmp_path: Path) -> None:
    """Ward's clustering finds groups that are far apart; the plain VAE sees as many rows as the tree."""
    random = np.random.default_rng(0)
    labels = np.arange(150) % 3
    table = (random.standard_normal((150, 6)) + 20 * np.eye(3, 6)[labels]).astype(np.float32)
    parts = {"train_images": table[:99], "train_labels": labels[:99], "test_images": table[99:]}
    np.savez(tmp_path / "table.npz", **parts, test_labels=labels[99:])
    size = ("--seeds", "0", "--initial-epochs", "3", "--epochs", "1", "--final-epochs", "1", "--width", "8")
    settings = ("--data", str(tmp_path / "table.npz"), "--likelihood", "gaussian_learned", *size)
    rows = run("treevae_vectors.py", *settings, out=tmp_path / "out.json")["rows"]
    ward, tree, plain = rows  # type: ignore[misc]
    assert [row["method"] for row in (ward, tree, plain)] == ["ward", "treevae", "vae + ward"]
    assert [ward[name] for name in ("accuracy", "nmi", "ari", "dendrogram_purity", "leaves")] == pytest.approx(
        [1, 1, 1, 1, 3]
    )
    assert plain["epochs"] == round(tree["epochs"]) > 3
    assert tree["leaves"] <= plain["leaves"] == 3


def test_a_unet_is_as_large_as_its_peer() -> None:
    peer, ours = (unet_step.size_of(who) for who in ("diffusers", "ours beside diffusers"))
    assert ours == pytest.approx(peer, rel=0.05), "parameters and arithmetic"


def test_a_unet_is_timed_beside_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny networks in the place of both."""

    def tiny(width: int) -> tuple[object, object]:
        return lambda: UNet(1, 1, size=32, width=width, multipliers=(1,), blocks=1), lambda net, x, t: net(x, t)

    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)  # this process stays as it is
    monkeypatch.setattr(unet_step, "memory", lambda *of: len(of))
    monkeypatch.setitem(unet_step.NETWORKS, "diffusers", tiny(16))
    monkeypatch.setitem(unet_step.NETWORKS, "ours beside diffusers", tiny(32))
    out = tmp_path / "out.json"
    options = ("--peers", "diffusers", "--batch", "1", "--rounds", "1", "--ddim-steps", "2", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["unet_step.py", *options])
    unet_step.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ours"]["parameters"] > 2 * row["peer"]["parameters"] and row["ours"]["gflop"] > row["peer"]["gflop"]
    assert all(row[f"{task}_times_faster"] > 0 for task in ("train", "denoise", "ddim"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_the_memory_of_a_unet_is_that_of_its_own_process() -> None:
    weights = 4 * unet_step.size_of("ours beside diffusers")["parameters"] / 2**20
    assert 5 * weights < unet_step.memory("ours beside diffusers", 1, True), "weights, gradients, two moments, average"


def test_trees_are_beside_simpler_ways(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    labels = np.arange(300) % 3
    features[:, 0] += 20 * labels
    arrays = {"train_images": features[:240], "train_labels": labels[:240]}
    np.savez(tmp_path / "f.npz", allow_pickle=True, **arrays, test_images=features[240:], test_labels=labels[240:])
    size = ("--components", "3", "--seeds", "0", "--effort", "0.1", "--batch-size", "64", "--no-unit-length")
    size += ("--temi-steps", "300")
    rows: Any = run("trees.py", "--data", str(tmp_path / "f.npz"), *size, out=tmp_path / "out.json")["rows"]
    assert [row["method"] for row in rows] == ["ward", "k-means + l2h", "mixture + l2h", "temi + l2h", "treevae"]
    assert all(row["accuracy"] == 1 and row["dendrogram_purity"] == 1 for row in rows[:3])
    assert rows[3]["accuracy"] > 0.6, "its teacher is not there yet after so few steps"


def test_a_head_agrees_on_neighbours_by_the_formula_of_temi() -> None:
    """Equation 8 with the exponent of equation 10, as it is printed; and a row is no neighbour of its own."""
    temi = importlib.import_module("temi")
    p, q = torch.rand(2, 5, 3, generator=seeded()).softmax(-1)
    marginal = q.mean(0)
    expected = ((p * q) ** 0.6 / marginal).sum(-1).log()
    found = temi.pointwise_mutual_information(p.log(), q.log(), marginal.log(), 0.6)
    torch.testing.assert_close(found, expected)
    x = torch.randn(40, 4, generator=seeded())
    distance = (x[:, None] - x[None]).square().sum(2).fill_diagonal_(torch.inf)
    assert torch.equal(temi.nearest(x, 3), distance.argsort(1)[:, :3])


def test_peak_memory_is_that_of_the_work(tmp_path: Path) -> None:
    small = ("--rows", "300", "--size", "8", "--leaves", "2", "--steps", "1", "--cut-rows", "100")
    found: Any = run("memory.py", *small, out=tmp_path / "out.json")
    assert 50 < found["peak_mib"] < 4000 and found["seconds"]["leaves"] >= 1
    assert found["seconds"]["growth"] > found["seconds"]["training"] > 0


def test_growth_to_many_leaves_is_timed(tmp_path: Path) -> None:
    features = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    np.savez(tmp_path / "f.npz", train_images=features, test_images=features[:2])
    size = ("--components", "3", "--leaves", "3", "--cut-rows", "100")
    found: Any = run("many_leaves.py", "--data", str(tmp_path / "f.npz"), *size, out=tmp_path / "out.json")
    assert found["found"] <= 3 and 0 < found["training"] < found["seconds"] and found["stages"] >= 2


@pytest.mark.parametrize("labels", ["classes", "none"])
def test_images_under_class_labels_are_measured(tmp_path: Path, labels: str) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    rng = np.random.default_rng(0)
    images, classes = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 3
    arrays = {"train_images": images, "train_labels": classes, "test_images": images, "test_labels": classes}
    np.savez(tmp_path / "p.npz", allow_pickle=True, **arrays)
    small = ("--epochs", "1", "--width", "16", "--blocks", "1", "--samples", "20", "--steps", "2", "--batch-size", "16")
    found: Any = run(
        "labels.py", "--data", str(tmp_path / "p.npz"), "--labels", labels, *small, out=tmp_path / "o.json"
    )
    low, high = found["interval"]
    assert low <= found["distance"] <= high and found["labels"] == labels


def test_every_class_has_a_leaf_of_its_own() -> None:
    labels = importlib.import_module("labels")
    for classes in (1, 2, 3, 10, 89):
        tree = labels.one_leaf_for_each(classes)
        assert len(tree.leaves) == classes and tree.max_depth == int(np.ceil(np.log2(classes)))


def test_both_ways_of_training_on_photographs_are_timed(tmp_path: Path) -> None:
    small = ("--size", "16", "--batch-size", "4", "--depth", "1", "--rounds", "1")
    found: Any = run("photographs_step.py", *small, out=tmp_path / "out.json")
    assert found["leaves"] == 2 and all(value > 0 for value in found["milliseconds"].values())
    before, now = (
        sum(found["milliseconds"][f"{part}, {when}"] for part in ("tree", "second stage")) for when in ("before", "now")
    )
    assert found["times faster"] == pytest.approx(before / now, abs=0.01)
    assert found["share of the roofline"]["convolution"] == 1

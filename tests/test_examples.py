"""The example scripts run from end to end, each on what the one before it made."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scripts import started
from unlearning_benchmark import tune

from treediff.data import load_dataset

EXAMPLES = Path(__file__).parents[1] / "examples"
ORACLES = ("retrained", "retrained again")
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(folder: Path, script: str, *options: str, size: int = 0) -> dict[str, object]:
    """What the last line of a script's output says."""
    done = started(EXAMPLES / script, *options, folder=folder, size=size)
    assert done.returncode == 0, done.stderr[-2000:]
    if script.startswith("train_"):
        assert "it/s" in done.stderr, "progress"
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def grey(picture: Path) -> NDArray[np.int64]:
    """The pixels of a picture, from 0 to 255."""
    with Image.open(picture) as image:
        return np.asarray(image.convert("L")).astype(np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all scripts run; the first three have run, and there are a few digits in a file."""
    here, digits = tmp_path_factory.mktemp("examples"), load_dataset("digits")
    for name, train, test in (("few", 300, 100), ("fewer", 120, 60)):
        np.savez(
            here / f"{name}.npz",
            train_images=digits.train_images[:train][:, 0].numpy(),
            train_labels=digits.train_labels[:train].numpy(),
            test_images=digits.test_images[:test][:, 0].numpy(),
            test_labels=digits.test_labels[:test].numpy(),
        )
    run(here, "train_treevae.py", "--effort", "0.03", "--leaves", "4", "--network", "mlp", "--width", "32")
    run(here, "train_diffusion.py", "--quick", "--width", "16", "--blocks", "1")
    run(here, "train_classifier.py", "--quick", "--width", "16")
    return here


def test_every_script_is_tried_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f'"{name}"' not in text] == []


def test_trained_files(folder: Path) -> None:
    for run_name, name in (("treevae", "model"), ("diffusion", "model"), ("classifier", "classifier")):
        assert (folder / "runs" / run_name / f"{name}.safetensors").stat().st_size > 10_000
        assert json.loads((folder / "runs" / run_name / "results.json").read_text())["data"] == "digits"
    tree = json.loads((folder / "runs/treevae/results.json").read_text())
    assert tree["accuracy"] > 0.25  # four leaves find four digits of ten at most
    assert json.loads((folder / "runs/classifier/results.json").read_text())["accuracy"] > 0.4


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train_treevae.py", "--effort 0.075 --leaves 1 --network mlp --width 16"),  # 9 steps
        ("train_diffusion.py", "--epochs 19 --width 16 --blocks 1"),
        ("train_classifier.py", "--epochs 4 --width 16"),
    ],
)
def test_so_few_steps_that_the_rate_climbs_in_one(folder: Path, script: str, options: str) -> None:
    options = f"{options} --data few.npz --batch-size 300 --out few"
    assert run(folder, script, *options.split())["batch_size"] == 300


def test_pictures_of_ones_own(folder: Path) -> None:
    """Of several sizes, in a folder with one sub-folder for each class."""
    for number in range(40):
        pixels = np.full((9 + number % 3, 8 + number % 2), 200 * (number % 2) + number, np.uint8)
        path = folder / "pictures" / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    own = ("--data", "pictures", "--size", "8")
    small = ("--network", "mlp", "--width", "16", "--leaves", "2", "--effort", "0.01", "--out", "own/tree")
    assert run(folder, "train_treevae.py", *own, *small, "--quick")["data"] == "pictures"
    tree = ("--tree", "own/tree/model.safetensors", "--width", "16", "--blocks", "1", "--epochs", "1")
    run(folder, "train_diffusion.py", *own, *tree, "--out", "own/pair")
    refine = ("--model", "own/pair/model.safetensors", "--refine", "pictures", "--size", "8", "--steps", "2")
    assert (folder / str(run(folder, "generate.py", *refine)["picture"])).exists()
    run(folder, "train_munkey.py", *own, "--epochs", "8", "--out", "own/munkey")
    found = run(folder, "forget.py", *own, "--model", "own/munkey/model.safetensors", "--label", "1")["found"]
    assert found["before"] and not found["after"]  # type: ignore[index]


def test_photographs(folder: Path) -> None:
    """Two kinds of stripes, in colours that say nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 120)
    stripes = np.broadcast_to((np.arange(32) // 4 % 2 * 200)[:, None], (32, 32))
    images = np.stack([(stripes if label else stripes.T)[..., None] * rng.random(3) + 40 for label in labels])
    arrays = {"train_images": images[:80].astype(np.uint8), "train_labels": labels[:80]}
    arrays |= {"test_images": images[80:].astype(np.uint8), "test_labels": labels[80:]}
    np.savez(folder / "stripes.npz", allow_pickle=True, **arrays)
    options = "--data stripes.npz --features contrastive --quick --leaves 2 --batch-size 16 --components 4 --width 16"
    result = run(folder, "train_photographs.py", *options.split(), "--blocks", "1", "--out", "p")
    assert result["effective_leaves"] == 2 and (folder / "p/tree.png").exists()
    assert set(result["seconds"]) == {"network", "features", "tree", "second stage"}  # type: ignore[call-overload]
    pair = ("--model", "p/model.safetensors", "--features", "contrastive", "--components", "4")
    for more in ((), ("--node", "1"), ("--refine", "stripes.npz")):
        made = run(folder, "generate.py", *pair, "--count", "2", "--steps", "2", *more)
        assert (folder / str(made["picture"])).exists()
    quick = ("--data", "stripes.npz", "--quick")
    run(folder, "train_classifier.py", *quick, "--out", "c")
    run(folder, "train_treevae.py", *quick, "--leaves", "2", "--network", "mlp", "--batch-size", "16", "--out", "t")
    files = ("--data", "stripes.npz", *pair, "--classifier", "c/classifier.safetensors")
    beside = ("--tree", "t/model.safetensors", "--samples", "30", "--steps", "2")
    found = run(folder, "evaluate_generation.py", *files, *beside)
    assert {"classifier: tree samples", "classifier: tree reconstructions", "tree samples: purity"} <= set(found)
    assert "classifier: coarse samples" not in found


def test_evaluation(folder: Path) -> None:
    result = run(folder, "evaluate_generation.py", "--samples", "60", "--steps", "2")
    # Real images are closer to real images than those of a network that has seen each image once.
    assert result["classifier: training images"] < result["classifier: samples"]  # type: ignore[operator]
    assert 0 <= result["samples: return rate"] <= 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "leaves"),
        (("--node", "0", "--guidance", "2", "--away-from", "sibling"), "node-0"),
        (("--strip",), "strip"),
        (("--refine", "digits"), "refined"),
    ],
)
def test_pictures(folder: Path, options: tuple[str, ...], name: str) -> None:
    result = run(folder, "generate.py", "--count", "2", "--steps", "2", *options)
    picture = folder / str(result["picture"])
    assert picture.name == f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_encoder(folder: Path) -> None:
    result = run(folder, "train_encoder.py", "--epochs", "5", "--hidden", "8", "--fitted-on", "permanent split")
    assert result["nearest neighbour accuracy"] > 0.6  # type: ignore[operator]
    options = ("--quick", "--encoder", "runs/encoder/encoder.safetensors", "--out", "encoded")
    assert run(folder, "train_munkey.py", *options)["encoder"] == "encoder.safetensors"


def test_features_are_embedded_and_classified(folder: Path) -> None:
    rows = [f"{i % 7},{'red' if i % 3 else 'blue'},{1000 * (i % 2)},{'yes.' if i % 2 else 'no.'}" for i in range(60)]
    lines = [f"{row},{'test' if i >= 40 else 'train'},9" for i, row in enumerate(rows)]
    (folder / "table.csv").write_text("\n".join(["size,colour,price,buys,split,weight", *lines]))
    table = ("--table", "table.csv", "--label", "buys", "--skip", "weight", "--out", "table.npz")
    assert run(folder, "embed.py", *table)["train_images"] == [40, 4]
    found = run(folder, "classify_features.py", "--data", "table.npz", "--out", "features")
    assert found["equal to never"] and found["after"]["accuracy"] == 1  # type: ignore[index]
    for learn in ("trees", "nothing"):
        found = run(folder, "classify_features.py", "--data", "table.npz", "--learn", learn, "--out", "features")
        assert found["equal to never"] and ("network" in found["weights"]) == (learn == "trees")  # type: ignore[operator]
    found = run(folder, "classify_features.py", "--data", "few.npz", "--permanent", "0", "--out", "features")
    assert found["equal to never"] and found["before"]["accuracy"] > 0.8  # type: ignore[index]
    assert found["before"].keys() == {"accuracy", "balanced accuracy", "log loss", "calibration error"}  # type: ignore[attr-defined]


def test_a_classifier_forgets(folder: Path) -> None:
    few = ("--data", "few.npz")
    trained = run(folder, "train_munkey.py", *few, "--mode", "paper", "--epochs", "15")
    assert trained["accuracy"]["test"]["full"] > 0.6  # type: ignore[index]
    result = run(folder, "forget.py", *few, "--label", "3")
    assert result["rows"] and result["found"] == {"before": 2 * result["rows"], "after": 0, "tensors": 0}  # type: ignore[operator]
    assert result["accuracy"]["after"]["forgotten"]["full"] < 0.1  # type: ignore[index]
    assert json.loads((folder / "runs/forgotten/receipt.json").read_text())["rows"] == result["rows"]
    options = (*few, "--quick", "--leave-out", "5", "--out", "exact")
    assert run(folder, "train_munkey.py", *options)["mode"] == "exact"
    (folder / "ids.txt").write_text("7\n" + (folder / "exact" / "left_out.txt").read_text())
    options = (*few, "--file", "ids.txt", "--missing", "ignore", "--beside", "exact/model.safetensors")
    assert run(folder, "forget.py", *options)["accuracy"]["trained without"]  # type: ignore[index]
    exact = (*few, "--model", "exact/model.safetensors", "--label", "3")
    result = run(folder, "forget.py", *exact, "--twins", "0.9")
    assert result["found"] == {"before": result["rows"], "after": 0, "tensors": 0}  # keys alone: values are written
    assert result["twins"], "permanent images of the same digit are near"
    assert result["accuracy"]["after"]["forgotten"]["full"] > 0.5  # type: ignore[index]
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    np.savez(folder / "other.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    refused = started(EXAMPLES / "forget.py", "--ids", "3", "--data", "other.npz", folder=folder)
    assert "the classifier was trained on 'few'; name that with --data, found 'other'" in refused.stderr


def test_on_two_processes(folder: Path) -> None:
    options = ("--node", "0", "--count", "4", "--steps", "2", "--out")
    run(folder, "generate.py", *options, "one")
    run(folder, "generate.py", *options, "two", size=2)
    difference = np.abs(grey(folder / "one/node-0.png") - grey(folder / "two/node-0.png"))  # of 255 levels
    assert difference.max() <= 8 and difference.mean() < 0.02, "the same picture, but for the order of sums"
    few = ("--data", "few.npz")
    for script, rest in (
        ("train_treevae.py", (*few, "--network", "mlp", "--width", "16", "--leaves", "3", "--effort", "0.01")),
        ("train_diffusion.py", (*few, "--epochs", "1", "--batch-size", "128", "--width", "16", "--blocks", "1")),
        ("train_munkey.py", (*few, "--mode", "paper", "--epochs", "10")),
        ("train_munkey.py", (*few, "--epochs", "2", "--leave-out", "3")),
    ):
        out = f"two/{script}-{'paper' in rest}"
        run(folder, script, *rest, "--out", out, size=2)
    for mode, least in (("True", 0.4), ("False", 0.7)):
        found = json.loads((folder / f"two/train_munkey.py-{mode}/results.json").read_text())
        assert found["accuracy"]["test"]["full"] > least
    result = run(folder, "forget.py", "--model", "two/train_munkey.py-True/model", *few, "--ids", "3", "5")
    assert result["found"] == {"before": 4, "after": 0, "tensors": 0}


def test_rivals(folder: Path) -> None:
    found = run(folder, "rivals.py", "--data", "few.npz", "--epochs", "2")["accuracy"]
    assert found["NearestNeighbours"]["test"] > 0.8  # type: ignore[index]
    results = run(folder, "sisa.py", "--data", "few.npz", "--epochs", "1")["results"]
    assert [1 <= result["slices"] <= 6 for result in results[1:]] == [True, True]  # type: ignore[index]


def test_what_another_run_tuned_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text('{"fine_tune": [[2.0, {"lr": 0.1}], [1.0, {"lr": 0.3}]]}')
    about = {"tuned": tmp_path / "tuned.json", "out": tmp_path / "out", "methods": ["fine_tune", "munkey"]}
    assert tune(argparse.Namespace(**about)) == {"fine_tune": {"lr": 0.3}}, "the least gap"
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none"))):
        tune(argparse.Namespace(**about | {"tuned": tmp_path / "none"}))


def test_a_comparison_of_ways_to_forget(folder: Path) -> None:
    options = ("--data", "fewer.npz", "--epochs", "1", "--seeds", "1", "--key-width", "32", "--holdout", "40")
    options += ("--relearn", "3")
    names = ["fine_tune", "munkey", "munkey mode=paper", "nearest_neighbours"]
    found = run(folder, "unlearning_benchmark.py", *options, "--methods", *names)
    methods = [row["method"] for row in found["rows"]]  # type: ignore[attr-defined]
    assert methods[-4:] == names and "munkey: retrained" in methods
    first, second = ([row for row in found["rows"] if row["method"] == f"plain: {what}"] for what in ORACLES)  # type: ignore[attr-defined]
    assert len(first) == len(second) == 1 and first[0]["attacks"] != second[0]["attacks"], "another seed"
    out = folder / "runs/unlearning"
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    tables = (out / "table.md").read_text().split("\n\n")
    assert [each.strip().count("\n") for each in tables] == [1 + len(methods), 1 + len(names), 3]
    exact = next(row for row in found["rows"] if row["method"] == "munkey")  # type: ignore[attr-defined]
    assert exact["equal to its oracle"] and exact["one"]["bytes"]
    assert json.loads((out / "results.json").read_text())["rows"] == found["rows"], "saved as it went"
    few = np.load(folder / "fewer.npz")
    flat = {name: few[name].reshape(len(few[name]), -1) / 16 for name in ("train_images", "test_images")}
    flat = {name: x.astype(np.float32) for name, x in flat.items()}
    np.savez(folder / "flat.npz", **flat, **{name: few[name] for name in ("train_labels", "test_labels")})
    names = ["munkey", "munkey mode=paper", "logistic_regression", "boosted_trees"]
    options = ("--data", "flat.npz", "--epochs", "2", "--seeds", "1", "--relearn", "1", "--out", "flat")
    found = run(folder, "unlearning_benchmark.py", *options, "--methods", *names)
    rows = {row["method"]: row for row in found["rows"]}  # type: ignore[attr-defined]
    assert rows["munkey"]["equal to its oracle"] and rows["munkey"]["test"] > 70 and "inside" not in rows["munkey"]
    other = started(EXAMPLES / "unlearning_benchmark.py", "--epochs", "3", folder=folder)
    assert other.returncode and "holds results of other settings; name another folder" in other.stderr

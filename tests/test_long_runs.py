"""An example that is interrupted in any step, and goes on, ends with the bits of one that was never interrupted."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from munkey import KeyMemoryTransformer
from treediff import TreeTopology, TreeVAE
from treediff.core.distributed import World
from treediff.core.long_run import LongRun

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "train_treevae": "--network mlp --width 16 --leaves 3 --effort 0.01 --batch-size 512 --views 0",
    "train_diffusion": "--width 16 --blocks 1 --dropout 0.1 --epochs 2 --batch-size 128 --holdout 900 --tree tree",
    "train_munkey": "--width 16 --depth 1 --epochs 2 --batch-size 256",
}
# Steps after which a run stops: the first, one in the midst of an epoch, the end of an epoch and that of a stage.
CASES = [
    ("train_treevae", "", (1, 8, 9, 20)),
    ("train_treevae", "--contrastive 1 --decisions 1", (3, 7)),
    ("train_diffusion", "", (1, 5, 8)),
    ("train_diffusion", "--condition tree_diffusion --prior-share 0.5 --ema 0.9", (7,)),
    ("train_munkey", "", (1, 6, 9, 12)),
    ("train_munkey", "--aggregation softmax --leave-out 9", (4,)),
    ("train_munkey", "--mode exact", (4, 6)),
]


class Interrupted(LongRun):
    """A run that hears Ctrl-C in its n-th step; never if that is 0."""

    at = 0

    def measured(self, **values: float | Tensor) -> None:
        super().measured(**values)
        Interrupted.at -= 1
        if not Interrupted.at:
            signal.raise_signal(signal.SIGINT)


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run an example, perhaps until it is interrupted: its exit status."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tree = TreeTopology.balanced(1)
    TreeVAE.for_images(size=8, channels=1, latent=4, width=16, topology=tree, generator=generator).save("tree")

    def act(name: str, *options: str, out: str, at: int = 0, luck: int = 0) -> int:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "LongRun", Interrupted)
        monkeypatch.setattr(module, "tune_cpu", dict)  # this process stays as it is
        monkeypatch.setattr(module, "picture", lambda *_: None, raising=False)
        monkeypatch.setattr(Interrupted, "at", at)
        monkeypatch.setattr(sys, "argv", [name, *SMALL[name].split(), "--quiet", "--out", out, *options])
        with torch.random.fork_rng():
            torch.manual_seed(luck)  # dropout draws from the global generator
            try:
                module.main()
            except SystemExit as error:
                if not isinstance(error.code, int):
                    raise
                return error.code
        return 0

    yield act
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("name", "options", "steps"), CASES, ids=[" ".join(case[:2]).strip() for case in CASES])
def test_an_interrupted_example_ends_with_the_same_bits(
    run: Run, name: str, options: str, steps: tuple[int, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(name, *options.split(), out="whole") == 0
    expected = load_file("whole/model.safetensors")
    assert not Path("whole/checkpoint.safetensors").exists(), "a run that has finished needs none"
    for at in steps:
        out = f"after {at}"
        capfd.readouterr()
        assert run(name, *options.split(), out=out, at=at) == 130
        goodbye = f"stopped; go on with --resume from the checkpoint {out}/checkpoint.safetensors"
        assert capfd.readouterr().err.splitlines()[-1] == goodbye
        assert not Path(out, "model.safetensors").exists()
        assert run(name, *options.split(), "--resume", out=out, at=2, luck=5) in (0, 130)  # and once more
        if Path(out, "checkpoint.safetensors").exists():
            assert run(name, *options.split(), "--resume", out=out, luck=6) == 0
        found = load_file(f"{out}/model.safetensors")
        assert found.keys() == expected.keys()
        assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
        assert [file for file in os.listdir(out) if "checkpoint" in file] == []
    results = [json.loads(Path(out, "results.json").read_text()) for out in ("whole", out)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]


def test_what_decides_a_run_must_be_the_same(run: Run) -> None:
    assert run("train_munkey", out="out", at=3) == 130
    with pytest.raises(
        FileExistsError, match=r"a checkpoint of an interrupted run, 'out/checkpoint.safetensors'; go on"
    ):
        run("train_munkey", out="out")
    with pytest.raises(ValueError, match=r"differs at 'settings/batch_size': expected 128, found 256"):
        run("train_munkey", "--batch-size", "128", "--resume", out="out")
    with pytest.raises(ValueError, match=r"differs at 'settings/mode': expected 'exact', found 'paper'"):
        run("train_munkey", "--mode", "exact", "--resume", out="out")
    assert run("train_munkey", "--resume", out="out") == 0
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint at 'out/checkpoint.safetensors'; a run leaves"
    ):
        run("train_munkey", "--resume", out="out")


def test_a_memory_on_many_processes_does_not_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("train_munkey"), "start", lambda: World(0, 2))
    with pytest.raises(SystemExit, match="--resume goes on with a run on one process, whose memory is in one place"):
        run("train_munkey", "--resume", out="out")


def test_a_classifier_that_went_on_forgets_what_its_optimiser_knows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[KeyMemoryTransformer, torch.optim.Optimizer]] = []
    attach = KeyMemoryTransformer.attach
    monkeypatch.setattr(
        KeyMemoryTransformer,
        "attach",
        lambda self, *held: (found.extend((self, one) for one in held), attach(self, *held)),
    )
    assert run("train_munkey", out="out", at=7) == 130
    found.clear()
    assert run("train_munkey", "--resume", out="out") == 0
    [(model, optimizer)] = found
    values = model.memory.store.values
    moments = optimizer.state[values]["exp_avg"]
    row = int(model.memory.store.rows_of([7]))
    marks = [x[row].detach().numpy().tobytes() for x in (moments, values)]
    assert moments[row].any() and all(mark in b"".join(_bytes(moments, values)) for mark in marks)
    model.forget([7])
    assert not any(mark in b"".join(_bytes(moments, values)) for mark in marks)


def _bytes(*tensors: Tensor) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]

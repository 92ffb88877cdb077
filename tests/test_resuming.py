"""An example that is interrupted at any time, and goes on, ends with the bits of one that was never interrupted."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from munkey import KeyMemoryTransformer
from treediff import TreeTopology, TreeVAE
from treediff.core.distributed import World

SMALL = {
    "train_treevae": "--network mlp --width 16 --leaves 3 --effort 0.01 --batch-size 512 --views 0",
    "train_diffusion": "--width 16 --blocks 1 --dropout 0.1 --epochs 2 --batch-size 128 --holdout 900 --tree tree",
    "train_munkey": "--mode paper --width 16 --depth 1 --epochs 2 --batch-size 256",
}
# Steps in which a run is interrupted: of a later stage, in the midst of an epoch, and of the first one.
CASES = [
    ("train_treevae", "", (9, 20)),
    ("train_treevae", "--contrastive 1 --decisions 1", (7,)),
    ("train_diffusion", "--condition tree_diffusion --prior-share 0.5 --ema 0.9", (7,)),
    ("train_munkey", "--aggregation softmax --leave-out 9", (8,)),
    ("train_munkey", "--mode exact", (4,)),
]
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run an example, perhaps until it is interrupted."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tree = TreeTopology.balanced(1)
    TreeVAE.for_images(size=8, channels=1, latent=4, width=16, topology=tree, generator=generator).save("tree")
    step = OneCycleLR.step

    def act(name: str, *options: str, out: str, at: int = 0, luck: int = 0) -> None:
        module, left = importlib.import_module(name), at

        def stepping(self: OneCycleLR, epoch: int | None = None) -> None:
            nonlocal left
            step(self, epoch)
            left -= 1
            if not left:
                raise KeyboardInterrupt

        monkeypatch.setattr(OneCycleLR, "step", stepping)
        monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)  # this process stays as it is
        monkeypatch.setattr(module, "picture", lambda *_: None, raising=False)
        monkeypatch.setattr(
            sys, "argv", [name, *SMALL[name].split(), "--quiet", "--save-every", "0", "--out", out, *options]
        )
        with torch.random.fork_rng():
            torch.manual_seed(luck)
            module.main()

    return act


@pytest.mark.parametrize(("name", "options", "steps"), CASES, ids=[" ".join(case[:2]).strip() for case in CASES])
def test_an_interrupted_example_ends_with_the_same_bits(
    run: Run, name: str, options: str, steps: tuple[int, ...]
) -> None:
    run(name, *options.split(), out="whole")
    expected = load_file("whole/model.safetensors")
    assert not Path("whole/checkpoint.safetensors").exists(), "a run that has finished needs none"
    for at in steps:
        out = f"after {at}"
        with pytest.raises(KeyboardInterrupt):
            run(name, *options.split(), out=out, at=at + 1)  # the scheduler takes a step when it is made
        assert not Path(out, "model.safetensors").exists()
        run(name, *options.split(), "--resume", out=out, luck=5)
        found = load_file(f"{out}/model.safetensors")
        assert found.keys() == expected.keys()
        assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []
        assert [file for file in os.listdir(out) if "checkpoint" in file] == []
    results = [json.loads(Path(out, "results.json").read_text()) for out in ("whole", out)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]


def test_what_decides_a_run_must_be_the_same(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("train_munkey", out="out", at=8)
    with pytest.raises(ValueError, match=r"differs at 'settings/batch_size': expected 128, found 256"):
        run("train_munkey", "--batch-size", "128", "--resume", out="out")
    run("train_munkey", "--resume", out="out")
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint at 'out/checkpoint.safetensors'; a run leaves"
    ):
        run("train_munkey", "--resume", out="out")


def test_a_memory_on_many_processes_does_not_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("train_munkey"), "start", lambda: World(0, 2))
    with pytest.raises(SystemExit, match="--resume needs a run on one process, whose memory is in one place"):
        run("train_munkey", "--resume", out="out")


def test_a_classifier_that_went_on_forgets_what_its_optimiser_knows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[KeyMemoryTransformer, torch.optim.Optimizer]] = []
    attach = KeyMemoryTransformer.attach
    monkeypatch.setattr(
        KeyMemoryTransformer,
        "attach",
        lambda self, *held: (found.extend((self, one) for one in held), attach(self, *held)),
    )
    with pytest.raises(KeyboardInterrupt):
        run("train_munkey", out="out", at=9)
    found.clear()
    run("train_munkey", "--resume", out="out")
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

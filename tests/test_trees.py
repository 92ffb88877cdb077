"""The trees and pairs that ship with the examples are those of the results pages, and do what is said of them there."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import treediff
from treediff import DiffuseTreeVAE, TreeVAE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
TREES, PAIRS = (sorted((ROOT / "examples" / kind).glob("*.safetensors")) for kind in ("trees", "models"))
SHORT = {"mnist": "mnist", "fashion-mnist": "fashion"}
each_tree, each_pair = (
    pytest.mark.parametrize("path", x, ids=lambda path: path.stem)
    for x in (TREES, [path for path in PAIRS if path.stem in SHORT])  # a pair of features has no tree of images
)


def loaded(path: Path) -> Any:  # noqa: ANN401
    """By the class that the header names."""
    with safe_open(path, framework="pt") as file:
        name = json.loads(file.metadata()["treediff"])["class"]
    model = getattr(treediff, name).load(path).eval()
    assert type(model).__name__ == name
    return model


def recorded(name: str) -> dict[str, Any]:
    """A raw result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def variation(images: Tensor) -> float:
    """How much neighbouring pixels differ."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


def test_files_are_those_of_the_results_pages() -> None:
    """Each digest stands behind the name of its file, and there are no other files and no other digests."""
    pages = "\n".join((RESULTS / f"{page}.md").read_text(encoding="utf-8") for page in ("treevae", "diffusion"))
    listed = dict(re.findall(r"`(examples/[\w/.-]+)`,\s+SHA-256\s+`([0-9a-f]{64})`", pages))
    there = [*TREES, *PAIRS]
    assert (len(TREES), len(PAIRS)) == (2, 3) and len(re.findall(r"\b[0-9a-f]{64}\b", pages)) == len(there)
    assert listed == {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


@each_tree
def test_a_tree_is_the_recorded_one(path: Path) -> None:
    model = loaded(path)
    assert isinstance(model, TreeVAE) and len(model.topology.leaves) == 10
    assert json.loads(model.topology.to_json()) == json.loads(recorded(f"{path.stem}-0")["tree"])
    with torch.no_grad():
        drawn = model.sample(200, generator=torch.Generator().manual_seed(0))
        returned = (model.cluster(drawn.images) == drawn.leaf).float().mean()
    assert returned == pytest.approx(recorded(f"{SHORT[path.stem]}_generation")["tree samples: return rate"], abs=0.05)


@each_pair
def test_a_pair_is_the_recorded_one(path: Path) -> None:
    """On the tree that ships, with the size of the record; its images are sharp and of the leaf that was asked for."""
    model = loaded(path)
    assert isinstance(model, DiffuseTreeVAE)
    tree = loaded(ROOT / "examples" / "trees" / path.name)
    found, expected = model.tree_vae.state_dict(), tree.state_dict()
    assert model.tree_vae.topology == tree.topology and found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    run = recorded(f"{SHORT[path.stem]}_diffusion")
    assert sum(weight.numel() for weight in model.ddpm.parameters()) == run["parameters"]
    with torch.no_grad():
        drawn = model.generate(40, steps=4, grid="karras", generator=torch.Generator().manual_seed(0))
        returned = (tree.cluster(drawn.images) == drawn.leaf).float().mean()
    assert returned > recorded(f"{SHORT[path.stem]}_generation")["samples: return rate"] - 0.1
    assert variation(drawn.images) > 1.05 * variation(drawn.coarse)

"""The trees that ship with the examples are the ones the results page describes."""

import hashlib
from pathlib import Path

import pytest

from treediff import TreeVAE

ROOT = Path(__file__).parents[1]
TREES = sorted((ROOT / "examples" / "trees").glob("*.safetensors"))


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.stem)
def test_a_tree_loads_and_has_the_digest_of_the_results(path: Path) -> None:
    model = TreeVAE.load(path)
    assert len(model.topology.leaves) == 10
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in (ROOT / "docs" / "results" / "treevae.md").read_text(encoding="utf-8")


def test_there_are_trees() -> None:
    assert TREES

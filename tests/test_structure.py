"""The structure of both packages: no towers of classes, no circles of imports, one way between the packages."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import pytest
from torch import nn

from munkey import DurableStore, KeyMemoryTransformer, KeyStore, ShardedKeyStore
from treediff import DiffuseTreeVAE, LeafConditionedDDPM, TreeVAE
from treediff.metrics import FeatureClassifier

ROOT = Path(__file__).parents[1]
PACKAGES = ("munkey", "treediff")


def modules(*folders: str) -> dict[str, ast.Module]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in zip(names, paths, strict=True)}


def imports(tree: ast.Module) -> set[str]:
    """Every name that a module imports, those for type checkers too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_class_is_a_base_that_is_never_built_and_has_one_child() -> None:
    own: set[str] = set()
    children: collections.Counter[str] = collections.Counter()
    built: set[str] = set()
    for name, tree in modules(*PACKAGES, "tests", "examples", "benchmarks").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and name.startswith(PACKAGES):
                own.add(node.name)
                children.update(ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases)
            elif isinstance(node, ast.Call):
                built.add(ast.unparse(node.func).split(".")[-1])
    assert len(own) > 100 and children["Follower"] > 5
    assert [name for name in sorted(own) if children[name] == 1 and name not in built] == []


@pytest.mark.parametrize(
    "model",
    [TreeVAE, LeafConditionedDDPM, DiffuseTreeVAE, KeyMemoryTransformer, FeatureClassifier, KeyStore, ShardedKeyStore],
)
def test_nothing_is_above_a_model_but_a_module(model: type[nn.Module]) -> None:
    assert model.__mro__[1:] == nn.Module.__mro__


def test_a_durable_store_is_a_store() -> None:
    assert DurableStore.__mro__[1:3] == (KeyStore, nn.Module)


def test_no_circle_of_imports() -> None:
    found = modules(*PACKAGES)
    # A package names its own modules, which may name it.
    edges = {
        name: {target for target in imports(tree) & found.keys() if not target.startswith(f"{name}.")} - {name}
        for name, tree in found.items()
    }
    assert len(edges) > 150
    while edges:
        ends = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert ends, f"a circle among {sorted(edges)}"
        for name in ends:
            del edges[name]


def test_munkey_stands_on_the_core_and_two_layers_of_treediff_and_treediff_on_nothing_of_munkey() -> None:
    for name, tree in modules("munkey").items():
        others = {target for target in imports(tree) if target.split(".")[0] == "treediff"}
        assert {
            t
            for t in others
            if not f"{t}.".startswith(("treediff.core.", "treediff.layers.attention.", "treediff.layers.contrastive."))
        } == set(), name
    for name, tree in modules("treediff").items():
        assert {target for target in imports(tree) if target.split(".")[0] == "munkey"} == set(), name

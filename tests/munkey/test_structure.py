"""The structure that munkey's store is to keep: no towers of classes, no circles of imports."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import torch

from munkey import DurableStore, KeyStore, ShardedKeyStore

ROOT = Path(__file__).parents[2]


def modules(folder: str) -> dict[str, ast.Module]:
    paths = sorted((ROOT / folder).rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def test_no_class_of_the_store_is_a_base_that_is_never_built_and_has_one_child() -> None:
    own: set[str] = set()
    children: collections.Counter[str] = collections.Counter()
    built: set[str] = set()
    for folder in ("munkey", "treediff", "tests", "examples", "benchmarks"):
        for name, tree in modules(folder).items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    if name.startswith(("munkey.store", "munkey.search", "munkey.sharded")):
                        own.add(node.name)
                    if folder in ("munkey", "treediff"):
                        children.update(ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases)
                elif isinstance(node, ast.Call):
                    built.add(ast.unparse(node.func).split(".")[-1])
    assert "KeyStore" in own and children["Follower"] > 5
    assert [name for name in sorted(own) if children[name] == 1 and name not in built] == []


def test_each_store_is_one_class() -> None:
    assert KeyStore.__mro__[1] is torch.nn.Module is ShardedKeyStore.__mro__[1]
    assert DurableStore.__mro__[1:3] == (KeyStore, torch.nn.Module)


def test_no_circle_of_imports() -> None:
    found = modules("munkey")
    edges: dict[str, set[str]] = {}
    for name, tree in found.items():
        targets = set()
        for node in ast.walk(tree):  # imports for type checkers, too
            if isinstance(node, ast.ImportFrom) and node.module:
                targets |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        # A package names its own modules, which may name it.
        edges[name] = {target for target in targets & found.keys() if not target.startswith(name + ".")} - {name}
    assert len(edges) > 50
    while edges:
        ends = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert ends, f"a circle among {sorted(edges)}"
        for name in ends:
            del edges[name]

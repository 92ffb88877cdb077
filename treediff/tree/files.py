"""Headers of files of models on a tree: configuration, topology and dtype."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch

from treediff.core.io import build, described_by, dtype_name, dtype_named, require_config
from treediff.tree.topology import TreeTopology

__all__ = ["from_header", "header_of", "require_topology"]

Path = str | os.PathLike[str]
Model = TypeVar("Model")


class OnTree(Protocol):
    """Model on a tree that records its configuration."""

    config: dict[str, Any] | None

    @property
    def topology(self) -> TreeTopology:
        """Tree of the model."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""


def header_of(model: OnTree) -> dict[str, Any]:
    """Return the header of a model's file: all that the file holds besides the weights."""
    topology = json.loads(model.topology.to_json())
    return {"config": model.config, "topology": topology, "dtype": dtype_name(model.dtype)}


def from_header(cls: type[Model], header: Mapping[str, Any], path: Path, parts: Mapping[str, object]) -> Model:
    """Return the model that a header describes, without its weights.

    Args:
        cls: class of the model, whose factories take `topology`, `dtype` and `generator`.
        header: of a file.
        path: name of the file, for messages.
        parts: custom modules that the model was built with, by name.

    Raises:
        ValueError: if the model was built from parts alone, which no header describes, or the header is damaged.
    """
    config = require_config(header, path)
    if "size" in config:  # of a second stage in format 1
        config = {"for_images": config}
    topology, dtype = require_topology(header, path), dtype_named(header.get("dtype", "float32"), path)
    return build(cls, config, path, parts, topology=topology, dtype=dtype)


def require_topology(header: Mapping[str, Any], path: Path) -> TreeTopology:
    """Return the tree in a file's header.

    Raises:
        ValueError: if the header holds no tree.
    """
    with described_by(path, header.get("topology")):
        return TreeTopology.from_json(json.dumps(header.get("topology")))

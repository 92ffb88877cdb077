"""Hooks of mkdocs: pages of the reference, one for each module in the menu of mkdocs.yml; none may be missing."""

from __future__ import annotations

import importlib
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LOG = logging.getLogger("mkdocs.plugins.reference")  # a warning there fails the build


def _pages(menu: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the paths in a menu, at any depth."""
    if isinstance(menu, str):
        yield menu
    else:
        for part in menu.values() if isinstance(menu, dict) else menu:
            yield from _pages(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write a page for each path under reference/."""
    for path in _pages(config.nav):
        if path.startswith("reference/"):
            module = path.removeprefix("reference/").removesuffix(".md").replace("/", ".")
            text = f"---\ntitle: {module}\n---\n\n::: {module}\n    options:\n      heading_level: 1\n"
            files.append(File.generated(config, path, content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of every public name of a package that the reference lacks."""
    inventory = Path(config.site_dir, "objects.inv").read_bytes()
    found = zlib.decompress(inventory[inventory.index(b"zlib.\n") + len(b"zlib.\n") :]).decode()
    known = {line.split(" ")[0] for line in found.splitlines()}
    for package in ("treediff", "munkey"):
        missing = [name for name in importlib.import_module(package).__all__ if f"{package}.{name}" not in known]
        if missing:
            _LOG.warning("the reference lacks %s of %s; add the module to the menu in mkdocs.yml", missing, package)

"""What tests of files begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from durables import create


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one store, not open."""
    folder = tmp_path_factory.mktemp("filled")
    with create(folder / "store") as store:
        store.forget([11])  # so that there is room
    return folder

"""Tools that several readers share."""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
import zlib
from types import ModuleType

# Errors of zipfile, gzip and numpy when bytes are flipped or cut off.
DAMAGE = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def import_optional(module: str, why: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{why}, which is not installed; pip install 'treediff[{extra}]'") from error

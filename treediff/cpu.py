"""Settings of a process that trains on a CPU. Nothing else in the library touches the process; scripts call this."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["tune_cpu"]

# From malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def tune_cpu() -> dict[str, bool]:
    """Make training on a CPU faster by two settings of the process; call it once, before the first tensor.

    *Memory is kept.* A training step frees what it allocated. By default glibc gives large pieces back to the system at
    once, which hands them out again in the next step, page by page and set to zero. Afterwards the process keeps what
    it once had, so its memory stays at its peak.

    *Denormals are zero.* Moments of Adam that fade away become numbers too small for a CPU to multiply at full speed.

    Returns:
        which settings took effect: `memory` is False without glibc, `denormals` on a CPU that knows no such mode.

    Examples:
        >>> sorted(tune_cpu())
        ['denormals', 'memory']
    """
    return {"memory": _keep_memory(), "denormals": torch.set_flush_denormal(True)}


def _keep_memory() -> bool:
    """Allocate everything on the heap, and never shrink it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

"""What a CPU can do, and settings of a process that trains on one; nothing in the library makes these, scripts do."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

__all__ = ["has_fast", "tune_cpu"]

# Instructions for products, by the names that `torch.cpu.get_capabilities` gives them.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.int8: ("avx512_vnni", "avx_vnni", "amx_int8"),
}

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


@cache
def has_fast(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products of a dtype; without, PyTorch makes them up, many times slower.

    A processor with AVX2 alone takes some fifty times as long for a product in bfloat16 as in float32. So let this
    decide about autocast: `torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16))`.

    Args:
        dtype: float32 and float64 are fast everywhere; of others bfloat16 and int8 are known.

    Examples:
        >>> has_fast(torch.float32)
        True
    """
    if dtype in (torch.float32, torch.float64):
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in _PRODUCTS.get(dtype, ()))


def _keep_memory() -> bool:
    """Allocate everything on the heap, and never shrink it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

"""Dtypes that the CPU multiplies natively."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["has_fast"]

# Instructions for matmuls, by their names in `torch.cpu.get_capabilities`.
_PRODUCTS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.int8: ("avx512_vnni", "avx_vnni", "amx_int8"),
}


@cache
def has_fast(dtype: torch.dtype) -> bool:
    """Return whether the CPU multiplies matrices of a dtype natively; otherwise PyTorch emulates it, many times slower.

    A processor with AVX2 alone takes some fifty times as long for a matmul in bfloat16 as in float32. So let the result
    decide about autocast: `torch.autocast("cpu", torch.bfloat16, enabled=has_fast(torch.bfloat16))`.

    Args:
        dtype: float32 and float64 are fast everywhere; of other dtypes bfloat16 and int8 are known.

    Examples:
        >>> has_fast(torch.float32)
        True
    """
    if dtype in (torch.float32, torch.float64):
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in _PRODUCTS.get(dtype, ()))

"""Settings of the process, tried in processes of their own."""

import platform
import subprocess
import sys

import pytest
import torch

from treediff.core.cpu import has_fast

# Fills 32 MiB twelve times, and prints how many pages the system had to hand out for the last nine.
PAGES = """
import resource, torch
from treediff.core.cpu import tune_cpu
{before}
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(12):
    torch.ones(8 * 2**20)
    counts.append(pages())
print(counts[-1] - counts[2])
"""
DENORMAL = """
import torch
from treediff.core.cpu import tune_cpu
assert tune_cpu()["denormals"]
print((torch.tensor([1e-30]) * torch.tensor([1e-10])).item())
"""


def run(code: str) -> float:
    command = [sys.executable, "-W", "error", "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_is_kept() -> None:
    page = 4096
    asked = 9 * 8 * 2**20 * 4 / page
    kept, given_back = run(PAGES.format(before="assert tune_cpu()['memory']")), run(PAGES.format(before=""))
    assert kept < 0.1 * asked
    assert given_back > kept


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors may know no such mode")
def test_denormals_are_zero() -> None:
    assert run(DENORMAL) == 0


def test_without_glibc_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    from treediff.core import cpu

    class NoLibrary:
        def __init__(self, name: object) -> None:
            raise OSError

    monkeypatch.setattr(cpu.ctypes, "CDLL", NoLibrary)
    assert cpu._keep_memory() is False


@pytest.mark.parametrize(
    ("known", "bfloat16", "int8"),
    [
        ({}, False, False),
        ({"avx2": True, "avx512_bf16": False, "avx_vnni": False}, False, False),
        ({"avx512_bf16": True, "avx512_vnni": True}, True, True),
        ({"bf16": True}, True, False),
        ({"avx_vnni": True}, False, True),
    ],
)
def test_what_a_processor_multiplies(
    known: dict[str, bool], bfloat16: bool, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    has_fast.cache_clear()
    try:
        assert has_fast(torch.float32) and has_fast(torch.float64)
        assert (has_fast(torch.bfloat16), has_fast(torch.int8), has_fast(torch.float16)) == (bfloat16, int8, False)
    finally:
        has_fast.cache_clear()

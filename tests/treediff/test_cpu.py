"""Settings of the process, tried in processes of their own."""

import platform
import subprocess
import sys

import pytest

# Fills 32 MiB twelve times, and prints how many pages the system had to hand out for the last nine.
PAGES = """
import resource, torch
from treediff.cpu import tune_cpu
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
from treediff.cpu import tune_cpu
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
    from treediff import cpu

    class NoLibrary:
        def __init__(self, name: object) -> None:
            raise OSError

    monkeypatch.setattr(cpu.ctypes, "CDLL", NoLibrary)
    assert cpu._keep_memory() is False

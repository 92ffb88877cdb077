"""Threads of Python for the blocks of a tensor, where an operation is too small for the threads of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["in_threads"]

_EACH = 4  # blocks for each thread at least; for fewer a thread is not worth its start


def in_threads(act: Callable[[int], object], starts: range) -> None:
    """Call `act` for every start of a block, without gradients, by as many threads as PyTorch may use.

    PyTorch divides an operation on many numbers among its own threads, which wait for one another after each operation.
    Blocks that fit into a cache are below that size, so that a thread works on a block alone, and no thread waits.

    Args:
        act: function of the start of a block; writes only to that block.
        starts: of the blocks.

    Examples:
        >>> x = torch.arange(6.0)
        >>> in_threads(lambda start: x[start : start + 2].mul_(10), range(0, 6, 2))
        >>> x.tolist()
        [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    """
    threads = min(torch.get_num_threads(), len(starts) // _EACH)
    if threads < 2:
        with torch.no_grad():
            for start in starts:
                act(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(torch.no_grad()(act), starts):
            pass

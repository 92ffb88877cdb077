"""The same script on one process or on many, on PyTorch's own engine.

`torchrun --nproc-per-node 2 script.py` starts a script twice; `start` joins the processes. Each takes its share of
every batch, and `data_parallel` averages gradients, so that a step is that of one process with the whole batch.

Letters: `B` batch, `N` processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["World", "data_parallel", "start"]


@dataclass(frozen=True)
class World:
    """Which of how many processes this is.

    Args:
        rank: from 0 to `size - 1`.
        size: `N`.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch `(B,)`, each as long as the others.

        Rows are repeated from the start where they do not come out even, as in `torch.utils.data.DistributedSampler`.

        Examples:
            >>> World(1, 2).share(torch.tensor([5, 6, 7]))
            tensor([7, 5])
        """
        if not len(rows):
            return rows
        each = -(-len(rows) // self.size)
        return rows[torch.arange(self.rank * each, (self.rank + 1) * each, device=rows.device) % len(rows)]


def start() -> World:
    """Join the processes that `torchrun` started, by nccl on accelerators and gloo elsewhere; or be alone.

    Raises:
        ValueError: if the environment says that there are several processes, but not where they meet.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def data_parallel(module: nn.Module, method: str = "forward", *, unused: bool = False) -> Callable[..., Any]:
    """A method of a module whose gradients are averaged over all processes; the method itself on one.

    Modules that say `per_rank = True`, such as a memory that is spread over processes, are left alone.

    Args:
        module: the same on all processes.
        method: such as 'loss'.
        unused: whether a step may leave out some of its trained parameters.

    Examples:
        >>> loss = data_parallel(torch.nn.Linear(2, 1))
        >>> loss(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return getattr(module, method)  # type: ignore[no-any-return]
    call = _Call(module, method)
    alone = [f"{name}." for name, part in call.named_modules() if getattr(part, "per_rank", False)]
    names = [name for name in call.state_dict(keep_vars=True) if name.startswith(tuple(alone))]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, names)
    return DistributedDataParallel(call, broadcast_buffers=False, find_unused_parameters=unused)


class _Call(nn.Module):
    """A module whose `forward` is a method of another."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        return getattr(self.module, self.method)(*args, **settings)

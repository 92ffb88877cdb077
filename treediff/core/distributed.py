"""The same script on one process or on many, on PyTorch's own engine.

`torchrun --nproc-per-node 2 script.py` starts a script twice; `start` joins the processes. Each takes its share of
every batch, and `data_parallel` averages gradients, so that a step is that of one process with the whole batch.

Letters: `B` batch, `N` processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from treediff.core.noise import combine_seeds, seed_from

__all__ = ["ALONE", "World", "data_parallel", "start"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is; a lone one if not told otherwise.

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

    def own(self, generator: torch.Generator) -> torch.Generator:
        """A generator whose numbers no other process draws, seeded from one that all have; that one itself if alone."""
        if self.size == 1:
            return generator
        seed = combine_seeds(seed_from(generator), self.rank)
        return torch.Generator(generator.device).manual_seed(seed)

    def map(self, act: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """What an act makes of all parts, in their order and the same on all processes, each of which does some.

        Args:
            act: its results can be pickled; tensors among them are on the CPU.
            parts: the same on all processes.
        """
        mine = [act(part) for part in parts[self.rank :: self.size]]
        if self.size == 1:
            return mine
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return [everyone[number % self.size][number // self.size] for number in range(len(parts))]

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the processes have."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, x: Tensor) -> Tensor:
        """`(N B, ...)` rows of all processes, `(B, ...)` of each, those of rank 0 first; gradients flow to all."""
        if self.size == 1:
            return x
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))

    @torch.no_grad()
    def follow_first(self, module: nn.Module) -> None:
        """Have the weights and buffers of the first process."""
        if self.size > 1:
            for tensor in module.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), 0)


#: The world of a script that `torchrun` did not start.
ALONE = World()


def start() -> World:
    """Join the processes that `torchrun` started, by nccl on accelerators and gloo elsewhere; or be alone.

    Each process gets an accelerator of its own, and 'cuda' then means that one.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        accelerated = torch.cuda.is_available()
        if accelerated and "LOCAL_RANK" in os.environ:  # or all processes of a machine would share the first one
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if accelerated else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def data_parallel(act: Callable[..., Any], *modules: nn.Module, unused: bool = False) -> Callable[..., Any]:
    """A loss whose gradients are averaged over all processes; the loss itself on a lone one.

    It is `torch.nn.parallel.DistributedDataParallel` for any function. Modules that say `per_rank = True`, such as a
    memory that is spread over processes, are left alone.

    Args:
        act: such as `model.loss`.
        modules: whose parameters train in it; the same on all processes.
        unused: whether a step may leave out some of them.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> loss = data_parallel(lambda x: model(x).square().mean(), model)
        >>> loss(torch.zeros(3, 2)).backward()
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return act
    call = _Call(act, modules)
    alone = tuple(f"{name}." for name, part in call.named_modules() if getattr(part, "per_rank", False))
    names = [name for name, _ in call.named_parameters() if name.startswith(alone)]
    names += [name for name, _ in call.named_buffers()]  # nothing here changes them
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, names)
    return DistributedDataParallel(call, find_unused_parameters=unused)


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, act: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.act, self.parts = act, nn.ModuleList(modules)

    def forward(self, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        return self.act(*args, **settings)

"""Training with one script on one process or on many, on PyTorch's own engine.

`torchrun --nproc-per-node 2 script.py` starts a script twice; `start` joins the processes. Each process takes its share
of every batch, and `data_parallel` averages gradients, so that a step equals the step of one process with the whole
batch.

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
    """World of processes, with the rank of this process; a single process by default.

    Args:
        rank: from 0 to `size - 1`.
        size: `N`.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """True if this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch `(B,)`; all parts are equally long.

        If `N` does not divide `B`, rows are repeated from the start, as in `torch.utils.data.DistributedSampler`.

        Examples:
            >>> World(1, 2).share(torch.tensor([5, 6, 7]))
            tensor([7, 5])
        """
        if not len(rows):
            return rows
        each = -(-len(rows) // self.size)
        return rows[torch.arange(self.rank * each, (self.rank + 1) * each, device=rows.device) % len(rows)]

    def own(self, generator: torch.Generator) -> torch.Generator:
        """Return a generator whose numbers no other process draws; on a single process `generator` itself.

        The seed comes from `generator`, which is in the same state on all processes, and the rank.
        """
        if self.size == 1:
            return generator
        seed = combine_seeds(seed_from(generator), self.rank)
        return torch.Generator(generator.device).manual_seed(seed)

    def map(self, act: Callable[[T], R], parts: Sequence[T]) -> list[R]:
        """Return the results of `act` for all parts, in order and equal on all processes; each process computes some.

        Args:
            act: function of one part, whose results can be pickled; tensors in the results are on the CPU.
            parts: the same on all processes.
        """
        mine = [act(part) for part in parts[self.rank :: self.size]]
        if self.size == 1:
            return mine
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return [everyone[number % self.size][number // self.size] for number in range(len(parts))]

    def greatest(self, number: int) -> int:
        """Return the greatest of the numbers that the processes have."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows `(N B, ...)` of all processes, `(B, ...)` of each, rank 0 first; gradients flow to all."""
        if self.size == 1:
            return x
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous()))

    @torch.no_grad()
    def follow_first(self, module: nn.Module) -> None:
        """Overwrite weights and buffers with the values of the first process."""
        if self.size > 1:
            for tensor in module.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), 0)


#: The world of a script that `torchrun` did not start.
ALONE = World()


def start() -> World:
    """Join the processes that `torchrun` started, by nccl on accelerators and gloo elsewhere.

    Without `torchrun`, return `ALONE`. Each process gets an accelerator of its own, and 'cuda' then means that
    accelerator.
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
    """Return a loss whose gradients are averaged over all processes; on a single process, the loss itself.

    This is `torch.nn.parallel.DistributedDataParallel` for any function. Modules with `per_rank = True`, such as a
    memory that is spread over processes, are not averaged.

    Args:
        act: the loss, such as `model.loss`.
        modules: modules whose parameters train in `act`; the same on all processes.
        unused: whether a step may leave out some of these parameters.

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
    names += [name for name, _ in call.named_buffers()]  # buffers, which no step here changes
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(call, names)
    return DistributedDataParallel(call, find_unused_parameters=unused)


class _Call(nn.Module):
    """A function as a module."""

    def __init__(self, act: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.act, self.parts = act, nn.ModuleList(modules)

    def forward(self, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        return self.act(*args, **settings)

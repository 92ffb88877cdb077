"""Communication between the ranks of a process group, on PyTorch's collectives.

Every method is a collective: all ranks of the group call it, in the same order. Without a process group there is one
rank, and nothing is sent.

Letters: `n` rows of this rank, `N` ranks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "Route"]

T = TypeVar("T")

#: An error is raised on every rank as the first of these types that it is an instance of.
_KINDS = (KeyError, TypeError, ValueError, FileNotFoundError, FileExistsError, OSError)


class Ranks:
    """The ranks of a group, and the traffic of this rank.

    Args:
        group: group of `torch.distributed`; the default group if not given, or this process alone if there is no group.

    Attributes:
        rank: rank of this process.
        size: `N`.
        messages: number of messages that this rank has sent to other ranks.
        bytes: number of bytes of these messages.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        self.messages = self.bytes = 0

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # copies share one process group

    # --- small objects ------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, an object that can be pickled."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        found, counts = self.gather_rows(data)
        return [pickle.loads(part.numpy().tobytes()) for part in found.split(counts)]

    def agree(self, act: Callable[[], T]) -> T:
        """Return the result of `act` once it ran on all ranks; an error of one rank is raised on all ranks."""
        error, made = None, None
        try:
            made = act()
        except Exception as raised:
            error = raised
        self.fail(error, anywhere=self.size > 1 and self.any(error is not None))
        return made  # type: ignore[return-value]

    def fail(self, error: Exception | None, *, anywhere: bool) -> None:
        """Raise the error of this rank or, if any rank has an error, the error of the first such rank."""
        if anywhere:
            texts = self.gather(None if error is None else (_kind(error), _text(error)))
            if error is None:
                rank, (kind, text) = next((r, found) for r, found in enumerate(texts) if found is not None)
                raise kind(f"{text} (on rank {rank})")
        if error is not None:
            raise error

    def same(self, what: str, value: object) -> None:
        """Raise ValueError on all ranks, with the value of each rank, unless all values are the same."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            each = ", ".join(f"rank {rank} has {other!r}" for rank, other in enumerate(found))
            raise ValueError(f"all ranks must have the same {what}: {each}")

    def any(self, here: bool) -> bool:
        """Return whether `here` is true on any rank."""
        return any(there for (there,) in self.numbers(here))

    def numbers(self, *numbers: int) -> list[list[int]]:
        """Return integers of each rank, the same number on every rank."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        self._count(mine, self.size - 1)
        return [each.tolist() for each in found]

    # --- rows ---------------------------------------------------------------------------------------------

    def gather_rows(self, x: Tensor, counts: list[int] | None = None) -> tuple[Tensor, list[int]]:
        """Return the rows `(n_0 + n_1 + ..., ...)` of all ranks, and their counts, which are gathered if not given."""
        if self.size == 1:
            return x, [len(x)]
        counts = counts or [count for (count,) in self.numbers(len(x))]
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in range(self.size)]
        if max(counts):
            dist.all_gather(found, padded, group=self.group)
            self._count(padded, self.size - 1)
        gathered = torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
        for part in (padded, *found):
            part.zero_()  # copies of rows that may be forgotten
        return gathered, counts

    def exchange(self, x: Tensor, give: Sequence[int], take: Sequence[int]) -> Tensor:
        """Send rows that are sorted by rank, `give` to each rank; return the received rows, `take` from each rank."""
        if self.size == 1:
            return x
        found = x.new_empty(sum(take), *x.shape[1:])
        dist.all_to_all_single(found, x.contiguous(), list(take), list(give), group=self.group)
        away = sum(give) - give[self.rank]
        self.messages += sum(1 for rank, count in enumerate(give) if count and rank != self.rank)
        self.bytes += away * x[:1].numel() * x.element_size() if len(x) else 0
        return found

    def _count(self, x: Tensor, times: int) -> None:
        self.messages += times
        self.bytes += times * x.numel() * x.element_size()


class Route:
    """The route of rows to their ranks, and of answers back.

    Args:
        ranks: ranks of the group.
        to: `(n,)` int64, the rank of each row.
    """

    def __init__(self, ranks: Ranks, to: Tensor) -> None:
        self.ranks, self.order = ranks, to.argsort(stable=True)
        self.give = torch.bincount(to, minlength=ranks.size).tolist()
        ones = [1] * ranks.size
        self.take = ranks.exchange(torch.tensor(self.give), ones, ones).tolist()

    def there(self, x: Tensor) -> Tensor:
        """Return the rows `(n', ...)` that all ranks send to this rank, rows of rank 0 first; `x` is `(n, ...)`."""
        return self.ranks.exchange(x[self.order], self.give, self.take)

    def back(self, x: Tensor) -> Tensor:
        """Return answers `(n, ...)` to the sent rows, in their order; `x` is `(n', ...)`. Gradients flow back."""
        found: Tensor = _Exchange.apply(x, self.ranks, self.take, self.give)  # type: ignore[no-untyped-call, unused-ignore]
        return found[self.order.argsort()]

    def back_several(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return several answers to each row, in the order of rows, and the number of answers to each row.

        Args:
            x: answers to the received rows, in the order of these rows.
            counts: `(n',)` int64, number of answers to each received row.
        """
        give = [int(part.sum()) for part in counts.split(self.take)]
        mine = self.ranks.exchange(counts, self.take, self.give)
        take = [int(part.sum()) for part in mine.split(self.give)]
        found = self.ranks.exchange(x, give, take)
        place = self.order.argsort()
        starts = (mine.cumsum(0) - mine)[place]
        mine = mine[place]
        within = torch.arange(int(mine.sum())) - (mine.cumsum(0) - mine).repeat_interleave(mine)
        return found[starts.repeat_interleave(mine) + within], mine


class _Exchange(torch.autograd.Function):
    """Exchange of rows by `Ranks.exchange`, with gradients in the opposite direction."""

    @staticmethod
    def forward(ctx: object, x: Tensor, ranks: Ranks, give: list[int], take: list[int]) -> Tensor:
        ctx.way = ranks, give, take  # type: ignore[attr-defined]
        found = ranks.exchange(x, give, take)
        return found.view_as(found)  # with one rank `found` is `x` itself

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, give, take = ctx.way  # type: ignore[attr-defined]
        return ranks.exchange(grads[0], take, give), None, None, None


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # not in quotes


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)

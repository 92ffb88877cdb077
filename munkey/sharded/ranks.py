"""What the ranks of a process group tell one another, on PyTorch's own collectives.

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

#: An error is raised on every rank as the first of these that it is.
_KINDS = (KeyError, TypeError, ValueError, FileNotFoundError, FileExistsError, OSError)


class Ranks:
    """The ranks of a group, and how much this one has sent.

    Args:
        group: of `torch.distributed`; the default one if not given, or this process alone if there is none.

    Attributes:
        rank: of this process.
        size: `N`.
        messages: how many pieces of data this rank has sent to other ones.
        bytes: how many bytes they had.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if started else 0
        self.size = dist.get_world_size(group) if started else 1
        self.messages = self.bytes = 0

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is one and the same for all that speak in it

    # --- small things -------------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """What each rank has: anything that can be pickled."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        found, counts = self.gather_rows(data)
        return [pickle.loads(part.numpy().tobytes()) for part in found.split(counts)]

    def agree(self, act: Callable[[], T]) -> T:
        """What this rank makes, once all ranks have made theirs; an error of one is raised on all."""
        error, made = None, None
        try:
            made = act()
        except Exception as raised:
            error = raised
        self.fail(error, anywhere=self.size > 1 and self.any(error is not None))
        return made  # type: ignore[return-value]

    def fail(self, error: Exception | None, *, anywhere: bool) -> None:
        """Raise the error of this rank, or else, if there is one anywhere, that of the first rank that has one."""
        if anywhere:
            texts = self.gather(None if error is None else (_kind(error), _text(error)))
            if error is None:
                rank, (kind, text) = next((r, found) for r, found in enumerate(texts) if found is not None)
                raise kind(f"{text} (says rank {rank})")
        if error is not None:
            raise error

    def same(self, what: str, value: object) -> None:
        """Raise ValueError on all ranks, saying what each has, unless they have the same."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            each = ", ".join(f"rank {rank} has {other!r}" for rank, other in enumerate(found))
            raise ValueError(f"all ranks must have the same {what}: {each}")

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        return any(there for (there,) in self.numbers(here))

    def numbers(self, *numbers: int) -> list[list[int]]:
        """Whole numbers of each rank, as many of each."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        self._count(mine, self.size - 1)
        return [each.tolist() for each in found]

    # --- rows ---------------------------------------------------------------------------------------------

    def gather_rows(self, x: Tensor, counts: list[int] | None = None) -> tuple[Tensor, list[int]]:
        """`(n_0 + n_1 + ..., ...)` rows of all ranks, and how many each has, if that is not known already."""
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
        """Rows for each rank, one after the other; how many go to each, and how many come from each."""
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
    """The way of rows to the ranks they belong to, and of answers back.

    Args:
        ranks: of the group.
        to: `(n,)` int64, the rank of each row.
    """

    def __init__(self, ranks: Ranks, to: Tensor) -> None:
        self.ranks, self.order = ranks, to.argsort(stable=True)
        self.give = torch.bincount(to, minlength=ranks.size).tolist()
        ones = [1] * ranks.size
        self.take = ranks.exchange(torch.tensor(self.give), ones, ones).tolist()

    def there(self, x: Tensor) -> Tensor:
        """The rows `(n', ...)` that others send to this rank, those of rank 0 first; `x` is `(n, ...)`."""
        return self.ranks.exchange(x[self.order], self.give, self.take)

    def back(self, x: Tensor) -> Tensor:
        """Answers `(n, ...)` to the rows that were sent, in their order; `x` is `(n', ...)`. Gradients flow back."""
        found: Tensor = _Exchange.apply(x, self.ranks, self.take, self.give)  # type: ignore[no-untyped-call, unused-ignore]
        return found[self.order.argsort()]

    def back_several(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Several answers to each row, in the order of rows, and how many there are to each.

        Args:
            x: answers to the rows that came here, one row's after another's.
            counts: `(n',)` int64, how many there are to each of these.
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
    """`Ranks.exchange`, whose gradients go the other way."""

    @staticmethod
    def forward(ctx: object, x: Tensor, ranks: Ranks, give: list[int], take: list[int]) -> Tensor:
        ctx.way = ranks, give, take  # type: ignore[attr-defined]
        found = ranks.exchange(x, give, take)
        return found.view_as(found)  # with one rank they are the rows themselves

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, give, take = ctx.way  # type: ignore[attr-defined]
        return ranks.exchange(grads[0], take, give), None, None, None


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # not in quotes


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)

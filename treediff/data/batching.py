"""Index batches: the rows of one epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["batches"]


def batches(
    n: int,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Iterator[torch.Tensor]:
    """Row indices of one epoch: every row of `range(n)` once, `batch_size` at a time.

    Args:
        n: number of rows, at least 1.
        batch_size: rows per batch, at least 1; the last batch holds the rest.
        generator: source of the order. Without one each call draws a fresh order of its own: the global
            random state is neither read nor changed, so `torch.manual_seed` has no effect.
        shuffle: False gives the rows in ascending order.
        drop_last: leave out a last batch that is not full.

    Returns:
        An iterator over int64 CPU tensors `(batch_size,)`, which index tensors on any device.

    Raises:
        ValueError: `n` or `batch_size` is below 1, or `drop_last` leaves no batch.

    Examples:
        >>> [rows.tolist() for rows in batches(5, 2, shuffle=False)]
        [[0, 1], [2, 3], [4]]
        >>> images = torch.rand(5, 1, 8, 8)
        >>> [len(images[rows]) for rows in batches(5, 2, generator=torch.Generator().manual_seed(0))]
        [2, 2, 1]
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"expected n and batch_size of at least 1, found n={n}, batch_size={batch_size}")
    if drop_last and n < batch_size:
        raise ValueError(f"drop_last: expected a full batch of {batch_size}, found {n} rows; turn it off")
    if not shuffle:
        order = torch.arange(n)
    else:
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    return iter(torch.split(order[: n - n % batch_size if drop_last else n], batch_size))

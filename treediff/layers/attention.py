"""Multi-head attention between sets of tokens.

Letters: `B` batch, `S` query tokens, `T` key tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from treediff.core.checks import check_positive

__all__ = ["Attention"]


def check_dropout(dropout: float) -> float:
    """Return a dropout rate; raise unless it is at least 0, and below 1, since 1 would drop everything."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {dropout}")
    return dropout


class Attention(nn.Module):
    r"""Multi-head attention of every token to all tokens of its own set, or of another set.

    With `q = W_q x`, `k = W_k c`, `v = W_v c`, split into heads of `d = width / heads` dimensions,

        y = W_o [softmax(q k^T / sqrt(d)) v]

    where `c` is `x` itself (self-attention) or the context (cross-attention). There are no positions: the order of
    the key tokens does not matter.

    Args:
        width: dimensions per token of `x`, and of the result.
        context: dimensions per token of the context; None for self-attention.
        heads: number of heads; must divide the width.
        dropout: share of the attention weights that is dropped, in training only.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, S, width)`, and `(B, T, context)` for cross-attention, to `(B, S, width)`.

    Raises:
        ValueError: if a width is below 1, `heads` does not divide `width`, or `dropout` is not in [0, 1).
        TypeError: if a width is no whole number.

    Source: Vaswani et al. (arXiv 1706.03762), section 3.2.

    Examples:
        >>> Attention(8, heads=2)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> context, mask = torch.zeros(2, 3, 6), torch.tensor([[True, True, False], [False, False, False]])
        >>> Attention(8, context=6, heads=2)(torch.zeros(2, 5, 8), context, mask).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        width: int,
        context: int | None = None,
        heads: int = 4,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Any = {"device": device, "dtype": dtype}
        source = width if context is None else context
        check_positive(width=width, context=source, heads=heads)
        if width % heads:
            divisors = [n for n in range(1, width + 1) if width % n == 0]
            raise ValueError(f"heads must divide the width {width}, found {heads}; choose one of {divisors}")
        self.width, self.context, self.heads, self.dropout = width, context, heads, check_dropout(dropout)
        self.query = nn.Linear(width, width, **factory)
        self.key_value = nn.Linear(source, 2 * width, **factory)
        self.out = nn.Linear(width, width, **factory)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *, first: int | None = None
    ) -> Tensor:
        """Attend from the tokens of `x` to the key tokens.

        Args:
            x: `(B, S, width)` query tokens.
            context: `(B, T, context)` key tokens; None if the module was built for self-attention.
            mask: `(B, T)` booleans, True = may be attended to; None means that all tokens may be attended to. Where no
                token may be attended to, in a row of False or for `T = 0`, the result is the output projection of zero.
            first: compute the results of so many first tokens only; all if not given.

        Returns:
            `(B, S, width)`, or `(B, first, width)`.

        Raises:
            ValueError: if a shape does not fit, or the context is missing or superfluous.
            TypeError: if the mask is not boolean.
        """
        source = self._source(x, context)
        query = self._split(self.query(x[:, :first]))
        key, value = (self._split(part) for part in self.key_value(source).chunk(2, dim=-1))
        if mask is not None:
            _check_mask(mask, source)
            # Not every kernel avoids 0/0 in a row of False: open such a row, with values of zero.
            empty = ~mask.any(-1, keepdim=True)
            value = value.masked_fill(empty[:, :, None, None], 0)
            mask = (mask | empty)[:, None, None]
        dropout = self.dropout if self.training else 0.0
        read = _attend(query, key, value, mask, dropout)
        y: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return y

    def _split(self, tokens: Tensor) -> Tensor:
        """Return a view of `(B, S, width)` as `(B, heads, S, width / heads)`."""
        heads: Tensor = tokens.unflatten(-1, (self.heads, self.width // self.heads))
        return heads.transpose(1, 2)

    def _source(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the key tokens; raise unless all shapes fit."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"expected tokens of shape (B, S, {self.width}), found {tuple(x.shape)}")
        if self.context is None:
            if context is not None:
                raise ValueError("this attention was built for self-attention; build it with context= to read another")
            return x
        if context is None:
            raise ValueError(f"this attention reads a context of shape (B, T, {self.context}), found none")
        if context.ndim != 3 or len(context) != len(x) or context.shape[-1] != self.context:
            raise ValueError(f"expected a context of shape ({len(x)}, T, {self.context}), found {tuple(context.shape)}")
        return context

    def extra_repr(self) -> str:
        """Return the widths, for `print(attention)`."""
        return f"width={self.width}, context={self.context}, heads={self.heads}, dropout={self.dropout}"


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Compute `softmax(q k^T / sqrt(d)) v`, in the dtype of the query."""
    if query.device.type != "cpu" or query.dtype == torch.float64:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    # On a CPU the kernel for bfloat16 is slower than the kernel for float32, its backward pass many times.
    with torch.autocast("cpu", enabled=False):
        wide = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, dropout_p=dropout
        )
        return wide.to(query.dtype)


def _check_mask(mask: Tensor, source: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"expected a boolean mask, True = may be attended to, found {mask.dtype}; compare it with 0")
    if mask.shape != source.shape[:2]:
        raise ValueError(f"expected a mask of shape {tuple(source.shape[:2])}, found {tuple(mask.shape)}")

"""A small vision transformer in parts: tokens of an image or a vector, and pre-norm blocks.

LayerNorm only, so that rows of a batch do not affect each other and no running statistic keeps traces of an instance.

Letters: `B` batch, `C H W` image, `S` tokens, `W` width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from munkey.readout.tokens import Tokens
from treediff.core.checks import check_positive
from treediff.layers.attention import Attention

__all__ = ["ExemplarTransformer", "TransformerBlock"]


class TransformerBlock(nn.Module):
    """A block of a transformer: `x + Attention(norm(x))`, then `x + MLP(norm(x))`.

    Args:
        width: `W`.
        heads: of the attention.
        expansion: width of the hidden layer of the MLP, in units of `width`.
        dropout: share that is dropped of the results of attention and MLP, in training only.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        `(B, S, W)` to `(B, S, W)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1, or heads do not divide the width.

    Source: Xiong et al. (arXiv 2002.04745), pre-norm.

    Examples:
        >>> TransformerBlock(8, heads=2)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        expansion: int = 4,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(expansion=expansion)
        factory: Any = {"device": device, "dtype": dtype}
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.attention = Attention(width, heads=heads, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width, **factory), nn.GELU(), nn.Linear(expansion * width, width, **factory)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, first: int | None = None) -> Tensor:
        """Return the result of the block, of the shape of `x`; with `first`, of so many first tokens only.

        Tokens may be attended to where the mask `(B, S)` is True, or all if there is no mask.
        """
        x = x[:, :first] + self.dropout(self.attention(self.attention_norm(x), mask=mask, first=first))
        changed: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return changed


class ExemplarTransformer(nn.Module):
    """A transformer from an input and a value to logits: `head(norm(blocks([start, input tokens, exemplar])[0]))`.

    The exemplar token is a linear map of the value, whose bias is the type embedding. The network has no access to a
    memory, and each pair of input and value is processed independently. The paper (arXiv 2603.15033) appends an
    exemplar token; the map from value to token is our choice.

    Args:
        tokens: from inputs to tokens: `ImageTokens`, `VectorTokens`, or a module with the interface of `Tokens`.
        blocks: the transformer.
        value_width: `V`.
        outputs: `n`, dimensions of a prediction.

    Shapes:
        tokens `(B, S, W)` and values `(B, m, V)` or `(B, m, j, V)` to `(B, m, n)`.

    Raises:
        TypeError: if a number is not whole.
        ValueError: if a number is below 1.

    Examples:
        >>> from munkey.readout.tokens import ImageTokens
        >>> tokens = ImageTokens(size=8, channels=1, patch=2, width=16)
        >>> network = ExemplarTransformer(tokens=tokens, blocks=[TransformerBlock(16, 2)], value_width=4, outputs=3)
        >>> network(tokens(torch.rand(5, 1, 8, 8)), torch.randn(5, 2, 4)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        *,
        tokens: Tokens,
        blocks: Iterable[TransformerBlock],
        value_width: int,
        outputs: int,
    ) -> None:
        super().__init__()
        check_positive(value_width=value_width, outputs=outputs)
        self.tokens, self.blocks = tokens, nn.ModuleList(blocks)
        width = tokens.width
        weight = next(tokens.parameters(), torch.empty(0))
        factory: Any = {"device": weight.device, "dtype": weight.dtype}
        self.start = nn.Parameter(0.02 * torch.randn(width, **factory))
        self.null_input = nn.Parameter(0.02 * torch.randn(tokens.count, width, **factory))
        self.exemplar = nn.Linear(value_width, width, **factory)
        self.norm, self.head = nn.LayerNorm(width, **factory), nn.Linear(width, outputs, **factory)

    @property
    def value_width(self) -> int:
        """Dimensions of a value, `V`."""
        return self.exemplar.in_features

    @property
    def outputs(self) -> int:
        """Dimensions of a prediction, `n`."""
        return self.head.out_features

    def features(self, inputs: Tensor, values: Tensor, there: Tensor | None = None) -> Tensor:
        """Return the inputs of the head, `(B, m, W)`; arguments as for `forward`."""
        batch, many = values.shape[:2]
        exemplars = self.exemplar(values if values.ndim == 4 else values[:, :, None]).flatten(0, 1)
        rows = inputs.repeat_interleave(many, 0)
        x = torch.cat([self.start.expand(len(rows), 1, -1), rows, exemplars], 1)
        mask = None
        if there is not None:
            mask = torch.cat([there.new_ones(len(x), 1 + inputs.shape[1]), there.flatten(0, 1)], 1)
        for place, block in enumerate(self.blocks, 1):
            x = block(x, mask=mask, first=1 if place == len(self.blocks) else None)  # one token is read
        features: Tensor = self.norm(x[:, 0]).unflatten(0, (batch, many))
        return features

    def forward(self, inputs: Tensor, values: Tensor, there: Tensor | None = None) -> Tensor:
        """Return logits `(B, m, n)` for input tokens `(B, S, W)` beside values `(B, m, V)`, each value separately.

        Values `(B, m, j, V)` are read `j` at a time: the attention decides how much each of these counts. Where `there`
        `(B, m, j)` is False, a value is not read.
        """
        logits: Tensor = self.head(self.features(inputs, values, there))
        return logits

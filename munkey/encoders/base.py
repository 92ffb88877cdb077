"""What a key is: a frozen function of the input.

A key must not change after it is stored, so an encoder is never trained together with the memory, and stays in eval
mode. Whether a model can forget exactly depends on what its encoder was fitted to, so every encoder says so.

Letters: `B` batch, `D` width of a key.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from munkey.encoders._full_batches import FullBatches
from munkey.encoders._unwritten import Unwritten
from munkey.store.digest import add_tensors
from treediff.core.checks import check_positive
from treediff.core.io import load_into, read_header, save_model

__all__ = ["FITTED_ON", "KeyEncoder", "check_encoder"]

#: What an encoder may have been fitted to. With 'forgettable', instances that may be forgotten were among it, and no
#: model with its keys can forget exactly.
FITTED_ON = ("nothing", "other data", "permanent split", "forgettable")
_ROWS = 256  # at a time


class KeyEncoder(nn.Module, ABC):
    """From inputs to keys, without gradients; subclasses say how in `encode`.

    Args:
        width: `D`.
        fitted_on: one of `FITTED_ON`.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if it is below 1, or `fitted_on` is another word.

    Attributes:
        config: what the class was made with besides its weights, as plain JSON.
        in_file: whether the file of a model holds the weights of its encoder.
        row_wise: whether `encode` takes any numbers from 0 to 1 and treats rows on their own: no operation mixes rows,
            or looks at all of them to decide something. If so, keys are made in full batches where a trial shows that
            this changes no bit, and else one at a time. It can be set to False for one encoder, before its first key:
            with keys that come singly that is faster.
    """

    in_file: ClassVar[bool] = True
    row_wise: bool = False

    def __init__(self, width: int, fitted_on: str) -> None:
        super().__init__()
        check_positive(key_width=width)
        if fitted_on not in FITTED_ON:
            raise ValueError(f"fitted_on must be one of {', '.join(FITTED_ON)}; found {fitted_on!r}")
        self.width, self.fitted_on = width, fitted_on
        self.config: dict[str, Any] = {"width": width, "fitted_on": fitted_on}
        self._unwritten, self._full = Unwritten(), FullBatches(width)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """`(B, D)` keys of a batch."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """`(B, D)` keys to look up with.

        Raises:
            ValueError: if `encode` gives another shape, or a key that is not finite, or changes a tensor of
                the encoder.
        """
        return self._encoded(x, ((slice(i, i + _ROWS), x[i : i + _ROWS]) for i in range(0, len(x), _ROWS)))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """`(B, D)` keys to store, each a function of its own input, to the bit; errors as for `forward`.

        A product of matrices may round a row otherwise in another place of the batch, or in a batch of another size, so
        that a stored key would tell what it was stored with. Here each input is encoded on its own; or, if the encoder
        is `row_wise`, in batches that are always full, once a trial has shown that neither the place of a row nor the
        other rows change a bit. See `munkey.encoders._full_batches`.

        The bits are those of one machine, device and number of threads; elsewhere keys differ by rounding.
        """
        if self.row_wise:
            return self._encoded(x, self._full.parts(self._batch, x, self.state_dict().values()))
        return self._encoded(x, ((slice(i, i + 1), x[i : i + 1]) for i in range(len(x))))

    def _encoded(self, x: Tensor, parts: Iterator[tuple[slice, Tensor]]) -> Tensor:
        """Keys of all rows: of each part those that its slice counts; what follows them in a batch fills it up."""
        keys = x.new_zeros(len(x), self.width, dtype=self._dtype(x))
        super().train(False)  # whatever was said to a part of it
        # In the precision of the weights, whatever autocast says: a key is the same wherever it is asked for.
        with self._unwritten.watch(self), torch.autocast(x.device.type, enabled=False):
            for rows, part in parts:
                found = self._batch(part)
                keys[rows] = found[: len(keys[rows])]
                found.zero_()  # a copy of rows that may be forgotten later
        if not keys.isfinite().all():
            raise ValueError(
                "the encoder gave a key that is not finite; look at its weights, and at the range of inputs"
            )
        return keys

    def _dtype(self, x: Tensor) -> torch.dtype:
        return next((t.dtype for t in self.state_dict().values() if t.is_floating_point()), x.dtype)

    def _batch(self, x: Tensor) -> Tensor:
        # Laid out in one way, which decides how a convolution rounds.
        x = x.to(self._dtype(x)) if x.is_floating_point() else x  # ids of tokens stay whole
        found = self.encode(x.clone(memory_format=torch.contiguous_format))
        if found.shape != (len(x), self.width):
            raise ValueError(
                f"expected keys of shape {(len(x), self.width)} from the encoder, found {tuple(found.shape)}"
            )
        return found

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: keys must not depend on when they are made."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of class, settings and weights; keys of another encoder do not belong to it."""
        return self.fingerprint_as(type(self).__name__, self.config)

    def fingerprint_as(self, name: str, config: dict[str, Any]) -> str:
        """Return the fingerprint that an encoder of another class and settings has with these weights."""
        own = name == type(self).__name__
        tensors = self.state_dict() if own else {key.removeprefix("module."): x for key, x in self.state_dict().items()}
        digest = hashlib.sha256(json.dumps([name, config], sort_keys=True).encode())
        add_tensors(digest.update, tensors)
        return digest.hexdigest()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """An encoder of these settings, whose weights are to be loaded."""
        return cls(**config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder to a file of its own."""
        save_model(self, path, {"config": self.config})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds something else.
        """
        encoder = cls.from_config(read_header(path, cls.__name__)["config"])
        load_into(encoder, path)
        return encoder


def check_encoder(encoder: object) -> None:
    """Raise TypeError unless something is a key encoder."""
    if not isinstance(encoder, KeyEncoder):
        raise TypeError(
            f"key_encoder must be a KeyEncoder, found {type(encoder).__name__}; for any module use "
            "ModuleEncoder(module, width=..., fitted_on='other data')"
        )

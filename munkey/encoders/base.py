"""Key encoders: a key is a frozen function of the input.

A key must not change after it is stored, so an encoder is never trained together with the memory, and stays in eval
mode. Whether a model can forget exactly depends on the data of its encoder, so every encoder declares this data.

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
from treediff.core.checks import check_positive
from treediff.core.io import add_tensors, load_into, read_header, save_model

__all__ = ["FITTED_ON", "KeyEncoder", "check_encoder", "check_fitted_on"]

#: Data that an encoder may have been fitted to. With 'forgettable', this data has instances that may be forgotten, and
#: no model with keys of the encoder can forget exactly.
FITTED_ON = ("nothing", "other data", "permanent split", "forgettable")
_ROWS = 256  # in one pass


class KeyEncoder(nn.Module, ABC):
    """A map from inputs to keys, without gradients; subclasses define the map in `encode`.

    Args:
        width: `D`.
        fitted_on: one of `FITTED_ON`.

    Raises:
        TypeError: if the width is not whole.
        ValueError: if the width is below 1, or `fitted_on` is another word.

    Attributes:
        config: arguments of the class besides its weights, as plain JSON.
        in_file: whether the file of a model holds the weights of its encoder.
        row_wise: whether `encode` takes any numbers from 0 to 1 and processes rows independently: no operation mixes
            rows, or compares all rows. If True, keys are computed in full batches where a trial shows that this changes
            no bit, and otherwise one at a time. Set it to False for one encoder, before its first key, if keys are
            computed one at a time anyway; this is faster.
    """

    in_file: ClassVar[bool] = True
    row_wise: bool = False

    def __init__(self, width: int, fitted_on: str) -> None:
        super().__init__()
        check_positive(key_width=width)
        self.width, self.fitted_on = width, check_fitted_on(fitted_on)
        self.config: dict[str, Any] = {"width": width, "fitted_on": fitted_on}
        self._unwritten, self._full = Unwritten(), FullBatches(width)

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs, as far as the class knows its inputs."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Return the keys `(B, D)` of a batch."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return keys `(B, D)` for queries.

        Raises:
            ValueError: if `encode` returns another shape, or a key that is not finite, or changes a tensor of the
                encoder.
        """
        return self._encoded(x, ((slice(i, i + _ROWS), x[i : i + _ROWS]) for i in range(0, len(x), _ROWS)))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Return keys `(B, D)` to store, each a function of its own input, to the bit; errors as for `forward`.

        A matrix product may round a row differently in another place of the batch, or in a batch of another size. A
        stored key would then reveal its batch. Here each input is encoded separately. If the encoder is `row_wise`,
        inputs are encoded in batches that are always full. A trial has shown before that neither the place of a row nor
        the other rows change a bit. See `munkey.encoders._full_batches`.

        The bits hold for one machine, device and number of threads; elsewhere keys differ by rounding.
        """
        if self.row_wise:
            return self._encoded(x, self._full.parts(self._batch, x, self.state_dict().values()))
        return self._encoded(x, ((slice(i, i + 1), x[i : i + 1]) for i in range(len(x))))

    def _encoded(self, x: Tensor, parts: Iterator[tuple[slice, Tensor]]) -> Tensor:
        """Return the keys of all rows; a part may have more rows than its slice, which only fill the batch."""
        keys = x.new_zeros(len(x), self.width, dtype=self._dtype(x))
        super().train(False)  # a part of it may be in training mode
        # In the precision of the weights, without autocast: a key must be the same wherever it is computed.
        with self._unwritten.watch(self), torch.autocast(x.device.type, enabled=False):
            for rows, part in parts:
                found = self._batch(part)
                keys[rows] = found[: len(keys[rows])]
                found.zero_()  # a copy of rows that may be forgotten later
        if not keys.isfinite().all():
            raise ValueError("the encoder gave a key that is not finite; check its weights, and the range of inputs")
        return keys

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the keys; None for that of the inputs, if the encoder has no weights."""
        return next((t.dtype for t in self.state_dict().values() if t.is_floating_point()), None)

    def _dtype(self, x: Tensor) -> torch.dtype:
        return self.dtype or x.dtype

    def _batch(self, x: Tensor) -> Tensor:
        # Always in the same memory layout, which decides how a convolution rounds.
        x = x.to(self._dtype(x)) if x.is_floating_point() else x  # ids of tokens stay integers
        found = self.encode(x.clone(memory_format=torch.contiguous_format))
        if found.shape != (len(x), self.width):
            raise ValueError(
                f"expected keys of shape {(len(x), self.width)} from the encoder, found {tuple(found.shape)}"
            )
        return found

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: keys must not depend on the time at which they are computed."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of class, settings and weights, which identifies the encoder of keys."""
        return self.fingerprint_as(type(self).__name__, self.config)

    def fingerprint_as(self, name: str, config: dict[str, Any]) -> str:
        """Return the fingerprint of an encoder of another class and settings with these weights."""
        own = name == type(self).__name__
        tensors = self.state_dict() if own else {key.removeprefix("module."): x for key, x in self.state_dict().items()}
        digest = hashlib.sha256(json.dumps([name, config], sort_keys=True).encode())
        add_tensors(digest.update, tensors)
        return digest.hexdigest()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an encoder from settings; its weights are loaded afterwards."""
        return cls(**config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the encoder to a separate file."""
        save_model(self, path, {"config": self.config})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read an encoder from a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, or holds something else.
        """
        encoder = cls.from_config(read_header(path, cls.__name__)["config"])
        load_into(encoder, path)
        return encoder


def check_fitted_on(fitted_on: str) -> str:
    """Return the kind of data; raise ValueError unless it is one of `FITTED_ON`."""
    if fitted_on not in FITTED_ON:
        raise ValueError(f"fitted_on must be one of {', '.join(FITTED_ON)}; found {fitted_on!r}")
    return fitted_on


def check_encoder(encoder: object) -> None:
    """Raise TypeError unless `encoder` is a key encoder."""
    if not isinstance(encoder, KeyEncoder):
        raise TypeError(
            f"key_encoder must be a KeyEncoder, found {type(encoder).__name__}; for any module use "
            "ModuleEncoder(module, width=..., fitted_on='other data')"
        )

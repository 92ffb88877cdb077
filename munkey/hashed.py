"""A table that knows the digest of its content, and keeps it up as rows come and go."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from munkey.digest import MODULUS, keyed_hash, rows_hash
from munkey.rows import Removal
from munkey.table import RowTable

__all__ = ["HashedTable"]


class HashedTable(RowTable):
    """A `RowTable` with a digest, see `munkey.digest`.

    Args:
        key_width: see `RowTable`.
        value_width: see `RowTable`.
        secret: 1 to 64 bytes under which digests are taken; drawn from the system if not given.
        device: where the table lives.
        dtype: of keys and values.

    Raises:
        TypeError: if a width is not whole.
        ValueError: if a width is below 1, or the secret is empty or too long.
    """

    def __init__(
        self,
        key_width: int,
        value_width: int,
        *,
        secret: bytes | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(key_width, value_width, device=device, dtype=dtype)
        self._sum: int | None = 0
        self._version = self.values._version
        self._secret = secrets.token_bytes(32) if secret is None else self._checked(secret)

    @property
    def secret(self) -> bytes:
        """1 to 64 bytes under which digests are taken; with another secret they are other ones."""
        return self._secret

    @secret.setter
    def secret(self, secret: bytes) -> None:
        self._secret, self._sum = self._checked(secret), None

    def _checked(self, secret: bytes) -> bytes:
        """Raise ValueError if it cannot be the secret."""
        if not 1 <= len(secret) <= 64:
            raise ValueError(f"a secret has 1 to 64 bytes, found {len(secret)}")
        return secret

    def digest(self) -> str:
        """A hexadecimal digest of the content, the same for the same rows in any order.

        After values were trained it is computed anew, which takes a time that grows with the table; otherwise it
        follows what is added and erased. Changes of `values.data`, which PyTorch does not count, are not seen until
        `compact`, training, or a save to a folder.
        """
        return self.digest_of(self.used, self.total())

    def digest_of(self, rows: int, total: int) -> str:
        """That of so many rows whose hashes add up to `total`."""
        about = {name: str(column.dtype) for name, column in (("keys", self.keys), ("values", self.values))}
        text = json.dumps({**about, "widths": self.widths, "rows": rows}, sort_keys=True)
        return keyed_hash(self.secret, text.encode() + total.to_bytes(32, "little")).hex()

    def total(self) -> int:
        """The sum of the hashes of all rows."""
        if self._sum is None or self._version != self.values._version:
            return self.keep_total(rows_hash(self.secret, [column[: self.used] for column in self.columns]))
        return self._sum

    def total_after(self, removal: Removal) -> int:
        """What it will be once rows are gone."""
        return (self.total() - rows_hash(self.secret, self.columns, removal.gone)) % MODULUS

    def keep_total(self, total: int) -> int:
        """A sum that holds for as long as nobody else changes values."""
        self._sum, self._version = total % MODULUS, self.values._version
        return self._sum

    def forget_total(self) -> None:
        """Trust no sum: values may have changed."""
        self._sum = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._sum = None  # a copy of a parameter counts its changes from 0

    def append(self, *columns: Tensor) -> Tensor:  # noqa: D102
        total = self.total()
        rows = super().append(*columns)
        self.keep_total(total + rows_hash(self.secret, self.columns, rows))
        return rows

    def compact(self) -> None:  # noqa: D102
        super().compact()
        self._sum = None

    def _take(self, found: dict[str, Tensor]) -> None:  # type: ignore[override]
        self._sum = None
        super()._take(found)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._sum = None  # of other bytes
        return super()._apply(fn, recurse)

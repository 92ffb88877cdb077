"""Digest of a set of rows, which follows changes and does not depend on the order of rows.

`digest = H_s(header, sum over rows of H_s(row) mod 2^256)` with a keyed hash `H_s` under the secret `s` of a store.
This is MSet-Add-Hash (Clarke et al., ASIACRYPT 2003). Removing a row subtracts its hash, at a cost that is independent
of the remaining rows. The hash of each row, 32 bytes, is kept beside the table, so that a row is hashed once.

Without the secret a digest reveals nothing about a candidate image. A plain hash would let anyone with a candidate
image test whether the image is stored. The digest guards against errors and outsiders, not against holders of the
secret.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from munkey.store.change import Added, Change, Moved, Removed, Step, long_lived
from munkey.store.erase import Scratch
from munkey.store.follower import Follower, Undone
from munkey.store.table import Table

__all__ = ["HASH", "MODULUS", "Digest", "check_secret", "checksum", "hash_rows", "keyed_hash", "sum_of"]

#: Modulus of the sums of hashes.
MODULUS = 1 << 256

HASH = 32  # bytes of the hash of a row
_ROWS = 4096  # at a time: enough to be fast, and little to wipe


def keyed_hash(secret: bytes, *parts: bytes | memoryview) -> bytes:
    """Return the hash BLAKE2b (RFC 7693), 32 bytes, of concatenated parts, keyed with a secret of 1 to 64 bytes."""
    found = hashlib.blake2b(key=secret, digest_size=32)
    for part in parts:
        found.update(part)
    return found.digest()


def checksum(data: bytes) -> bytes:
    """Return a checksum of 32 hexadecimal digits, which shows damage; anyone can compute the checksum."""
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def check_secret(secret: bytes) -> bytes:
    """Return the secret unchanged.

    Raises:
        ValueError: if its length is not 1 to 64 bytes.
    """
    if not 1 <= len(secret) <= 64:
        raise ValueError(f"a secret has 1 to 64 bytes, found {len(secret)}")
    return secret


def hash_rows(secret: bytes, columns: Sequence[Tensor], rows: Tensor | slice | None = None) -> Tensor:
    """Return the hashes of rows, `(n, 32)` uint8.

    Args:
        secret: secret of the store.
        columns: tensors whose first dimension counts rows; a row is the concatenated bytes of all columns.
        rows: numbers of the rows; all rows if not given.
    """
    keyed, found = hashlib.blake2b(key=secret, digest_size=HASH), []
    for chunk in _chunks(columns, rows):
        view = chunk.numpy().data.cast("B")
        width = chunk.shape[1]
        for start in range(0, len(view), width):
            row = keyed.copy()  # the key is hashed once
            row.update(view[start : start + width])
            found.append(row.digest())
        chunk.zero_()  # a copy of rows that may be forgotten
    data = bytearray(b"".join(found)) or bytearray(HASH)  # PyTorch takes no empty buffer
    return torch.frombuffer(data, dtype=torch.uint8).view(-1, HASH)[: len(found)]


def sum_of(hashes: Tensor) -> int:
    """Return the sum of hashes `(n, 32)`, little-endian numbers of 256 bits; `0 <= sum < MODULUS`.

    Examples:
        >>> sum_of(torch.tensor([[1] + [0] * 31, [0, 2] + [0] * 30], dtype=torch.uint8))
        513
    """
    words = hashes.contiguous().numpy().view("<u4").sum(0, dtype=np.uint64)
    return sum(int(word) << 32 * place for place, word in enumerate(words)) % MODULUS


def _chunks(columns: Sequence[Tensor], rows: Tensor | slice | None) -> Iterator[Tensor]:
    """Yield copies of the bytes of rows in chunks, `(n, bytes)` uint8."""
    first, stop = 0, len(columns[0]) if rows is None else len(rows) if isinstance(rows, Tensor) else rows.stop
    if isinstance(rows, slice):
        first = rows.start
    for start in range(first, stop, _ROWS):
        part = slice(start, min(stop, start + _ROWS))
        with Scratch() as scratch:
            pieces = []
            for column in columns:
                piece = column.detach()[part] if not isinstance(rows, Tensor) else scratch(column.detach()[rows[part]])
                pieces.append(piece.reshape(len(piece), -1).contiguous().view(torch.uint8).cpu())
            chunk = torch.cat(pieces, 1)
        yield chunk


class Digest(Follower):
    """Digest of a table, updated as rows are added and removed.

    The hash of each row is kept. Hashes are computed when a digest is first taken, and again after values were trained.
    A change that adds no more rows than the table has hashes the new rows at once.

    Args:
        table: table of the rows.
        secret: 1 to 64 bytes under which rows are hashed.

    Raises:
        ValueError: if the secret is empty or too long.

    Attributes:
        eager: whether any number of added rows is hashed at once, because another follower needs the hashes.
    """

    def __init__(self, table: Table, secret: bytes) -> None:
        self._table, self._secret = table, check_secret(secret)
        self._hashes: Tensor | None = None
        self._sum, self._version = 0, -1
        self._new: tuple[Added, Tensor] | None = None
        self._gone: tuple[Tensor, int] | None = None
        self.eager = False

    @property
    def secret(self) -> bytes:
        """Secret of 1 to 64 bytes under which rows are hashed; another secret gives other digests."""
        return self._secret

    @secret.setter
    def secret(self, secret: bytes) -> None:
        self._secret = check_secret(secret)
        self.clear()

    def clear(self) -> None:
        """Drop all hashes: values may have changed."""
        self._hashes = None

    @property
    def known(self) -> bool:
        """True if the hashes match the present rows."""
        return self._hashes is not None and self._version == self._table.values._version

    def hashes(self) -> Tensor:
        """Return the hashes `(M, 32)` of all rows; unknown hashes are computed."""
        if not self.known:
            self.take(hash_rows(self._secret, self._table.columns, slice(0, self._table.used)))
        return self._rows(self._table.used)

    def _rows(self, stop: int) -> Tensor:
        hashes: Tensor = self._hashes  # type: ignore[assignment]
        return hashes[:stop]

    def take(self, hashes: Tensor) -> None:
        """Use precomputed hashes `(M, 32)` of all rows, such as from a file."""
        with long_lived():
            room = torch.zeros(self._table.room, HASH, dtype=torch.uint8)
            room[: len(hashes)] = hashes
            self._hashes, self._sum, self._version = room, sum_of(hashes), self._table.values._version

    def total(self) -> int:
        """Return the sum of the hashes of all rows."""
        self.hashes()
        return self._sum

    def total_after(self, change: Removed) -> int:
        """Return the sum after a removal; the sum is computed once for a change."""
        if self._gone is None or self._gone[0] is not change.gone or not self.known:
            gone = self.hashes().index_select(0, change.gone.cpu())
            self._gone = change.gone, (self.total() - sum_of(gone)) % MODULUS
        return self._gone[1]

    def total_with(self, change: Added) -> int:
        """Return the sum after an addition."""
        return (self.total() + sum_of(self.of_new(change))) % MODULUS

    def of_new(self, change: Added) -> Tensor:
        """Return the hashes of staged rows; the hashes are computed once for a change."""
        if self._new is None or self._new[0] is not change:
            self._new = change, hash_rows(self._secret, self._table.columns, change.rows)
        return self._new[1]

    def hexdigest(self, rows: int | None = None, total: int | None = None) -> str:
        """Return the digest of the table, or of `rows` rows whose hashes sum to `total`."""
        rows, total = (self._table.used, self.total()) if rows is None or total is None else (rows, total)
        keys, values = self._table["keys"], self._table["values"]
        about = {"keys": str(keys.dtype), "values": str(values.dtype), "widths": (keys.shape[1], values.shape[1])}
        text = json.dumps({**about, "rows": rows}, sort_keys=True)
        return keyed_hash(self._secret, text.encode() + total.to_bytes(HASH, "little")).hex()

    # --- changes ------------------------------------------------------------------------------------------

    def kept(self) -> list[Tensor]:
        """Return the hashes, if there are any."""
        return [] if self._hashes is None else [self._hashes]

    def steps(self, change: Change, scratch: Scratch) -> list[Step]:
        """Return the step that updates the hashes if they are known, and drops them otherwise."""
        if not self._table.used:
            self.take(torch.zeros(0, HASH, dtype=torch.uint8))
        if not self.known or not isinstance(change, Added | Removed | Moved):
            return [self.clear]
        if isinstance(change, Added) and not self.eager and change.stop - change.start > change.start:
            return [self.clear]
        hashes, total = self._rows(len(self._hashes)), self._sum  # type: ignore[arg-type]
        if isinstance(change, Removed):
            total = self.total_after(change)
            act = change.erase(hashes, scratch)
        elif isinstance(change, Moved):
            hashes, act = change.made(hashes), lambda: None
        else:
            new = self.of_new(change)
            total = (total + sum_of(new)) % MODULUS
            act = lambda: hashes[change.rows].copy_(new)  # noqa: E731

        def follow() -> None:
            act()
            self._new = self._gone = None
            self._hashes, self._sum, self._version = hashes, total, self._table.values._version

        return [follow]

    def undo(self, change: Change) -> Undone:
        """Drop the hashes of staged rows."""
        self._new = None
        return Undone.BACK

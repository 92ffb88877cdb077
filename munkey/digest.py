"""A digest of a set of rows that follows changes, and does not depend on their order.

`digest = H_s(header, sum over rows of H_s(row) mod 2^256)` with a keyed hash `H_s` under the secret `s` of a store
(MSet-Add-Hash, Clarke et al., ASIACRYPT 2003). Removing a row subtracts its hash, at a cost that has nothing to do with
the rows that stay. Without the secret a digest says nothing about a candidate image; a plain hash would let anyone who
has one find out whether it is stored. It guards against error and against outsiders, not against whoever holds the
secret.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["MODULUS", "add_tensors", "checksum", "keyed_hash", "rows_hash"]

#: Sums of hashes are taken modulo this.
MODULUS = 1 << 256

_ROWS = 4096  # at a time: enough to be fast, and little to wipe


def keyed_hash(secret: bytes, *parts: bytes | memoryview) -> bytes:
    """32 bytes: BLAKE2b (RFC 7693) of parts, one after the other, keyed with a secret of 1 to 64 bytes."""
    found = hashlib.blake2b(key=secret, digest_size=32)
    for part in parts:
        found.update(part)
    return found.digest()


def add_tensors(update: Callable[[bytes | memoryview], object], tensors: Mapping[str, Tensor]) -> None:
    """Give tensors to the `update` of a hash, by name, with dtype and shape, whatever their order."""
    for name, tensor in sorted(tensors.items()):
        update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def checksum(data: bytes) -> bytes:
    """32 hexadecimal digits that show damage; anyone can compute them."""
    return hashlib.blake2b(data, digest_size=16).hexdigest().encode()


def rows_hash(secret: bytes, columns: Sequence[Tensor], rows: Tensor | None = None) -> int:
    """The sum of the hashes of rows, `0 <= sum < MODULUS`.

    Args:
        secret: of the store.
        columns: tensors whose first dimension counts rows; a row is the bytes of all of them, one after the other.
        rows: numbers of the rows that count; all if not given.
    """
    total, keyed = 0, hashlib.blake2b(key=secret, digest_size=32)
    for chunk in _chunks(columns, rows):
        view = chunk.numpy().data.cast("B")
        width = chunk.shape[1]
        for start in range(0, len(view), width):
            found = keyed.copy()  # the key is taken in once
            found.update(view[start : start + width])
            total += int.from_bytes(found.digest(), "little")
        chunk.zero_()  # a copy of rows that may be forgotten
    return total % MODULUS


def _chunks(columns: Sequence[Tensor], rows: Tensor | None) -> Iterator[Tensor]:
    """`(n, bytes)` uint8 copies of some rows at a time."""
    count = len(columns[0]) if rows is None else len(rows)
    for start in range(0, count, _ROWS):
        part = slice(start, start + _ROWS)
        pieces = []
        for column in columns:
            piece = column.detach()[part] if rows is None else column.detach()[rows[part]]
            pieces.append(piece.reshape(len(piece), -1).contiguous().view(torch.uint8).cpu())
        yield torch.cat(pieces, 1)
        if rows is not None:
            for piece in pieces:
                piece.zero_()

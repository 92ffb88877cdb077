"""Log of receipts, which is checked without the data and keeps a backup from bringing forgotten instances back.

Each line is one event and a chain value,

    chain_n = H(chain_{n-1}, event_n),    seal_n = H_s(chain_n)

with a hash `H` that anyone can compute, and a hash `H_s` keyed by the store's secret `s`. So everyone can detect a line
that was changed, inserted or removed in the middle. Holders of the secret can also detect a log that was written
without the secret. A chain cannot show that lines are missing at its end, nor that the whole log was written again.
Against both, publish the last value, `head`, now and then, and compare.

Forgotten rows are named by *tokens*, keyed hashes of id, label and key. Without the secret, tokens reveal nothing about
a candidate image. A row with another label has another token, so that a backup does not bring the old label back. There
are three kinds of events:

- 'forgot': rows are deleted. This event is written before the deletion.
- 'returning': the same rows are about to be added again, after which the store has the digest `after`.
- 'returned': the rows are in the store again. If the process dies after 'returning' and before 'returned', the digest
  of the store decides when the log is next opened. With the digest `after` the rows have returned; with any other
  digest the rows stay deleted.

The last event that names a token counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from munkey.store.change import Added, Change, Removed
from munkey.store.checks import some
from munkey.store.digest import Digest, keyed_hash
from munkey.store.erase import Scratch
from munkey.store.file.disk import Disk, Owner
from munkey.store.follower import Follower, Undone
from munkey.store.receipts import Receipt
from munkey.store.schema import Rows
from munkey.store.table import Table
from treediff.core.io import dtype_name

__all__ = ["LoggedRows", "Mark", "ReceiptLog", "Verified", "known_to", "row_tokens", "tokens_of", "verify"]

Path = str | os.PathLike[str]

_ROWS = 4096  # at a time
_BEGINNING = b'{"chain":"' + b"#" * 64 + b'","event":{'  # of each line, with any digit for #
#: Possible content of a line in a sector of a disk after an interruption: text, or zeros if nothing was written yet.
_PART = re.compile(rb"[\x20-\x7e]*|\x00*")
_SECTOR = 512


def tokens_of(secret: bytes, ids: Tensor, labels: Tensor, keys: Tensor) -> list[str]:
    """Return keyed hashes of rows, by id, label and key.

    Keys in a wider dtype give the same hashes, and so do labels of another shape with the same numbers.
    """
    tokens = []
    for own, named, rows in zip(ids.split(_ROWS), labels.split(_ROWS), keys.detach().split(_ROWS), strict=True):
        with Scratch() as scratch:
            content = scratch(rows.cpu().to(torch.float64, copy=True)).view(torch.uint8).numpy()
            owners, labelled = own.cpu()[:, None].view(torch.uint8).numpy(), _label_bytes(named.cpu())
            rows_of = zip(owners, labelled, content, strict=True)
            tokens += [keyed_hash(secret, b"token", n.data, label, k.data).hex() for n, label, k in rows_of]
    return tokens


def _label_bytes(labels: Tensor) -> list[bytes]:
    """Return the bytes of each label as int64 or float64; the bytes of a missing label are always -1 as int64."""
    floating = labels.is_floating_point()
    flat = labels.reshape(len(labels), math.prod(labels.shape[1:])).to(torch.float64 if floating else torch.int64)
    missing = (flat.isnan() if floating else flat < 0).all(1).tolist()
    none = (-1).to_bytes(8, sys.byteorder, signed=True)
    rows = flat.contiguous().numpy()
    return [none if gone else row.tobytes() for gone, row in zip(missing, rows, strict=True)]


def row_tokens(table: Table, secret: bytes, rows: Tensor | slice) -> list[str]:
    """Return the tokens of rows of a table."""
    ids, labels, keys = (table[name][rows] for name in ("ids", "labels", "keys"))
    with Scratch() as scratch:
        if not isinstance(rows, slice):
            scratch(keys)  # a copy of rows that may be about to be deleted
        return tokens_of(secret, ids, labels, keys)


def known_to(gone: set[str], dtypes: Mapping[str, set[int]], secret: bytes, rows: Rows) -> list[int]:
    """Return the ids of rows that a log lists as forgotten, in ascending order.

    Args:
        gone: tokens of deleted rows.
        dtypes: forgotten ids by the dtype of their keys at that time; '' if an older log does not record the dtype.
        secret: secret of the store.
        rows: rows of the store.

    Raises:
        ValueError: if forgotten ids are in the store with keys of another dtype. Rounding changes keys, so that
            forgotten keys cannot be recognised.
    """
    if not gone:
        return []
    ids, tokens = rows.ids.tolist(), tokens_of(secret, rows.ids, rows.labels, rows.keys)
    known = {owner for owner, token in zip(ids, tokens, strict=True) if token in gone}
    own, half = dtype_name(rows.keys.dtype), rows.keys.dtype in (torch.float16, torch.bfloat16)
    for dtype, forgotten in dtypes.items():
        doubtful = sorted(forgotten.intersection(ids) - known)
        if doubtful and (dtype not in ("", own) or (dtype == "" and half and not known)):
            raise ValueError(
                f"the log says that ids {some(doubtful)} were forgotten when keys were {dtype or 'of another dtype'}, "
                f"and here keys are {own}: rounded keys cannot be recognised. Keep the log in a store with the dtype "
                "it was written with, and convert the store afterwards"
            )
    return sorted(known)


@dataclass(frozen=True)
class Verified:
    """The content of a log of which no line was changed.

    Args:
        events: events in the order of the log.
        head: the last chain value, to compare with a published value.
        whole: number of bytes of whole lines; the rest of the file was interrupted while it was written.
    """

    events: tuple[dict[str, Any], ...]
    head: str
    whole: int

    def gone(self) -> tuple[set[str], dict[str, set[int]]]:
        """Return the tokens of deleted rows, and all ids that were ever forgotten, by the dtype of their keys."""
        gone: set[str] = set()
        dtypes: dict[str, set[int]] = {}
        for event in self.events:
            _count(event, gone, dtypes)
        return gone, dtypes

    @property
    def receipts(self) -> list[Receipt]:
        """Receipts of all events, in the order of the log."""
        return [Receipt.from_json(json.dumps(event["receipt"])) for event in self.events if "receipt" in event]


def verify(path: Path, *, secret: bytes | None = None, disk: Disk | None = None) -> Verified:
    """Check a log without the data; only the seals need the secret.

    Args:
        path: path of the log.
        secret: secret of the store; if given, seals are checked, too.
        disk: `Disk` that reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the first line that differs from what was written.
    """
    disk, name = disk or Disk(), os.fspath(path)
    if not disk.exists(name):
        raise FileNotFoundError(f"no log at {name!r}")
    file = disk.open_to_read(name)
    try:
        return _verified(disk.read(file, 0, disk.size(file)), name, secret)
    finally:
        disk.close(file)


def _verified(data: bytes, name: str, secret: bytes | None) -> Verified:
    *lines, rest = data.split(b"\n")
    events, chain = [], ""
    for number, line in enumerate(lines, 1):
        event, chain = _entry(line, chain, f"line {number} of {name!r}", secret)
        events.append(event)
    if not _interrupted(rest, chain, len(data) - len(rest)):
        raise ValueError(
            f"line {len(lines) + 1} of {name!r} is no entry of a log; restore the log from a backup, or name another "
            "file"
        )
    return Verified(tuple(events), chain, len(data) - len(rest))


def _entry(line: bytes, previous: str, where: str, secret: bytes | None) -> tuple[dict[str, Any], str]:
    """Return the event and the chain value of a line."""
    try:
        entry = json.loads(line)
        event, found, seal = entry["event"], entry["chain"], entry["seal"]
        kind, tokens = event["kind"], event.get("tokens", [])
        whole = isinstance(kind, str) and isinstance(tokens, list)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{where} is no entry of a log; restore the log from a backup")
    chain = _chain(previous, event)
    if found != chain or line + b"\n" != _line(event, chain, seal):
        raise ValueError(f"{where} was changed, or lines before it are missing; restore the log from a backup")
    if secret is not None and seal != _seal(secret, chain):
        raise ValueError(f"{where} was not written with the secret of this store")
    return event, chain


def _interrupted(rest: bytes, chain: str, start: int) -> bool:
    """Return whether the bytes from `start` on, behind the last line, are left by an interruption and not damage."""
    if not rest:
        return True
    allowed = (b"\0" + (b"0123456789abcdef" if letter == ord("#") else bytes([letter])) for letter in _BEGINNING)
    if any(found not in those for found, those in zip(rest, allowed, strict=False)):
        return False
    edges = [0, *range(_SECTOR - start % _SECTOR, len(rest), _SECTOR), len(rest)]
    if not all(_PART.fullmatch(rest[first:stop]) for first, stop in pairwise(edges)):
        return False
    with suppress(ValueError):  # a whole line with another byte in place of its end
        _entry(rest[:-1], chain, "", None)
        return False
    return True


@dataclass(frozen=True)
class Mark:
    """Position in a log, see `ReceiptLog.mark`.

    Args:
        size: size of the file in bytes.
        head: the last chain value.
        pending: as in `ReceiptLog`.
    """

    size: int
    head: str
    pending: dict[str, Any] | None


class ReceiptLog:
    """An open log, to which lines are added; see `KeyStore.keep_receipts`.

    Only the process that opened the log writes to the log; a forked process is refused.

    Args:
        path: path of the file.
        secret: secret of the store.
        new: whether to begin a log if there is no file.
        disk: `Disk` that reads and writes.

    Raises:
        BlockingIOError: if another store writes to the log.
        FileNotFoundError: if there is no such file, unless `new`.
        OSError: if the file cannot be read or written.
        ValueError: as for `verify`; the file is not changed.

    Attributes:
        head: the last chain value.
        gone: tokens of rows that were forgotten and did not return.
        pending: the last event if its kind is 'returning', until the return is confirmed or ruled out.
    """

    file = -1

    def __init__(self, path: Path, secret: bytes, *, new: bool = False, disk: Disk | None = None) -> None:
        self.path, self.secret, self.disk, self.owner = os.fspath(path), secret, disk or Disk(), Owner()
        there = self.disk.exists(self.path)
        if not there and not new:
            raise FileNotFoundError(
                f"no log at {self.path!r}: without the log that was kept, whatever a backup holds is remembered again; "
                "restore the log, or begin a new one with new=True (new_log=True where a store is opened)"
            )
        self.gone: set[str] = set()
        self._new: set[str] = set()  # tokens that the last event added
        self.dtypes: dict[str, set[int]] = {}
        self.pending: dict[str, Any] | None = None
        self.file = self.disk.open(self.path, create=not there)
        try:
            if not self.disk.lock(self.file):
                raise BlockingIOError(f"another store writes to the log {self.path!r}; close it there first")
            if not there:
                self.disk.sync_folder(self.path)
            data = self.disk.read(self.file, 0, self.disk.size(self.file))
            found = _verified(data, self.path, secret)
            self.head, self.size = found.head, found.whole
            if self.size < len(data):
                self.disk.resize(self.file, self.size)
        except BaseException:
            self.close()
            raise
        for event in found.events:
            self._count(event)

    # --- events -------------------------------------------------------------------------------------------

    def forgot(self, receipt: Receipt, tokens: Iterable[str], dtype: torch.dtype) -> None:
        """Log that rows are about to be deleted, with the dtype of their keys."""
        event = {"kind": "forgot", "receipt": json.loads(receipt.to_json()), "tokens": sorted(tokens)}
        self._add({**event, "dtype": dtype_name(dtype)})

    def returning(self, tokens: Iterable[str], after: str) -> None:
        """Log that deleted rows are about to be added again, which gives the digest `after`."""
        self._add({"kind": "returning", "awaited": sorted(tokens), "after": after})

    def returned(self) -> None:
        """Log that the returning rows are in the store."""
        if self.pending is not None:
            self._add({"kind": "returned", "tokens": self.pending["awaited"]})

    def settle(self, digest: str) -> None:
        """Decide by the digest of the store whether returning rows are in the store."""
        if self.pending is not None and self.pending["after"] == digest:
            self.returned()
        self.pending = None

    def mark(self) -> Mark:
        """Return the position that `restore` goes back to."""
        self._new = set()
        return Mark(self.size, self.head, self.pending)

    def restore(self, mark: Mark) -> None:
        """Cut off the single event that was added since the last mark."""
        self.take_back(mark.size, mark.head)
        self.gone, self.pending = self.gone - self._new, mark.pending

    def take_back(self, size: int, head: str) -> None:
        """Cut the log back to an earlier size and last chain value."""
        if self.closed:
            return
        try:
            self.disk.resize(self.file, size)
            self.disk.sync(self.file)
        except BaseException:
            self.close()  # the content of the file is unknown until the log is opened again
            raise
        self.head, self.size = head, size

    def back(self, tokens: Iterable[str]) -> list[str]:
        """Return the given tokens that belong to deleted rows, sorted."""
        return sorted(self.gone.intersection(tokens)) if self.gone else []

    @property
    def closed(self) -> bool:
        """True if the file was closed."""
        return self.file < 0

    def close(self) -> None:
        """Unlock and close the file; in a forked process, only close the descriptor."""
        if not self.closed:
            if self.owner.here:
                self.disk.unlock(self.file)
            self.disk.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def __deepcopy__(self, memo: object) -> None:
        """Return None: a copy of a store keeps no log, because two logs would overwrite each other's lines."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open log cannot be pickled; close it, and give the other store its path")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise ValueError if the log is closed, RuntimeError if another process opened it."""
        if self.closed:
            raise ValueError(f"the log {self.path!r} is closed; open it again")
        self.owner.check(f"the log {self.path!r}")

    def _add(self, event: dict[str, Any]) -> None:
        self.check()
        chain = _chain(self.head, event)
        line = _line(event, chain, _seal(self.secret, chain))
        try:
            # The line end is written last, so that a line with an end is whole after any interruption.
            for start, stop in ((0, len(line) - 1), (len(line) - 1, len(line))):
                self.disk.write(self.file, self.size + start, line[start:stop])
                self.disk.sync(self.file)
        except BaseException:
            self.take_back(self.size, self.head)
            raise
        self.head, self.size = chain, self.size + len(line)
        self._count(event)

    def _count(self, event: dict[str, Any]) -> None:
        self.pending = event if event["kind"] == "returning" else None
        if event["kind"] == "forgot":
            self._new = set(event["tokens"]) - self.gone
        _count(event, self.gone, self.dtypes)


class LoggedRows(Follower):
    """Log as a follower of a table: the log records rows before their deletion, and rows that return.

    Args:
        table: table of the rows.
        digest: digest of the table.
        log: the open log.
    """

    def __init__(self, table: Table, digest: Digest, log: ReceiptLog) -> None:
        self._table, self._digest, self.log = table, digest, log
        self._mark: Mark | None = None

    def tokens(self, rows: Tensor | slice) -> list[str]:
        """Return the tokens of rows of the table."""
        return row_tokens(self._table, self._digest.secret, rows)

    def known(self, rows: Rows) -> list[int]:
        """Return the ids of rows that the log lists as forgotten, in ascending order.

        Raises:
            ValueError: if the log was written for keys of another dtype, so that rows cannot be recognised.
        """
        return known_to(self.log.gone, self.log.dtypes, self._digest.secret, rows)

    def check(self, change: Change) -> None:
        """Raise an error if the change must be logged and the log cannot be written."""
        noted = isinstance(change, Removed) and change.receipt is not None and len(change.gone)
        if noted or (isinstance(change, Added) and self.log.gone):
            self.log.check()

    def write_ahead(self, change: Change) -> None:
        """Log rows that are about to be deleted, and rows that are about to return."""
        log, self._mark = self.log, None
        if isinstance(change, Removed) and change.receipt is not None and len(change.gone):
            self._mark = log.mark()
            log.forgot(change.receipt, self.tokens(change.gone), self._table["keys"].dtype)
        elif isinstance(change, Added) and log.gone:
            back = log.back(self.tokens(change.rows))
            if back:
                self._mark = log.mark()
                log.returning(back, self._digest.hexdigest(change.stop, self._digest.total_with(change)))

    def undo(self, change: Change) -> Undone:
        """Cut off the line that was written for the change."""
        if self._mark is not None:
            mark, self._mark = self._mark, None
            self.log.restore(mark)
        return Undone.BACK

    def confirm(self, change: Change) -> None:
        """Log that rows have returned."""
        if isinstance(change, Added) and self._mark is not None:
            self.log.returned()
        self._mark = None


def _count(event: Mapping[str, Any], gone: set[str], dtypes: dict[str, set[int]]) -> None:
    if event["kind"] == "forgot":
        gone.update(event["tokens"])
        dtypes.setdefault(event.get("dtype", ""), set()).update(event["receipt"]["forgotten"])
    elif event["kind"] == "returned":
        gone.difference_update(event["tokens"])


def _text(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _chain(previous: str, event: dict[str, Any]) -> str:
    return hashlib.blake2b(previous.encode() + _text(event), digest_size=32).hexdigest()


def _seal(secret: bytes, chain: str) -> str:
    return keyed_hash(secret, b"seal" + chain.encode()).hex()


def _line(event: dict[str, Any], chain: str, seal: object) -> bytes:
    return _text({"event": event, "chain": chain, "seal": seal}) + b"\n"

"""A log of receipts that can be checked without the data, and that keeps a backup from bringing anyone back.

Each line is one event and a chain value,

    chain_n = H(chain_{n-1}, event_n),    seal_n = H_s(chain_n)

with `H` a hash anyone can compute and `H_s` one keyed by the store's secret `s`. So a line that was changed, added or
taken away in the middle shows to everyone, and a log that was written by someone else to whoever knows the secret. A
chain cannot show that lines are missing at its end, nor that all of it was written anew: publish the last value,
`head`, now and then, and compare.

What was forgotten is named by *tokens*, keyed hashes of id, label and key: whoever has a candidate image but not the
secret learns nothing from them. An event 'forgot' says that rows are gone, 'returned' that the very same ones were
added again; the later one counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from munkey.digest import keyed_hash
from munkey.disk import Disk
from munkey.receipts import Receipt

__all__ = ["ReceiptLog", "Verified", "tokens_of", "verify"]

Path = str | os.PathLike[str]

_ROWS = 4096  # at a time


def tokens_of(secret: bytes, ids: Tensor, labels: Tensor, keys: Tensor) -> list[str]:
    """Keyed hashes of rows, by id, label and key, whatever the dtype of the keys: what a log calls them."""
    tokens = []
    for owner, label, rows in zip(ids.split(_ROWS), labels.split(_ROWS), keys.detach().split(_ROWS), strict=True):
        numbers = torch.stack((owner, label), 1).cpu().view(torch.uint8).numpy()
        wide = rows.cpu().to(torch.float64, copy=True)
        content = wide.view(torch.uint8).numpy()
        tokens += [keyed_hash(secret, b"token", n.data, k.data).hex() for n, k in zip(numbers, content, strict=True)]
        wide.zero_()  # a copy of rows that may be forgotten
    return tokens


@dataclass(frozen=True)
class Verified:
    """What a log says, once it is sure that no line was changed.

    Args:
        events: what happened, the first first.
        head: the last chain value, to compare with one that was published.
        whole: bytes of whole lines; what is behind them was interrupted while it was written.
    """

    events: tuple[dict[str, Any], ...]
    head: str
    whole: int

    @property
    def receipts(self) -> list[Receipt]:
        """Those of all events."""
        return [Receipt.from_json(json.dumps(event["receipt"])) for event in self.events if "receipt" in event]


def verify(path: Path, *, secret: bytes | None = None, disk: Disk | None = None) -> Verified:
    """Check a log; needs neither the data nor, but for the seals, the secret.

    Args:
        path: the log.
        secret: of the store; if given, seals are checked, too.
        disk: what reads.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the first line that is not what was written there.
    """
    disk, name = disk or Disk(), os.fspath(path)
    if not disk.exists(name):
        raise FileNotFoundError(f"no log at {name!r}")
    file = disk.open_to_read(name)
    try:
        data = disk.read(file, 0, disk.size(file))
    finally:
        disk.close(file)
    events, chain, whole = [], "", 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            event, found, seal = entry["event"], entry["chain"], entry["seal"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"line {number} of {name!r} is no entry of a log; restore the log from a backup") from None
        chain = _chain(chain, event)
        if found != chain or line != _line(event, chain, seal):
            raise ValueError(
                f"line {number} of {name!r} was changed, or lines before it are missing; restore the log from a backup"
            )
        if secret is not None and seal != _seal(secret, chain):
            raise ValueError(f"line {number} of {name!r} was not written with the secret of this store")
        events.append(event)
        whole += len(line)
    return Verified(tuple(events), chain, whole)


class ReceiptLog:
    """An open log, to which lines are added; see `KeyStore.keep_receipts`.

    Args:
        path: the file; it is made if there is none.
        secret: of the store.
        disk: what reads and writes.

    Raises:
        BlockingIOError: if another store writes to it.
        OSError: if the file cannot be read or written.
        ValueError: as for `verify`.

    Attributes:
        head: the last chain value.
        gone: tokens of what was forgotten and did not return.
    """

    def __init__(self, path: Path, secret: bytes, *, disk: Disk | None = None) -> None:
        self.path, self.secret, self.disk = os.fspath(path), secret, disk or Disk()
        there = self.disk.exists(self.path)
        self.file = self.disk.open(self.path, create=not there)
        self.gone: set[str] = set()
        try:
            if not self.disk.lock(self.file):
                raise BlockingIOError(f"another store writes to the log {self.path!r}; close it there first")
            if not there:
                self.disk.sync_folder(self.path)
            found = verify(self.path, secret=secret, disk=self.disk)
            self.head, self.size = found.head, found.whole
            self.disk.resize(self.file, self.size)
        except BaseException:
            self.close()
            raise
        for event in found.events:
            self._count(event)

    def forgot(self, receipt: Receipt, tokens: Iterable[str]) -> None:
        """Note what is going."""
        self._add({"kind": "forgot", "receipt": json.loads(receipt.to_json()), "tokens": sorted(tokens)})

    def returned(self, tokens: Iterable[str]) -> None:
        """Note what is there again, of what was gone."""
        back = sorted(self.gone.intersection(tokens))
        if back:
            self._add({"kind": "returned", "tokens": back})

    @property
    def closed(self) -> bool:
        """Whether the file was given back."""
        return self.file < 0

    def close(self) -> None:
        """Give the file back."""
        if not self.closed:
            self.disk.close(self.file)
            self.file = -1

    def __deepcopy__(self, memo: object) -> None:
        """A copy of a store keeps no log: two would write over each other's lines."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("an open log cannot be pickled; close it, and give the other store its path")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, event: dict[str, Any]) -> None:
        if self.closed:
            raise ValueError(f"the log {self.path!r} is closed; open it again")
        chain = _chain(self.head, event)
        line = _line(event, chain, _seal(self.secret, chain))
        try:
            # Its end last: a line that has one is whole, whatever interrupts.
            for start, stop in ((0, len(line) - 1), (len(line) - 1, len(line))):
                self.disk.write(self.file, self.size + start, line[start:stop])
                self.disk.sync(self.file)
        except OSError:
            self.disk.resize(self.file, self.size)
            raise
        self.head, self.size = chain, self.size + len(line)
        self._count(event)

    def _count(self, event: dict[str, Any]) -> None:
        (self.gone.update if event["kind"] == "forgot" else self.gone.difference_update)(event["tokens"])


def _text(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _chain(previous: str, event: dict[str, Any]) -> str:
    return hashlib.blake2b(previous.encode() + _text(event), digest_size=32).hexdigest()


def _seal(secret: bytes, chain: str) -> str:
    return keyed_hash(secret, b"seal" + chain.encode()).hex()


def _line(event: dict[str, Any], chain: str, seal: object) -> bytes:
    return _text({"event": event, "chain": chain, "seal": seal}) + b"\n"

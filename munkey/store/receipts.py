"""Receipts of forgetting: the forgotten ids, the number of erased bytes, and the digests before and after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Receipt"]


@dataclass(frozen=True)
class Receipt:
    """Evidence of one act of forgetting.

    Digests are keyed by the store's secret (see `munkey.store.digest`), so that a receipt without the secret is no test
    for a candidate image. A receipt covers the store and its attached optimisers and averages, not weights that were
    trained on the instances.

    Args:
        forgotten: deleted ids, in ascending order.
        absent: requested ids that were not in the store; it is unknown whether these ids ever were.
        rows: number of rows erased.
        bytes: number of bytes erased, in the store and in everything that follows its rows.
        before: hexadecimal digest of the store before.
        after: hexadecimal digest of the store after.
        time: time in seconds since 1970-01-01 UTC.
    """

    forgotten: tuple[int, ...]
    absent: tuple[int, ...]
    rows: int
    bytes: int
    before: str
    after: str
    time: float

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Return the receipt that `to_json` wrote.

        Raises:
            ValueError: if the text is not a receipt.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            lists = {name: tuple(fields[name]) for name in ("forgotten", "absent")}
            return cls(**{**fields, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no receipt ({type(error).__name__}: {error}): {text!r}") from None

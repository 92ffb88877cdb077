"""What a store says when it has forgotten: what went, how much was erased, and what the store was before and after."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Receipt"]


@dataclass(frozen=True)
class Receipt:
    """Evidence of one act of forgetting.

    Digests are keyed by the store's secret (see `munkey.store.digest`), so that whoever sees a receipt cannot test a
    candidate image against it. It speaks of the store and of what was attached to it, not of weights that were trained
    on the instances.

    Args:
        forgotten: ids that are gone now, in ascending order.
        absent: ids that were asked for and were not there; whether they ever were is not known.
        rows: number of rows erased.
        bytes: number of bytes erased, in the store and in what is attached to it.
        before: hexadecimal digest of the store before.
        after: hexadecimal digest of the store after.
        time: when, in seconds since 1970-01-01 UTC.
    """

    forgotten: tuple[int, ...]
    absent: tuple[int, ...]
    rows: int
    bytes: int
    before: str
    after: str
    time: float

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """What `to_json` wrote.

        Raises:
            ValueError: if it is something else.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            lists = {name: tuple(fields[name]) for name in ("forgotten", "absent")}
            return cls(**{**fields, **lists})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no receipt ({type(error).__name__}: {error}): {text!r}") from None

"""Stores to test, and the slow obvious one they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from munkey import KeyStore

SECRET = b"for tests"
WIDTHS = (3, 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_of(ids: list[int], views: int = 1, salt: int = 0) -> Tensor:
    """Keys that depend on the id, the view and a salt, and on nothing else."""
    rows = [torch.randn(views, WIDTHS[0], generator=seeded((i % 2**31) * 7 + salt)) for i in ids]
    return torch.stack(rows) if rows else torch.zeros(0, views, WIDTHS[0])


def store(**settings: object) -> KeyStore:
    return KeyStore(*WIDTHS, **{"secret": SECRET, **settings})  # type: ignore[arg-type]


@dataclass
class Plain:
    """A store as a dictionary: id to key, label and value of each view."""

    rows: dict[int, list[tuple[list[float], int, list[float]]]] = field(default_factory=dict)

    def check(self, found: KeyStore) -> None:
        """Everything is where it belongs, and there is nothing else."""
        assert list(found) == sorted(self.rows) and len(found) == len(self.rows)
        assert found.used == sum(len(views) for views in self.rows.values())
        for instance, views in self.rows.items():
            got = found.get([instance])
            assert got.ids.tolist() == [instance] * len(views) and got.views.tolist() == list(range(len(views)))
            assert [
                (k, n, v) for k, n, v in zip(got.keys.tolist(), got.labels.tolist(), got.values.tolist(), strict=True)
            ] == views
        for column in found.columns:
            assert not column[found.used :].any(), "the tail is not wiped"


class Holder(nn.Module):
    def __init__(self, rows: KeyStore) -> None:
        super().__init__()
        self.rows = rows

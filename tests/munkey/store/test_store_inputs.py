"""What a store refuses, and that it is as before then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from munkey import KeyStore

KEYS = torch.eye(3)
LABELS = torch.tensor([0, 1])

REFUSED: dict[str, tuple[Callable[[KeyStore], object], type[Exception], str]] = {
    "float ids": (
        lambda s: s.forget(torch.tensor([1.0])),
        TypeError,
        "ids must be int64, found torch.float32; use ids.lo",
    ),
    "ids in rows": (
        lambda s: s.forget(torch.tensor([[1]])),
        ValueError,
        r"ids must have one dimension, found \(1, 1\)",
    ),
    "one id": (
        lambda s: s.forget(1),
        TypeError,
        r"ids must be a list or an int64 tensor, found int; for one, give \[id\]",
    ),
    "a word": (lambda s: s.forget("12"), TypeError, "ids must be a list or an int64 tensor, found str"),
    "a broken id": (lambda s: s.forget([1.5]), TypeError, "an id must be a whole number, found 1.5"),
    "a truth": (lambda s: s.forget([True]), TypeError, "an id must be a whole number, found True"),
    "a huge id": (lambda s: s.forget([2**63]), ValueError, "an id must fit into 64 bits, found 9223372036854775808"),
    "a tiny id": (
        lambda s: s.forget([-(2**63) - 1]),
        ValueError,
        "an id must fit into 64 bits, found -9223372036854775809",
    ),
    "no such way": (
        lambda s: s.forget([9], missing="skip"),
        ValueError,
        "missing must be 'raise' or 'ignore', found 'skip'",
    ),
    "twice": (
        lambda s: s.add([4, 4], KEYS[:2]),
        ValueError,
        r"ids \[4\] come twice; give the keys of one instance tog",
    ),
    "whole keys": (
        lambda s: s.add([4, 5], KEYS[:2].long()),
        TypeError,
        "keys must be a floating-point tensor, found torch.int",
    ),
    "no tensor": (
        lambda s: s.add([4], [[0.0, 0.0, 1.0]]),
        TypeError,
        "keys must be a floating-point tensor, found list",
    ),
    "wide keys": (
        lambda s: s.add([4], torch.ones(1, 4)),
        ValueError,
        r"expected keys of shape \(1, 3\), or \(1, P, 3\) for",
    ),
    "few keys": (lambda s: s.add([4, 5], KEYS[:1]), ValueError, r"expected keys of shape \(2, 3\).* found \(1, 1, 3\)"),
    "no view": (lambda s: s.add([4], torch.ones(1, 0, 3)), ValueError, r"expected keys of shape .* found \(1, 0, 3\)"),
    "endless": (lambda s: s.add([4], KEYS[:1] / 0), ValueError, "finite"),
    "few values": (
        lambda s: s.add([4], torch.ones(1, 2, 3), values=torch.ones(1, 1, 2)),
        ValueError,
        "expected one value for each of 2 keys of an id, found 1",
    ),
    "float labels": (
        lambda s: s.add([4, 5], KEYS[:2], labels=LABELS.float()),
        TypeError,
        "labels must be int64, found torch.fl",
    ),
    "few labels": (
        lambda s: s.add([4], KEYS[:1], labels=LABELS),
        ValueError,
        r"expected one label for each of 1 ids, found \(2,\)",
    ),
    "a label below": (
        lambda s: s.add([4, 5], KEYS[:2], labels=LABELS - 1),
        ValueError,
        "a label is at least 0, found -1; leave",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name: str) -> None:
    call, error, message = REFUSED[name]
    store = KeyStore(3, 2)
    store.add([1, 2], KEYS[:2], labels=LABELS)
    digest = store.digest()
    with pytest.raises(error, match=message):
        call(store)
    assert list(store) == [1, 2]
    assert store.digest() == digest


@pytest.mark.parametrize("secret", [b"", bytes(65)])
def test_a_secret_has_a_length(secret: bytes) -> None:
    with pytest.raises(ValueError, match=f"a secret has 1 to 64 bytes, found {len(secret)}"):
        KeyStore(3, 2, secret=secret)

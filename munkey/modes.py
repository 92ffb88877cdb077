"""What 'paper' and 'exact' mode ask for, and what they say where they do not get it."""

from __future__ import annotations

from munkey.encoders.base import KeyEncoder
from munkey.memory import KeyValueMemory
from munkey.store.store import KeyStore

__all__ = ["MODES", "check_exact", "check_mode", "check_shares"]

MODES = ("paper", "exact")


def check_mode(mode: str, key_encoder: KeyEncoder, memory: KeyValueMemory) -> str:
    """The mode itself, once encoder and memory allow it.

    Raises:
        ValueError: if there is no such mode, or exact mode would not be exact.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'paper' or 'exact', found {mode!r}")
    if mode == "paper":
        return mode
    if memory.writer is None:
        raise ValueError("exact mode needs a memory with a writer, which gives values to what weights have not seen")
    if memory.store.values.requires_grad or memory.store.scale:
        raise ValueError(
            "in exact mode values are written, not learned; make the store with scale=0.0, and its values with "
            "store.values.requires_grad_(False)"
        )
    if key_encoder.fitted_on == "forgettable":
        raise ValueError(
            "in exact mode the encoder must not have seen what can be forgotten; fit it to other data or to the "
            "permanent split, or use mode='paper'"
        )
    return mode


def check_exact(store: KeyStore) -> None:
    """Raise ValueError if weights would see something that can be forgotten."""
    if store.forgettable:
        raise ValueError(
            f"in exact mode weights are trained on what stays for good, but the memory holds {store.forgettable} rows "
            "that can be forgotten; train first, on instances remembered with permanent=True, and remember others "
            "afterwards"
        )


def check_shares(mode: str, **shares: float) -> None:
    """Raise ValueError if shares are out of range, or do not go together."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be between 0 and 1, found {share}")
    drop_input, drop_exemplar = shares["drop_input"], shares["drop_exemplar"]
    if drop_input + drop_exemplar > 1:
        raise ValueError(
            f"drop_input and drop_exemplar must add up to 1 at most, found {drop_input} and {drop_exemplar}"
        )
    if mode == "exact" and shares["own_token_probability"]:
        raise ValueError(
            "in exact mode own_token_probability is 0: a written value holds its instance's label, and gives it away; "
            f"found {shares['own_token_probability']}"
        )

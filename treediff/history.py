"""What a growing tree remembers of its stages, as plain JSON values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["KINDS", "check_history"]

#: Of stages, in their order.
KINDS = ("initial", "settle", "subtree", "intermediate", "final")


def check_history(state: Mapping[str, Any], routed: Collection[int]) -> list[dict[str, Any]]:
    """The stages in a state, once it is sure that they can have made a tree.

    Args:
        state: what `TreeGrowth.state_dict` returned.
        routed: nodes of the tree that have children.

    Raises:
        KeyError: if the state, or a stage in it, lacks an entry; or if the tree was not split there.
        TypeError: if the stages are not a list of mappings.
        ValueError: if a stage is of an unknown kind, or names a split where it should not.
    """
    if not isinstance(state, Mapping) or "history" not in state:
        raise KeyError(f"expected what state_dict returned, with the entry 'history', found {state!r}")
    history = state["history"]
    if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
        raise TypeError(f"history must be a list of stages, each a mapping, found {history!r}")
    for entry in history:
        missing = [name for name in ("kind", "split", "epochs", "above") if name not in entry]
        if missing:
            raise KeyError(f"a stage in history lacks {missing}, found {dict(entry)}")
        if entry["kind"] not in KINDS:
            raise ValueError(f"a stage is one of {list(KINDS)}, found {entry['kind']!r}")
        split = entry["split"]
        if (split is None) == (entry["kind"] in ("settle", "subtree")):
            raise ValueError(f"a {entry['kind']} stage names the node that was split, others do not; found {split}")
        # Pruning, before the final stage, may have taken the node away.
        if split is not None and history[-1]["kind"] != "final" and split not in routed:
            raise KeyError(
                f"node {split} was split in this history, but not in the model's tree; load the model that was saved "
                "along with it"
            )
    return [dict(entry) for entry in history]

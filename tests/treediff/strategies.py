"""Hypothesis strategies shared by the tests."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

from treediff.tree.topology import TreeTopology

# No deadline: the first call into torch may be slow, and somebody else may be using the machine.
quick = settings(deadline=None, max_examples=40)

Step = tuple[str, int]
STARTS = (TreeTopology.balanced(0), TreeTopology.balanced(2), TreeTopology.chain(2))


def histories(max_steps: int = 12) -> st.SearchStrategy[list[Step]]:
    """Recipes for growing a tree: ("split" or "prune", a number that picks one of the leaves)."""
    # Twice as likely to split as to prune, or the trees would stay small.
    action = st.sampled_from(["split", "split", "prune"])
    return st.lists(st.tuples(action, st.integers(0, 63)), max_size=max_steps)


def follow(tree: TreeTopology, history: list[Step]) -> TreeTopology:
    """Carry out a recipe; a step that would prune the only leaf is left out."""
    for action, number in history:
        leaf = tree.leaves[number % len(tree.leaves)]
        if action == "split":
            tree = tree.split(leaf)
        elif len(tree.leaves) > 1:
            tree = tree.prune(leaf)
    return tree


def topologies(max_steps: int = 12) -> st.SearchStrategy[TreeTopology]:
    """Trees with gaps in their ids, pass-through nodes and any shape that splitting and pruning can reach."""
    return st.builds(follow, st.sampled_from(STARTS), histories(max_steps))

"""Layout of the nodes of a tree in a picture: leaves evenly spaced, parents centred over their children."""

from __future__ import annotations

from treediff.tree.topology import TreeTopology

__all__ = ["columns", "spans"]


def spans(tree: TreeTopology) -> dict[int, tuple[int, int]]:
    """Return the first and last leaf column of each node, counting the leaves from left to right.

    Examples:
        >>> spans(TreeTopology.balanced(1).split(1))
        {3: (0, 0), 4: (1, 1), 1: (0, 1), 2: (2, 2), 0: (0, 2)}
    """
    found: dict[int, tuple[int, int]] = {}
    leaves = 0
    waiting = [(tree.root, False)]
    while waiting:
        node, children_done = waiting.pop()
        children = tree.children(node)
        if not children:
            found[node] = (leaves, leaves)
            leaves += 1
        elif children_done:
            found[node] = (found[children[0]][0], found[children[-1]][1])
        else:
            waiting.append((node, True))
            waiting.extend((child, False) for child in reversed(children))
    return found


def columns(tree: TreeTopology) -> dict[int, float]:
    """Return the horizontal place of each node, in leaf columns.

    Examples:
        >>> columns(TreeTopology.balanced(1).split(1))
        {3: 0.0, 4: 1.0, 1: 0.5, 2: 2.0, 0: 1.25}
    """
    found: dict[int, float] = {}
    for node, (first, _) in spans(tree).items():
        below = [found[child] for child in tree.children(node)]
        found[node] = sum(below) / len(below) if below else float(first)
    return found

"""On several processes models learn, grow and generate what they do on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from process_cases import grown_here
from rank_pool import RankPool

from treediff import TreeTopology


@pytest.mark.parametrize(
    ("resumed", "settings"),
    [(False, {"policy": "highest_loss", "threshold": 0.05}), (True, {"min_share": 0.3})],  # which prunes
)
def test_a_tree_grows_on_many_processes_as_on_one(pool: RankPool, resumed: bool, settings: dict[str, Any]) -> None:
    weights, tree, history = grown_here(resumed, settings)
    topology = TreeTopology.from_json(tree)
    assert "subtree" in history and resumed == (len(topology.leaves) < 1 + history.count("subtree") + 1)
    for found in pool.run(grown_here, resumed, settings):
        assert found[1:] == (tree, history)
        for name, weight in found[0].items():
            torch.testing.assert_close(weight, weights[name])

"""A growth that is saved and taken up again does what it would have done without a break, to the last bit."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import blobs, growth_of, small, train, weights
from torch import Tensor

from treediff import Stage, TreeGrowth, TreeTopology, TreeVAE

SETTINGS: dict[str, Any] = {"max_leaves": 4, "min_share": 0.0, "policy": "highest_loss", "epochs": 2, "seed": 5}
X = blobs(50, 40, 40, 30)


def described(stage: Stage) -> tuple[object, ...]:
    """Everything that a loop sees of a stage."""
    batches = [[rows.tolist() for rows in stage.batches(epoch, 16)] for epoch in range(stage.epochs)]
    return stage.kind, stage.index, stage.splits, stage.epochs, stage.above, stage.rows.tolist(), batches


Saved = tuple[tuple[object, ...], dict[str, Tensor], Path, str]


def run(model: TreeVAE, folder: Path, state: str | None = None, **settings: Any) -> list[Saved]:  # noqa: ANN401
    """Train to the end; after each stage save model and state as a user would, in the loop."""
    growth, saved = growth_of(model, **{**SETTINGS, **settings}), []
    if state is not None:
        growth.load_state_dict(json.loads(state))
    for stage in growth.stages(X):
        about = described(stage)
        train(stage, X)
        path = folder / f"{state is not None}-{stage.index}.safetensors"
        model.save(path)
        saved.append((about, weights(model), path, json.dumps(growth.state_dict())))
    return saved


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    return run(small(), tmp_path_factory.mktemp("whole"))


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_run_to_compare_with_has_all_kinds_of_stages(uninterrupted: list[Saved]) -> None:
    kinds = [stage[0][0] for stage in uninterrupted]
    assert kinds == ["initial", "settle", "subtree", "settle", "subtree", "intermediate", "final"]


@pytest.mark.parametrize("done", range(1, 8))
def test_a_run_goes_on_after_any_stage(uninterrupted: list[Saved], done: int, tmp_path: Path) -> None:
    _, _, path, state = uninterrupted[done - 1]
    rest = run(TreeVAE.load(path), tmp_path, state)
    assert [stage[0] for stage in rest] == [stage[0] for stage in uninterrupted[done:]]
    for found, expected in zip(rest, uninterrupted[done:], strict=True):
        assert same(found[1], expected[1])
        assert found[3] == expected[3]


def test_a_break_after_every_stage_changes_nothing(uninterrupted: list[Saved], tmp_path: Path) -> None:
    state, path, stages = {"history": []}, tmp_path / "model.safetensors", []  # type: ignore[var-annotated]
    small().save(path)
    while True:
        model = TreeVAE.load(path)
        growth = growth_of(model, **SETTINGS)
        growth.load_state_dict(state)
        stage = next(growth.stages(X), None)
        if stage is None:
            break
        stages.append(described(stage))
        train(stage, X)
        model.save(path)
        state = growth.state_dict()
    assert stages == [stage[0] for stage in uninterrupted]
    assert same(model.state_dict(), uninterrupted[-1][1])


def test_a_stage_is_handed_out_again(uninterrupted: list[Saved], tmp_path: Path) -> None:
    """With the model as it was in that stage, all goes on as if it had been handed out once."""
    growth = growth_of(small(), **SETTINGS)
    seen = []
    for stage in growth.stages(X):
        seen.append((growth.model.topology, weights(growth.model), json.dumps(growth.state_dict()), stage.rows))
        train(stage, X)
    for number, (tree, state, history, rows) in enumerate(seen):
        model = small()
        model.become(tree)
        model.load_state_dict(state)
        other = growth_of(model, **SETTINGS)
        other.load_state_dict(json.loads(history))
        stages = []
        for stage in other.stages(X, again=rows):
            stages.append(described(stage))
            train(stage, X)
        assert stages == [stage[0] for stage in uninterrupted[number:]]
        assert same(model.state_dict(), uninterrupted[-1][1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            torch.tensor([0.0]),
            "again= takes the rows of the last stage, int64 numbers below 160; found torch.float32 of",
        ),
        (torch.tensor([[0]]), "int64 numbers below 160; found torch.int64 of shape (1, 1)"),
        (torch.tensor([0, 160]), "int64 numbers below 160; found torch.int64 of shape (2,)"),
        (torch.tensor([-1]), "int64 numbers below 160; found torch.int64 of shape (1,)"),
    ],
)
def test_no_stage_is_handed_out_again_on_other_rows(rows: Tensor, message: str) -> None:
    growth = growth_of(small())
    with pytest.raises(
        ValueError, match="no stage was handed out yet, so none can be handed out again; leave out again="
    ):
        next(growth.stages(X, again=rows))
    next(growth.stages(X))
    before = growth.state_dict()
    with pytest.raises(ValueError, match=re.escape(message)):
        next(growth.stages(X, again=rows))
    assert growth.state_dict() == before


def test_skipped_stages_are_remembered(tmp_path: Path) -> None:
    skipped = {"settle_epochs": 0, "intermediate_epochs": 0}
    whole = run(small(), tmp_path, **skipped)
    assert {stage[0][0] for stage in whole} == {"initial", "subtree", "final"}
    for done, (_, _, path, state) in enumerate(whole, start=1):
        rest = run(TreeVAE.load(path), tmp_path, state, **skipped)
        assert [stage[0] for stage in rest] == [stage[0] for stage in whole[done:]]
        assert not rest or same(rest[-1][1], whole[-1][1])


def test_a_tree_that_is_done_stays_as_it_is(uninterrupted: list[Saved]) -> None:
    _, before, path, state = uninterrupted[-1]
    model = TreeVAE.load(path)
    growth = growth_of(model, **SETTINGS)
    growth.load_state_dict(json.loads(state))
    assert list(growth.stages(X)) == []
    assert same(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_state_is_a_copy() -> None:
    growth = growth_of(small())
    next(growth.stages(X))
    state = growth.state_dict()
    other = growth_of(small())
    other.load_state_dict(state)
    kept = copy.deepcopy(state)
    growth.history[0]["kind"] = other.history[0]["kind"] = "nonsense"
    other.history.append({})
    assert state == kept


STAGE = {"kind": "settle", "splits": [1], "epochs": 2, "above": 0.5}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({}, KeyError, "expected what state_dict returned, with the entry 'history', found {}"),
        ([], KeyError, "expected what state_dict returned, with the entry 'history', found []"),
        ({"history": "final"}, TypeError, "history must be a list of stages, each a mapping, found 'final'"),
        ({"history": ["final"]}, TypeError, "history must be a list of stages, each a mapping, found ['final']"),
        ({"history": [{"kind": "final"}]}, KeyError, "a stage in history lacks ['splits', 'epochs', 'above'], found"),
        ({"history": [{**STAGE, "kind": "warmup"}]}, ValueError, "found 'warmup'"),
        (
            {"history": [STAGE]},
            KeyError,
            "nodes [1] were split in this history, but not in the model's tree; load the model that was saved along",
        ),
        (
            {"history": [{**STAGE, "splits": []}]},
            ValueError,
            "a settle stage lists the nodes that were split, others []",
        ),
        (
            {"history": [{**STAGE, "splits": 1}]},
            ValueError,
            "a settle stage lists the nodes that were split, others []",
        ),
        (
            {"history": [{**STAGE, "kind": "final"}]},
            ValueError,
            "a final stage lists the nodes that were split, others",
        ),
    ],
)
def test_foreign_states_are_refused(state: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    growth = growth_of(small())
    with pytest.raises(error, match=re.escape(message)):
        growth.load_state_dict(state)
    assert growth.history == []


@pytest.mark.parametrize("kind", ["intermediate", "final"])
def test_a_state_after_pruning_is_taken(kind: str) -> None:
    # The node that was split is gone with both its children.
    growth: TreeGrowth = growth_of(small(TreeTopology.balanced(1).prune(1)))
    growth.load_state_dict({"history": [STAGE, {**STAGE, "kind": kind, "splits": []}]})
    assert len(growth.history) == 2

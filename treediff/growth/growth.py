"""Structure learning: what trains now, on which rows, and how the tree grows in between.

The library decides and your own loop trains. `TreeGrowth.stages(data)` yields a `Stage` at a time (Manduchi et al.,
arXiv 2306.08984, section 2.4): the *initial* tree; then, until there are enough leaves, for each split a *settle* and a
*subtree* stage, in which two new children learn on the rows of the leaf that was split while everything else is frozen;
now and then an *intermediate* stage that trains the whole tree; at last leaves that hold next to nothing are pruned and
a *final* stage fine-tunes what is left.

Not in the paper: a new router begins as a normalised cut of its rows, and keeps it while the children settle. A router
that learns from the first step sends everything to the child that happens to be ahead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from treediff.core.checks import check_positive
from treediff.core.distributed import ALONE, World
from treediff.core.noise import combine_seeds
from treediff.growth.annealing import KLAnnealing
from treediff.growth.cut import Augmentation, cut_router
from treediff.growth.policy import POLICIES, Policy, Survey, best_leaf
from treediff.growth.stage import Stage
from treediff.treevae.model import TreeVAE

__all__ = ["KINDS", "TreeGrowth", "check_history"]

#: Of stages, in their order.
KINDS = ("initial", "settle", "subtree", "intermediate", "final")


@dataclass
class TreeGrowth:
    """Grows a TreeVAE by an iterator of stages; it can be saved and resumed between two stages and in the midst of one.

    Args:
        model: the model, which starts as it is (usually a root with two leaves).
        max_leaves: stop growing at this many effective leaves, those that a share of the rows of at least `min_share`
            prefers to all others.
        epochs: epochs of every kind of stage that is not named below.
        initial_epochs: epochs of the initial stage.
        settle_epochs: epochs of a settle stage, in which a new router keeps its first cut; 0 skips it.
        subtree_epochs: epochs of a subtree stage.
        intermediate_epochs: epochs of an intermediate stage; 0 skips them.
        final_epochs: epochs of the final stage; 0 skips it.
        intermediate_every: splits between two intermediate stages.
        policy: which leaf to split: 'largest', 'highest_loss', 'highest_entropy', or a function from
            `LeafStatistics` to a score per leaf.
        warm_start: whether new children begin as copies of the leaf they come from.
        min_share: leaves that a smaller share of the rows prefers to all others are pruned before the final stage.
        min_rows: leaves with fewer rows are not split.
        cut_on: where a leaf's rows are cut, on the 'inputs' as they are or on the model's 'features' of them, which a
            contrastive loss can make better than the inputs.
        augment: changes that a cluster should not depend on, called as `augment(x, generator=generator)`; see
            `treediff.augment`. None for none.
        views: changed copies of each row that a cut looks at, if there is `augment`.
        cut_share: the smaller side of a cut holds at least this share of the leaf's rows.
        cut_rows: rows that a cut looks at, at most; its time grows with their square.
        threshold: nodes that an image reaches with less probability are visited now and then in training, see `Stage`.
        annealing: KL weight over the epochs of the stages in between; a small one lets the leaves learn to differ.
        initial_annealing: KL weight over the initial stage.
        final_annealing: KL weight over the final stage; by default it climbs to 1.
        seed: for the order of rows and the weights of new nodes.
        batch_size: rows at a time when the growth itself looks at the data.
        world: the processes that grow the same tree on the same data; each looks at a share of it, and all agree.

    Attributes:
        history: the stages so far; `load_state_dict` brings back those of another growth.

    Raises:
        TypeError: if a count is no whole number, or the policy neither a name nor a function.
        ValueError: if a setting is out of range, or no policy has that name.

    Examples:
        >>> model = TreeVAE.for_vectors(features=4, generator=torch.Generator().manual_seed(0))
        >>> growth = TreeGrowth(model, max_leaves=2, epochs=1)
        >>> [stage.kind for stage in growth.stages(torch.rand(32, 4))]
        ['initial', 'final']
    """

    model: TreeVAE
    max_leaves: int = 10
    epochs: int = 20
    initial_epochs: int | None = None
    settle_epochs: int | None = None
    subtree_epochs: int | None = None
    intermediate_epochs: int | None = None
    final_epochs: int | None = None
    intermediate_every: int = 3
    policy: str | Policy = "largest"
    warm_start: bool = True
    min_share: float = 0.01
    min_rows: int = 64
    cut_on: str = "inputs"
    augment: Augmentation | None = None
    views: int = 8
    cut_share: float = 0.05
    cut_rows: int = 50_000
    threshold: float = 0.01
    annealing: KLAnnealing = field(default_factory=lambda: KLAnnealing.constant(0.1))
    initial_annealing: KLAnnealing = field(default_factory=KLAnnealing.constant)
    final_annealing: KLAnnealing | None = None
    seed: int = 0
    batch_size: int = 1024
    history: list[dict[str, Any]] = field(default_factory=list, init=False)
    world: World = ALONE
    _frozen: frozenset[str] = field(default=frozenset(), init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive(
            max_leaves=self.max_leaves,
            intermediate_every=self.intermediate_every,
            min_rows=self.min_rows,
            views=self.views,
            cut_rows=self.cut_rows,
            batch_size=self.batch_size,
        )
        for name in ("epochs", *(f"{kind}_epochs" for kind in KINDS)):
            epochs = getattr(self, name)
            if not isinstance(epochs, Integral | None):
                raise TypeError(f"{name} must be a whole number, found {epochs!r}")
            if epochs is not None and epochs < 0:
                raise ValueError(f"{name} must be at least 0, found {epochs}; 0 skips the stage")
        for name in ("min_share", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        if not 0 <= self.cut_share <= 0.5:
            raise ValueError(f"cut_share must be between 0 and 0.5, found {self.cut_share}")
        if self.cut_on not in ("inputs", "features"):
            raise ValueError(f"cut_on must be 'inputs' or 'features', found {self.cut_on!r}")
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {list(POLICIES)} or a function, found {self.policy!r}")
        if not isinstance(self.policy, str) and not callable(self.policy):
            raise TypeError(f"policy must be a name or a function, found {self.policy!r}")

    def stages(self, data: Tensor, *, again: Tensor | None = None) -> Iterator[Stage]:
        """Yield stages until the tree is done; train each one before asking for the next.

        Args:
            data: all observations, `(n, *model.inputs)`.
            again: the rows of the stage that was handed out last, to have it once more before any other: if it was
                interrupted, and the model is as it was then.

        Raises:
            TypeError: if the data have a wrong dtype, or a policy of your own returns no tensor.
            ValueError: if there are no rows, or the data are not what the model takes; if a policy of your own does not
                give a score to each leaf; or if no stage was handed out, or not on such rows.
        """
        self.model.check(data)
        if not len(data):
            raise ValueError("a tree grows on data: expected at least one row, found none")
        # Parameters that are frozen here stay frozen: the caller wants them so.
        self._frozen = frozenset(name for name, weight in self.model.named_parameters() if not weight.requires_grad)
        try:
            if again is not None:
                yield self._again(again, len(data))
            while (stage := self._next(data)) is not None:
                # Listed before it is trained, so that a state saved at the end of your loop's body counts it as done.
                record = {"kind": stage.kind, "split": stage.split, "epochs": stage.epochs, "above": stage.above}
                self.history.append(record)
                if stage.epochs:
                    yield stage
        finally:  # also where the caller leaves the loop early
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name not in self._frozen)

    def _again(self, rows: Tensor, n: int) -> Stage:
        """Make the last stage in the history once more, of `rows`."""
        if not self.history:
            raise ValueError("no stage was handed out yet, so none can be handed out again; leave out again=")
        if rows.dtype != torch.int64 or rows.ndim != 1 or not ((rows >= 0) & (rows < n)).all():
            raise ValueError(
                f"again= takes the rows of the last stage, int64 numbers below {n}; found {rows.dtype} of shape "
                f"{tuple(rows.shape)}"
            )
        last = self.history.pop()  # while it is made: it counts the stages before it
        stage = self._stage(last["kind"], rows, last["split"], last["above"])
        self.history.append(last)
        return stage

    def _next(self, data: Tensor) -> Stage | None:
        everything = torch.arange(len(data))
        if not self.history:
            for node in self.model.topology.routed:
                self._cut(node, data, (self._survey.reach(data, node) > 0.5).nonzero().squeeze(1))
            return self._stage("initial", everything)
        last = self.history[-1]
        if last["kind"] == "final":
            return None
        if last["kind"] == "settle":
            return self._subtree_stage("subtree", data, last["split"], last["above"])
        splits = [entry["kind"] for entry in self.history].count("subtree")
        if last["kind"] == "subtree" and splits % self.intermediate_every == 0:
            return self._stage("intermediate", everything)
        probs = self._survey.leaf_probs(data)
        leaf = self._leaf_to_split(data, probs) if self._effective(probs) < self.max_leaves else None
        if leaf is None:
            self._prune(data, probs)
            return self._stage("final", everything)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, len(self.history), -1))
        # Rows that might as well be elsewhere would blur the cut.
        certain = (probs.argmax(1) == self.model.topology.leaves.index(leaf)).nonzero().squeeze(1)
        self.model.split(leaf, warm_start=self.warm_start, generator=generator)
        self._cut(leaf, data, certain)
        return self._subtree_stage("settle", data, leaf, self._membership(probs))

    def _subtree_stage(self, kind: str, data: Tensor, split: int, above: float) -> Stage:
        """Make a stage of the rows that reach a node with a probability of at least `above`."""
        rows = (self._survey.reach(data, split) >= above).nonzero().squeeze(1)
        return self._stage(kind, rows, split=split, above=above)

    def _stage(self, kind: str, rows: Tensor, split: int | None = None, above: float = 0.0) -> Stage:
        named: int | None = getattr(self, f"{kind}_epochs")
        epochs = self.epochs if named is None else named
        annealing = self.initial_annealing if kind == "initial" else self.annealing
        if kind == "final":
            annealing = self.final_annealing or KLAnnealing(step=max(0.01, 1 / max(1, epochs - 1)))
        done = len(self.history)
        settings = (split, above, self.threshold, self.seed, self._frozen)
        return Stage(self.model, kind, done, epochs, rows, annealing, *settings)

    # --- decisions ----------------------------------------------------------------------------------------

    @property
    def _survey(self) -> Survey:
        return Survey(self.model, self.batch_size, (self.seed, len(self.history), -2), self.world)

    def members(self, probs: Tensor) -> Tensor:
        """Mark the rows of each leaf: `P(leaf | x) >= min(1 / effective leaves, 1/2)`; `(n, K)` of booleans."""
        return probs >= self._membership(probs)

    def _membership(self, probs: Tensor) -> float:
        return min(1 / max(1, self._effective(probs)), 0.5)

    def _effective(self, probs: Tensor) -> int:
        return int((self._preferring(probs) >= self.min_share * len(probs)).sum())

    @staticmethod
    def _preferring(probs: Tensor) -> Tensor:
        """Count the rows that prefer each leaf to all others."""
        return probs.argmax(1).bincount(minlength=probs.shape[1])

    def _leaf_to_split(self, data: Tensor, probs: Tensor) -> int | None:
        """Return the best-scored leaf with rows enough and room below; None if there is none."""
        tree, deepest = self.model.topology, len(self.model.bottom_up)
        policy = POLICIES[self.policy] if isinstance(self.policy, str) else self.policy
        room = torch.tensor([tree.depth(leaf) < deepest for leaf in tree.leaves])
        losses = self.policy not in ("largest", "highest_entropy")
        statistics = self._survey.statistics(data, probs, self.members(probs), losses=losses)
        return best_leaf(policy, statistics, tree.leaves, room & (statistics.rows >= self.min_rows))

    def _cut(self, node: int, data: Tensor, rows: Tensor) -> None:
        """Start a new posterior router as a cut where its rows lie thin, so that neither child starves."""
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, len(self.history), -3))
        picked = rows[torch.randperm(len(rows), generator=generator)[: self.cut_rows]]
        if len(picked) > 1 and self.world.first:
            cut_router(
                self.model,
                node,
                data[picked],
                on=self.cut_on,
                augment=self.augment,
                views=self.views,
                min_share=self.cut_share,
                batch_size=self.batch_size,
                generator=generator,
            )
        self.world.follow_first(self.model)

    def _prune(self, data: Tensor, probs: Tensor) -> None:
        """Remove, one by one, the leaf that fewest rows choose, while that is less than `min_share` of them."""
        while len(self.model.topology.leaves) > 1:
            counts = self._preferring(probs)
            smallest = int(counts.argmin())
            if counts[smallest] >= self.min_share * len(data):
                return
            self.model.prune(self.model.topology.leaves[smallest])
            probs = self._survey.leaf_probs(data)

    # --- saving -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed growth needs besides the saved model and the same arguments; plain JSON values.

        Save both when a stage has been trained, at the end of your loop's body: the stage handed out last counts as
        done.
        """
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last stage that `state` lists.

        Raises:
            KeyError: if the state, or a stage in it, lacks an entry; or if the model's tree was not split there.
            TypeError: if the stages are not a list of mappings.
            ValueError: if a stage is of an unknown kind, or names a split where it should not.
        """
        self.history = check_history(state, self.model.topology.routed)


def check_history(state: Mapping[str, Any], routed: Collection[int]) -> list[dict[str, Any]]:
    """Read the stages in a state, once it is sure that they can have made a tree.

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

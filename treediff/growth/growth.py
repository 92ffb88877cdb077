"""Structure learning: the stages of training, the rows of each stage, and the growth of the tree between stages.

The library decides and your loop trains. `TreeGrowth.stages(data)` yields one `Stage` at a time (Manduchi et al.,
arXiv 2306.08984, section 2.4). The *initial* stage trains the first tree. Then leaves are split until there are enough
leaves. In a *settle* and a *subtree* stage after each split, the two new children learn on the rows of the leaf that
was split, while everything else is frozen. After every few splits an *intermediate* stage trains the whole tree. At
last a *final* stage fine-tunes the tree. Leaves that have lost their rows are pruned after each stage.

Not in the paper: a new router begins as a normalised cut of its rows, and keeps the cut while the children settle. A
router that learns from the first step sends all rows to the child that happens to be ahead. The same may happen later,
where the rows of a leaf are of one kind: a split that has lost a child is undone by pruning. Growth ends after twice as
many splits as leaves are wanted, with the leaves that there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from treediff.core.checks import check_positive
from treediff.core.distributed import ALONE, World
from treediff.core.noise import combine_seeds
from treediff.core.rows import Indexable, Rows
from treediff.growth.annealing import KLAnnealing
from treediff.growth.cut import Augmentation, CutOn, check_cut_on, cut_router
from treediff.growth.policy import POLICIES, Policy, Survey, best_leaves
from treediff.growth.reach import LeafProbabilities
from treediff.growth.stage import Stage
from treediff.treevae.model import TreeVAE

__all__ = ["KINDS", "LEARNING", "TreeGrowth", "check_history"]

#: Kinds of stages, in their order.
KINDS = ("initial", "settle", "subtree", "intermediate", "final")
#: Kinds of stages in which routers learn, by `TreeGrowth.keep_cuts`.
LEARNING = {"never": KINDS, "growth": ("initial", "final"), "always": ("initial",)}


@dataclass
class TreeGrowth:
    """Growth of a TreeVAE as an iterator of stages, which can be saved and resumed between and within stages.

    Args:
        model: the model, which grows from its present tree (by default a single root).
        max_leaves: stop growing at this many effective leaves. A leaf is effective if a share of the rows of at least
            `min_share` prefers it to all others.
        epochs: epochs of every kind of stage that is not named below.
        initial_epochs: epochs of the initial stage.
        settle_epochs: epochs of a settle stage, in which a new router keeps its first cut; 0 skips it.
        subtree_epochs: epochs of a subtree stage.
        intermediate_epochs: epochs of an intermediate stage; 0 skips them.
        final_epochs: epochs of the final stage; 0 skips it.
        intermediate_every: splits between two intermediate stages.
        splits_at_once: greatest number of leaves that are split together, and whose children learn in one stage: the
            leaf that the policy prefers, and the next best leaves of the same depth.
        policy: choice of the leaf to split: 'largest', 'highest_loss', 'highest_entropy', or a function from
            `LeafStatistics` to a score per leaf.
        warm_start: whether new children begin as copies of their parent, the leaf that was split.
        min_share: leaves that a smaller share of the rows prefers to all others are pruned, and no split makes such a
            leaf; by default 0.01, or a fifth of an even share if that is less.
        min_rows: leaves with fewer rows are not split.
        cut_on: where a leaf's rows are cut: on the 'inputs' themselves, on the model's 'features' of the inputs, which
            a contrastive loss can make better than the inputs, or on what a function makes of a batch of inputs, such
            as `treediff.layers.GradientHistograms()`, or a network that was trained before.
        augment: changes that a cluster should not depend on, called as `augment(x, generator=generator)`; see
            `treediff.augment`. None for none.
        views: number of changed copies of each row that a cut compares, if there is `augment`.
        cut_share: the smaller side of a cut holds at least this share of the leaf's rows.
        keep_cuts: how long clusters stay as they were cut: 'never', during 'growth', or 'always'. Encoder and posterior
            routers then learn in the initial stage only, and not before the final stage or never again, and other
            stages train the rest of the model for these clusters. Where routers learn on, the leaf that reconstructs
            best attracts the rows of others, above all while there are few leaves.
        cut_neighbours: neighbours that a row is joined to in a cut. More make it smoother, which helps with features of
            photographs.
        cut_rows: greatest number of rows in a cut; the time of a cut grows with the square of this number.
        threshold: nodes that an image reaches with less probability are visited at random in training, see `Stage`.
        annealing: KL weight over the epochs of each stage between the initial and the final stage. A small weight lets
            the leaves learn to differ.
        initial_annealing: KL weight over the initial stage.
        final_annealing: KL weight over the final stage; by default the weight rises to 1.
        seed: seed of the order of rows and of the weights of new nodes.
        batch_size: rows in a batch when the growth itself passes over the data.
        world: the processes that grow the same tree on the same data. Each process passes over a share of the data,
            and all processes get all results.

    Attributes:
        history: the stages so far; `load_state_dict` restores the stages of another growth.

    Raises:
        TypeError: if a count is no whole number, or the policy or `cut_on` is neither a name nor a function.
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
    splits_at_once: int = 1
    policy: str | Policy = "largest"
    warm_start: bool = True
    min_share: float | None = None
    min_rows: int = 64
    cut_on: CutOn = "inputs"
    augment: Augmentation | None = None
    views: int = 8
    cut_share: float = 0.05
    cut_neighbours: int = 10
    cut_rows: int = 50_000
    keep_cuts: str = "never"
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
        self._probs = LeafProbabilities(self.model, self.batch_size, self.world)
        check_positive(
            max_leaves=self.max_leaves,
            intermediate_every=self.intermediate_every,
            splits_at_once=self.splits_at_once,
            min_rows=self.min_rows,
            views=self.views,
            cut_neighbours=self.cut_neighbours,
            cut_rows=self.cut_rows,
            batch_size=self.batch_size,
        )
        for name in ("epochs", *(f"{kind}_epochs" for kind in KINDS)):
            epochs = getattr(self, name)
            if not isinstance(epochs, Integral | None):
                raise TypeError(f"{name} must be a whole number, found {epochs!r}")
            if epochs is not None and epochs < 0:
                raise ValueError(f"{name} must be at least 0, found {epochs}; 0 skips the stage")
        if self.min_share is None:
            self.min_share = min(0.01, 0.2 / self.max_leaves)
        for name in ("min_share", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        if not 0 <= self.cut_share <= 0.5:
            raise ValueError(f"cut_share must be between 0 and 0.5, found {self.cut_share}")
        check_cut_on("cut_on", self.cut_on)
        if self.keep_cuts not in LEARNING:
            raise ValueError(f"keep_cuts must be one of {list(LEARNING)}, found {self.keep_cuts!r}")
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {list(POLICIES)} or a function, found {self.policy!r}")
        if not isinstance(self.policy, str) and not callable(self.policy):
            raise TypeError(f"policy must be a name or a function, found {self.policy!r}")

    def stages(self, data: Indexable, *, again: Tensor | None = None) -> Iterator[Stage]:
        """Yield stages until the tree is complete; train each stage before requesting the next stage.

        Args:
            data: all observations, `(n, *model.inputs)`: a tensor, or anything else that `Rows` takes, such as a memory
                map of 8-bit images; read a batch at a time.
            again: the rows of the last stage that was handed out, to yield this stage once more before any other
                stage. The stage was interrupted, and the model is in the state of the interruption.

        Raises:
            TypeError: if the data have a wrong dtype, or a custom policy returns no tensor.
            ValueError: if there are no rows, the data are not what the model takes, or a custom policy does not give a
                score to each leaf. With `again`, if no stage was handed out or `again` cannot be the rows of a stage.
        """
        rows = self.model.rows(data)
        # Parameters that are frozen here stay frozen: the caller wants them so.
        self._frozen = frozenset(name for name, weight in self.model.named_parameters() if not weight.requires_grad)
        try:
            if again is not None:
                yield self._again(again, len(rows))
            while (stage := self._next(rows)) is not None:
                # Listed before it trains, so that a state saved at the end of the loop's body counts the stage as done.
                record = {
                    "kind": stage.kind,
                    "splits": list(stage.splits),
                    "epochs": stage.epochs,
                    "above": stage.above,
                }
                self.history.append(record)
                if stage.epochs:
                    yield stage
        finally:  # also where the caller leaves the loop early
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name not in self._frozen)

    def _again(self, rows: Tensor, n: int) -> Stage:
        """Build the last stage in the history once more, on `rows`."""
        if not self.history:
            raise ValueError("no stage was handed out yet, so none can be handed out again; leave out again=")
        if rows.dtype != torch.int64 or rows.ndim != 1 or not ((rows >= 0) & (rows < n)).all():
            raise ValueError(
                f"again= takes the rows of the last stage, int64 numbers below {n}; found {rows.dtype} of shape "
                f"{tuple(rows.shape)}"
            )
        last = self.history.pop()  # meanwhile, as a new stage counts the stages before it
        stage = self._stage(last["kind"], rows, last["splits"], last["above"])
        self.history.append(last)
        return stage

    def _next(self, data: Rows) -> Stage | None:
        everything = torch.arange(len(data))
        if not self.history:
            for node in self.model.topology.routed:
                self._cut(node, data, (self._probs.reach(data, node)[:, 0] > 0.5).nonzero().squeeze(1))
            return self._stage("initial", everything)
        last = self.history[-1]
        if last["kind"] == "settle":
            return self._subtree_stage("subtree", data, last["splits"], last["above"])
        probs = self._pruned(data)
        if last["kind"] == "final":
            return None
        since, splits = self._splits_so_far()
        if last["kind"] == "subtree" and since >= self.intermediate_every:
            return self._stage("intermediate", everything)
        missing = min(self.max_leaves - self._effective(probs), 2 * self.max_leaves - splits, self.splits_at_once)
        leaves = self._leaves_to_split(data, probs, missing) if missing > 0 else ()
        if not leaves:
            return self._stage("final", everything)
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, len(self.history), -1))
        preferred = torch.tensor(self.model.topology.leaves)[probs.argmax(1)]
        for leaf in leaves:
            self.model.split(leaf, warm_start=self.warm_start, generator=generator)
            # Rows that prefer another leaf would blur the cut.
            self._cut(leaf, data, (preferred == leaf).nonzero().squeeze(1))
        return self._subtree_stage("settle", data, leaves, self._membership(probs))

    def _splits_so_far(self) -> tuple[int, int]:
        """Return the number of splits since the last intermediate stage, and of all splits."""
        since = splits = 0
        for entry in self.history:
            made = len(entry["splits"]) if entry["kind"] == "subtree" else 0
            since, splits = 0 if entry["kind"] == "intermediate" else since + made, splits + made
        return since, splits

    def _subtree_stage(self, kind: str, data: Rows, splits: Sequence[int], above: float) -> Stage:
        """Build a stage on the rows that reach one of some nodes with a probability of at least `above`."""
        reached = (self._probs.reach(data, *splits) >= above).any(1)
        return self._stage(kind, reached.nonzero().squeeze(1), splits, above)

    def _stage(self, kind: str, rows: Tensor, splits: Sequence[int] = (), above: float = 0.0) -> Stage:
        named: int | None = getattr(self, f"{kind}_epochs")
        epochs = self.epochs if named is None else named
        annealing = self.initial_annealing if kind == "initial" else self.annealing
        if kind == "final":
            annealing = self.final_annealing or KLAnnealing(step=max(0.01, 1 / max(1, epochs - 1)))
        done = len(self.history)
        settings = (tuple(splits), above, self.threshold, self.seed, self._frozen | self._kept(kind))
        return Stage(self.model, kind, done, epochs, rows, annealing, *settings)

    def _kept(self, kind: str) -> frozenset[str]:
        """Return the names of the parameters that decide about clusters, if these are kept in a stage of that kind."""
        if kind in LEARNING[self.keep_cuts]:
            return frozenset()
        parts = ("encoder.", "bottom_up.", "banks.posterior_routers.")
        return frozenset(name for name, _ in self.model.named_parameters() if name.startswith(parts))

    # --- decisions ----------------------------------------------------------------------------------------

    def members(self, probs: Tensor) -> Tensor:
        """Mark the rows of each leaf: `P(leaf | x) >= min(1 / effective leaves, 1/2)`; `(n, K)` of booleans."""
        return probs >= self._membership(probs)

    def _membership(self, probs: Tensor) -> float:
        return min(1 / max(1, self._effective(probs)), 0.5)

    def _effective(self, probs: Tensor) -> int:
        return int((self._preferring(probs) >= self._least(len(probs))).sum())

    def _least(self, rows: int) -> float:
        """Return the least number of rows of a leaf."""
        return cast(float, self.min_share) * rows

    @staticmethod
    def _preferring(probs: Tensor) -> Tensor:
        """Count the rows that prefer each leaf to all others."""
        return probs.argmax(1).bincount(minlength=probs.shape[1])

    def _leaves_to_split(self, data: Rows, probs: Tensor, most: int) -> list[int]:
        """Return the leaf with the best score among leaves that may be split, and the next best of the same depth.

        A leaf needs enough rows for two, and room below.
        """
        tree, deepest = self.model.topology, len(self.model.bottom_up)
        policy = POLICIES[self.policy] if isinstance(self.policy, str) else self.policy
        room = torch.tensor([tree.depth(leaf) < deepest for leaf in tree.leaves])
        least = max(self.min_rows, 2 * self._least(len(data)))
        losses = self.policy not in ("largest", "highest_entropy")
        survey = Survey(self.model, self.batch_size, (self.seed, len(self.history), -2), self.world)
        statistics = survey.statistics(data, probs, self.members(probs), losses=losses)
        best = best_leaves(policy, statistics, tree.leaves, room & (statistics.rows >= least))
        return [leaf for leaf in best if tree.depth(leaf) == tree.depth(best[0])][:most]

    def _cut(self, node: int, data: Rows, rows: Tensor) -> None:
        """Start a new posterior router as a cut where its rows are sparse, so that both children get rows."""
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, len(self.history), -3))
        picked = rows[torch.randperm(len(rows), generator=generator)[: self.cut_rows]]
        if len(picked) > 1 and self.world.first:
            cut_router(
                self.model,
                node,
                data.select(picked),
                on=self.cut_on,
                augment=self.augment,
                views=self.views,
                neighbours=self.cut_neighbours,
                min_share=min(0.5, max(self.cut_share, self._least(len(data)) / len(rows))),
                batch_size=self.batch_size,
                generator=generator,
            )
        self.world.follow_first(self.model)

    def _pruned(self, data: Rows) -> Tensor:
        """Remove, one by one, the leaf that the fewest rows prefer, while their share is below `min_share`.

        Returns the probabilities of the leaves that are left.
        """
        probs = self._probs(data)
        while len(self.model.topology.leaves) > 1:
            counts = self._preferring(probs)
            smallest = int(counts.argmin())
            if counts[smallest] >= self._least(len(data)):
                break
            self.model.prune(self.model.topology.leaves[smallest])
            probs = self._probs(data)
        return probs

    # --- saving -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, plain JSON values, that a resumed growth needs besides the model and the same arguments.

        Save state and model after a stage was trained, at the end of the loop's body: the last stage that was handed
        out counts as done.
        """
        return {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last stage that `state` lists.

        Raises:
            KeyError: if the state, or a stage in it, lacks an entry; or if the model's tree was not split there.
            TypeError: if the stages are not a list of mappings.
            ValueError: if a stage is of an unknown kind, or lists splits where it should not.
        """
        self.history = check_history(state, self.model.topology.routed)


def check_history(state: Mapping[str, Any], routed: Collection[int]) -> list[dict[str, Any]]:
    """Return the stages in a state, after a check that these stages can have made the tree.

    Args:
        state: a result of `TreeGrowth.state_dict`.
        routed: nodes of the tree that have children.

    Raises:
        KeyError: if the state, or a stage in it, lacks an entry; or if the tree was not split there.
        TypeError: if the stages are not a list of mappings.
        ValueError: if a stage is of an unknown kind, or lists splits where it should not.
    """
    if not isinstance(state, Mapping) or "history" not in state:
        raise KeyError(f"expected what state_dict returned, with the entry 'history', found {state!r}")
    history = state["history"]
    if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
        raise TypeError(f"history must be a list of stages, each a mapping, found {history!r}")
    for entry in history:
        missing = [name for name in ("kind", "splits", "epochs", "above") if name not in entry]
        if missing:
            raise KeyError(f"a stage in history lacks {missing}, found {dict(entry)}")
        if entry["kind"] not in KINDS:
            raise ValueError(f"a stage is one of {list(KINDS)}, found {entry['kind']!r}")
        splits = entry["splits"]
        if not isinstance(splits, list) or bool(splits) != (entry["kind"] in ("settle", "subtree")):
            raise ValueError(f"a {entry['kind']} stage lists the nodes that were split, others []; found {splits!r}")
        # Pruning may have removed nodes that were split before.
        lost = [node for node in splits if node not in routed] if entry is history[-1] else []
        if lost:
            raise KeyError(
                f"nodes {lost} were split in this history, but not in the model's tree; load the model that was saved "
                "along with the history"
            )
    return [dict(entry) for entry in history]

"""Models of unlearning_benchmark.py: their training, and how they forget."""

from __future__ import annotations

import argparse
import copy
import functools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from classify_features import Learn, Trees, classifier, network
from rivals import (
    Features,
    NearestNeighbours,
    Plain,
    RACDelete,
    Refitted,
    Rival,
    SemiParametric,
    TrainedRival,
    VectorFeatures,
    boosting,
    fit,
    logistic,
)
from sisa import SISA
from torch import Tensor, nn
from tqdm import tqdm
from train_munkey import train
from unlearning.task import Task

from munkey import DurableStore, KeyMemoryTransformer, pathway_accuracies, posthoc
from munkey.posthoc.privacy import poisson_batches, private_backward
from munkey.presets import patch_for
from munkey.readout import Mixture
from treediff.augment import Augment


class Augmented(nn.Module):
    """A classifier that moves and mirrors its training images, so that methods after the fact do so, too."""

    def __init__(self, model: nn.Module, augment: Augment | None, seed: int) -> None:
        super().__init__()
        self.model, self.augment, self.generator = model, augment, torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        if self.training and self.augment is not None:
            x = self.augment(x, generator=self.generator)
        return self.model(x)


def setting(pair: str) -> tuple[str, Any]:
    """A name and its value: JSON, or a word."""
    name, _, value = pair.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def train_private(
    model: KeyMemoryTransformer,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    planned: int,
    noise: float,
    *,
    epochs: int,
    augment: Augment | None,
    seed: int,
) -> None:
    """Training with noise on the gradients of shared weights; only the draws depend on the number of instances."""
    optimizers = (
        torch.optim.AdamW(model.parameter_groups(0.05), lr=2e-3),
        torch.optim.SparseAdam([model.memory.store.values], lr=1e-2),
    )
    model.attach(optimizers[1])
    rate, steps, generator = 128 / planned, epochs * planned // 128, torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 2e-3, total_steps=steps + 1)
    model.train()
    drawn = poisson_batches(len(ids), sample_rate=rate, steps=steps, generator=generator)
    for rows in tqdm(drawn, total=steps, desc="private", mininterval=1.0):
        own = ids[rows]
        x = images[own] if augment is None else augment(images[own], generator=generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        options = {"clip": 1.0, "noise_multiplier": noise, "expected_batch_size": 128.0}
        private_backward(model, x, labels[own], ids=own, generator=generator, **options)
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
    model.eval()


class Bench:
    """All models of one seed, trained when they are first used."""

    def __init__(
        self,
        task: Task,
        seed: int,
        args: argparse.Namespace,
        tuned: dict[str, dict[str, float]],
        sets: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.task, self.seed, self.args, self.tuned = task, seed, args, tuned
        self.gone, self.others = task.forget_set(seed)
        self.all = torch.arange(len(task.images))
        if sets is not None:  # all instances, and the forget set
            self.all, self.gone = sets
        self.stay = self.all[~torch.isin(self.all, self.gone)]
        self.fitted = functools.cache(self._fitted)

    def _fitted(self, name: str, without: int) -> nn.Module:
        """A model of all instances, or the first or second model, of other seeds, trained without the forget set."""
        task, args, seed = self.task, self.args, self.seed + 100 * without
        ids = self.stay if without else self.all
        if name.startswith("munkey"):
            settings = dict(setting(pair) for pair in name.split()[1:])
            return self._munkey(settings, ids, seed if settings.get("mode") == "paper" else self.seed)
        if name == "sisa":
            epochs = max(1, round(2 * args.epochs / 4))  # three slices: as many steps in all as one model takes
            learn = functools.partial(fit, augment=task.augment, epochs=epochs)
            return SISA(
                self._plain, lambda m, own, s: learn(m, task.images, task.labels, own, seed=s), ids, seed=self.seed
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: Rival = {
                "plain": lambda: self._plain(seed),
                "rac_delete": lambda: RACDelete(self._plain(seed), task.encoder, task.classes),
                "semi_parametric": lambda: SemiParametric(self._features(), task.classes),
                "nearest_neighbours": lambda: NearestNeighbours(task.encoder, task.classes),
                "logistic_regression": lambda: Refitted(logistic(3e-4), task.classes),
                "boosted_trees": lambda: Refitted(boosting(seed), task.classes),
            }[name]()
        model.remember(ids, task.images[ids], task.labels[ids], keys=task.keys[ids])
        if isinstance(model, TrainedRival):
            fit(model, task.images, task.labels, ids, epochs=args.epochs, augment=task.augment, seed=seed)
        return model

    def _features(self) -> Features | VectorFeatures:
        shape = self.task.shape
        return Features(shape, patch_for(*shape[1:])) if len(shape) > 1 else VectorFeatures(*shape)

    def _plain(self, seed: int) -> Plain:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Plain(self._features(), self.task.classes)

    def _munkey(self, settings: dict[str, Any], ids: Tensor, seed: int) -> KeyMemoryTransformer:
        """In exact mode half of the rows are permanent, none of them forgotten; the rest is stored later."""
        task, noise, paper = self.task, settings.pop("noise", None), settings.get("mode") == "paper"
        draw = self.all[torch.randperm(len(self.all), generator=torch.Generator().manual_seed(7))]
        for_good = draw[~torch.isin(draw, self.gone)][: len(draw) // 2]
        if task.permanent is not None:
            for_good = task.permanent[torch.isin(task.permanent, self.all)]
        if len(task.shape) == 1 and not settings.keys() - {"learn"}:
            order = torch.cat([for_good, ids[~torch.isin(ids, for_good)]])
            learn: Learn = functools.partial(network, epochs=self.args.epochs, seed=seed)
            if settings.get("learn") == "trees":
                learn = functools.partial(Trees, seed=seed)
            return classifier(task.images, task.labels, order, for_good, task.classes, learn=learn)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._untrained(settings)
        seen, held = (ids, ids[:0]) if paper else for_good.tensor_split([len(for_good) - len(for_good) // 5])
        if not isinstance(model.readout, Mixture):
            seen, held = torch.cat([seen, held]), held[:0]
        options = {"epochs": self.args.epochs, "augment": task.augment, "seed": seed}
        self._remember(model, seen, permanent=not paper)
        if noise is not None:
            train_private(model, task.images, task.labels, seen, len(self.all), noise, **options)
        else:
            train(model, task.images, task.labels, seen, batch_size=128, **options)
        if len(held):
            self._remember(model, held, permanent=True)
            model.fit_readout(task.images[held], task.labels[held], ids=held, keys=task.keys[held])
        self._remember(model, ids[~torch.isin(ids, torch.cat([seen, held]))], permanent=False)
        return model

    def _untrained(self, settings: dict[str, Any]) -> KeyMemoryTransformer:
        task, about = self.task, {"classes": self.task.classes, "key_encoder": self.task.encoder, "sparse": True}
        if len(task.shape) == 1:
            return KeyMemoryTransformer.for_vectors(features=task.shape[0], **about, **settings)
        channels, height, width = task.shape
        return KeyMemoryTransformer.for_images(channels=channels, size=(height, width), **about, **settings)

    def _remember(self, model: KeyMemoryTransformer, ids: Tensor, *, permanent: bool) -> None:
        task = self.task
        model.remember(ids, task.images[ids], task.labels[ids], keys=task.keys[ids], permanent=permanent)

    def row(self, method: str) -> dict[str, Any]:
        """Measurements of a method: a name as in `forgotten`, or a kind of model before, or retrained without."""
        name, _, what = method.partition(": ")
        if not what:
            model, seconds = self.forgotten(name)
            found = self.measured(model, seconds)
            if isinstance(model, KeyMemoryTransformer):
                found["seconds in a file"] = self.seconds_in_a_file(name)
                found["one"] = self.one(name)
                found["equal to its oracle"] = equal(model, self.fitted(name, 1))
            return found
        start = time.perf_counter()
        model = self.fitted(name, ("before", "retrained", "retrained again").index(what))
        return self.measured(model, time.perf_counter() - start)

    def forgotten(self, name: str) -> tuple[nn.Module, float]:
        """A model that forgot, and the seconds of forgetting."""
        if name in self.tuned:
            return self.unlearned(name, self.tuned[name])
        model = copy.deepcopy(self.fitted(name, 0))
        if isinstance(model, KeyMemoryTransformer):
            x, _, keys = (part[:1] for part in self.task.test)
            with torch.no_grad():  # what is derived from rows has to be there, and to follow
                self.task.answers(model.eval(), x, keys)
            model.memory.store.digest()  # after training it takes a pass over the store; see docs/results/munkey.md
        start = time.perf_counter()
        model.forget(self.gone)  # type: ignore[operator]
        return model, time.perf_counter() - start

    def one(self, name: str) -> dict[str, float]:
        """Milliseconds and bytes to forget one instance, and milliseconds of the first answer for 256 after it."""
        model = copy.deepcopy(self.fitted(name, 0))
        assert isinstance(model, KeyMemoryTransformer)
        x, _, keys = (part[:256] for part in self.task.test)
        with torch.no_grad():
            self.task.answers(model.eval(), x, keys)
        model.memory.store.digest()
        model.forget(self.gone[:1])  # the first call builds what later calls use
        start = time.perf_counter()
        receipt = model.forget(self.gone[1:2])
        forgotten = time.perf_counter()
        with torch.no_grad():
            self.task.answers(model, x, keys)
        answered = time.perf_counter()
        return {
            "milliseconds": 1000 * (forgotten - start),
            "bytes": receipt.bytes,
            "answer after": 1000 * (answered - forgotten),
        }

    def seconds_in_a_file(self, name: str) -> float:
        """Seconds to forget from a memory in a file, until the medium holds no forgotten row."""
        model = self.fitted(name, 0)
        assert isinstance(model, KeyMemoryTransformer)
        with (
            tempfile.TemporaryDirectory() as folder,
            DurableStore.copy_of(model.memory.store, f"{folder}/store") as store,
        ):
            store.digest()
            start = time.perf_counter()
            store.forget(self.gone)
            return time.perf_counter() - start

    def unlearned(self, name: str, options: dict[str, float]) -> tuple[nn.Module, float]:
        """A method after the fact, with some settings."""
        task, settings = self.task, dict(options)
        model = Augmented(copy.deepcopy(self.fitted("plain", 0)), task.augment, self.seed)
        sets = [(task.images[ids], task.labels[ids]) for ids in (self.stay, self.gone)]
        passes = max(1, round(self.args.effort * self.args.epochs))
        steps = passes * -(-len(sets[name == "neg_grad"][0]) // 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pop("lr", 0.0), weight_decay=0.0)
        start = time.perf_counter()
        method: Callable[..., None] = getattr(posthoc, name)
        method(model, *sets, optimizer=optimizer, steps=steps, **settings)
        return model, time.perf_counter() - start

    def measured(self, model: nn.Module, seconds: float) -> dict[str, Any]:
        """Measurements of the predictions of a model, and of its weights."""
        task, sets = self.task, (self.gone, self.stay, self.others)
        found = {**task.measured(model, *sets), "seconds": seconds}
        found["relearned"] = task.relearned(model, self.gone, self.others, steps=self.args.relearn)
        if isinstance(model, KeyMemoryTransformer) and model.has_transformer:
            found["inside"] = task.inside(model, *sets)
            found["input alone"] = task.outcome(task.logits(model, *sets[:2], use_memory=False), sets[2])
            rows = self.gone[:1000]
            accuracies = pathway_accuracies(model, task.images[rows], task.labels[rows], keys=task.keys[rows])
            found["pathways"] = asdict(accuracies)
        return found


def equal(model: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same weights and the same memory, bit by bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

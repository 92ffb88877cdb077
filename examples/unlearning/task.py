"""Data of unlearning_benchmark.py: images or features, keys, forget sets, and what is measured."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from classify_features import named_permanent, scores
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train_munkey import augment_of, encoder_of

from munkey import Identity, KeyMemoryTransformer
from munkey.audit import (
    Attack,
    area_under_curve,
    attack,
    classifier_scores,
    confidence_features,
    forget_sets,
    inside_attacks,
    inside_view,
    membership_scores,
    relearning_curve,
)
from treediff.core.checkpoint import read_checkpoint, save_checkpoint
from treediff.data import load_dataset

Split = dict[str, tuple[Tensor, Tensor]]  # logits and labels, by split


class Task:
    """Images, keys, and one forget set for each seed."""

    def __init__(self, args: argparse.Namespace, *, holdout: int = 0) -> None:
        data = load_dataset(args.data, size=args.size)
        if data.train_labels is None or data.test_labels is None:
            raise SystemExit(f"{args.data}: a classifier needs labels for the training and the test images, found none")
        self.name, self.kind = data.name, args.forget
        images, test_images, self.shape = data.train_images[:], data.test_images[:], tuple(data.train_images.shape[1:])
        self.encoder = encoder_of(args, self.shape) if len(self.shape) > 1 else Identity(self.shape[0])
        keys, queries = self._keys(args, images, test_images)
        end = len(images) - holdout
        self.images, self.labels, self.keys = images[:end], data.train_labels[:end], keys[:end]
        self.permanent = named_permanent(args.data)  # an encoder was fitted to these rows, which cannot be forgotten
        self.test: tuple[Tensor, ...] = (test_images, data.test_labels, queries)
        if holdout:
            self.test = (images[end:], data.train_labels[end:], keys[end:])
        self.classes = 1 + int(torch.cat([self.labels, self.test[1]]).max())
        self.augment = augment_of(self.shape[0]) if len(self.shape) > 1 else None

    def _keys(self, args: argparse.Namespace, *splits: Tensor) -> list[Tensor]:
        """Keys of both splits, computed once for each data set and encoder."""
        path = args.out / f"keys-{self.name}-{self.encoder.fingerprint()[:16]}.safetensors"
        if not path.exists():
            parts = [[self.encoder.keys(x) for x in tqdm(s.split(250), desc="keys", mininterval=1)] for s in splits]
            save_checkpoint(path, {"keys": [F.normalize(torch.cat(part), dim=1) for part in parts]})
        found: list[Tensor] = read_checkpoint(path)["keys"]
        return found

    def forget_set(self, seed: int) -> tuple[Tensor, Tensor]:
        """Training rows to forget, without permanent ones, and test rows of the same kind."""
        gone, others = self._of_kind(seed)
        return gone if self.permanent is None else gone[~torch.isin(gone, self.permanent)], others

    def _of_kind(self, seed: int) -> tuple[Tensor, Tensor]:
        kind, _, amount = self.kind.partition(":")
        generator = torch.Generator().manual_seed(1000 + seed)
        row = int(torch.randint(len(self.labels), (1,), generator=generator))
        everything = torch.arange(len(self.test[1]))
        if kind == "class":
            return forget_sets.of_class(self.labels, int(self.labels[row])), everything[
                self.test[1] == self.labels[row]
            ]
        count, of_test = (round(float(amount) * len(labels)) for labels in (self.labels, self.test[1]))
        if kind == "cluster":
            near = (self.test[2] @ self.keys[row]).topk(of_test).indices
            return forget_sets.cluster(self.keys, row, count), near
        if kind == "low-density":
            return forget_sets.low_density(self.keys, count), forget_sets.low_density(self.test[2], of_test)
        return forget_sets.at_random(len(self.labels), count, generator=generator), everything

    @torch.no_grad()
    def logits(self, model: nn.Module, gone: Tensor, stay: Tensor, **options: bool) -> Split:
        """Logits and labels of test rows, of as many rows that stay, and of forgotten rows."""
        splits: dict[str, tuple[Tensor, ...]] = {"test": self.test}
        for name, ids in (("retain", stay[: len(self.test[1])]), ("forget", gone)):
            splits[name] = (self.images[ids], self.labels[ids], self.keys[ids])
        model.eval()
        return {
            name: (
                torch.cat(
                    [self.answers(model, a, k, **options) for a, k in zip(x.split(256), keys.split(256), strict=True)]
                ),
                labels,
            )
            for name, (x, labels, keys) in splits.items()
        }

    def outcome(self, said: Split, others: Tensor) -> dict[str, float]:
        """Accuracies, and the attack by loss on forgotten rows among test rows of the same kind, in percent."""
        found = {name: 100 * float((logits.argmax(1) == y).double().mean()) for name, (logits, y) in said.items()}
        ours, theirs = (membership_scores(*said[name])["loss"] for name in ("forget", "test"))
        return {**found, "attack": 100 * area_under_curve(ours, theirs[others])}

    @torch.no_grad()
    def measured(self, model: nn.Module, gone: Tensor, stay: Tensor, others: Tensor) -> dict[str, Any]:
        """The outcome, what the predictions are worth, and all attacks from outside."""
        said = self.logits(model, gone, stay)
        ours, theirs = (membership_scores(*said[name]) for name in ("forget", "test"))
        pairs: dict[str, tuple[Tensor, ...]] = {name: (ours[name], theirs[name][others]) for name in ours}
        about = {name: confidence_features(*each) for name, each in said.items()}
        odd, even = others[1::2], others[::2]
        pairs["classifier"] = classifier_scores(
            about["retain"], about["test"][odd], about["forget"], about["test"][even]
        )
        attacks = {name: attack(a, b, resamples=200) for name, (a, b) in pairs.items()}
        quality = {name: value for name, value in scores(*said["test"]).items() if name != "accuracy"}
        worth = {**quality, "milliseconds": self.milliseconds(model)}
        return {**self.outcome(said, others), **worth, "attacks": summary(attacks)}

    def answers(self, model: nn.Module, x: Tensor, keys: Tensor, **options: bool) -> Tensor:
        """Logits; a model with an encoder of its own computes its keys. Options are those of a call."""
        own = isinstance(model, KeyMemoryTransformer) and model.key_encoder is not self.encoder
        found: Tensor = model(x, keys=None if own else keys, **options)
        return found.float()

    def milliseconds(self, model: nn.Module) -> float:
        """Median milliseconds to answer for 256 test rows, whose keys are at hand if the model takes these."""
        x, _, keys = (part[:256] for part in self.test)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            self.answers(model, x, keys)
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds)

    def relearned(self, model: nn.Module, gone: Tensor, others: Tensor, *, count: int = 256, steps: int = 20) -> float:
        """Mean loss over steps, in nats, of learning fresh test images minus the loss of relearning forgotten images.

        Both sets are of the same kind and equally large. A model without weights learns nothing."""
        x, y, keys = self.test
        losses = []
        for rows, sets in ((others[:count], (x, y, keys)), (gone[:count], (self.images, self.labels, self.keys))):
            own, (inputs, labels, queries) = copy.deepcopy(model).eval(), (part[rows] for part in sets)
            said = self._by_row(own, inputs, queries)
            if not said(torch.arange(1)).requires_grad:
                return 0.0
            optimizer = torch.optim.AdamW(own.parameters(), lr=3e-4, weight_decay=0.0)
            if isinstance(own, KeyMemoryTransformer):
                own.attach(optimizer)
            curve = relearning_curve(said, torch.arange(len(labels)), labels, optimizer=optimizer, steps=steps)
            losses.append(float(curve[1:].mean()))
        return losses[0] - losses[1]

    def _by_row(self, model: nn.Module, x: Tensor, keys: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: self.answers(model, x[rows], keys[rows])

    def inside(self, model: KeyMemoryTransformer, gone: Tensor, stay: Tensor, others: Tensor) -> dict[str, list[float]]:
        """Attacks on the weights, with 1,000 images of each set at most."""
        x, y, _ = self.test
        sets = [(self.images[gone], self.labels[gone]), (x[others[::2]], y[others[::2]])]
        sets += [(self.images[stay], self.labels[stay]), (x[others[1::2]], y[others[1::2]])]
        views = [inside_view(model, images[:1000], labels[:1000]) for images, labels in sets]
        return summary(inside_attacks(*views, resamples=200))


def summary(attacks: dict[str, Attack]) -> dict[str, list[float]]:
    """Area under the curve with its interval, and true positives at 1 % false positives, in percent."""
    return {name: [100 * x for x in (a.auc, *a.auc_interval, a.tpr)] for name, a in attacks.items()}

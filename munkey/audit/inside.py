"""Attacks with access to more than outputs: weights beside tokens of the attacker's choice, features, gradients.

Deleting a key deletes an instance from the memory. These attacks measure what the shared weights kept of the instance:
the weights are evaluated beside the null token, the mean of all tokens, and the token of a random other instance. A
null token that was never trained proves nothing, so the worst attack counts.

Letters: `n` instances, `W` width of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from munkey.audit.membership import Attack, attack, membership_scores
from munkey.audit.references import classifier_scores, confidence_features
from munkey.memory import KeyValueMemory
from munkey.model import KeyMemoryTransformer
from munkey.store.store import KeyStore
from munkey.task import Classification, Task
from treediff.core.modes import evaluating

__all__ = ["InsideView", "inside_attacks", "inside_view", "worst_attack"]


@dataclass(frozen=True, eq=False)
class InsideView:
    """Results of the shared weights for some instances, without the rows that the memory retrieves.

    Attributes:
        logits: `(n, classes)` by the token beside the input: 'null', 'mean', 'random'.
        features: `(n, W)` inputs of the head, beside the null token.
        gradients: `(n,)` length of the gradient of each instance's loss by all weights of the network, beside the null
            token.
        labels: `(n, ...)`.
        task: of the classifier.
    """

    logits: dict[str, Tensor]
    features: Tensor
    gradients: Tensor
    labels: Tensor
    task: Task


@torch.no_grad()
def inside_view(
    model: KeyMemoryTransformer,
    x: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> InsideView:
    """Evaluate the shared weights on instances, in eval mode.

    Args:
        model: the classifier; its memory gives the mean token and the random tokens. With an empty memory, all of these
            are the null token.
        x: `(n, ...)` inputs.
        labels: `(n, ...)`, as the task defines them.
        batch_size: number of instances in one pass.
        generator: draws the random tokens; seed 0 if not given.

    Raises:
        ValueError: if there is not one label for each input.
    """
    labels = model.task.check(labels, len(x)).to(x.device)
    generator = generator or torch.Generator(x.device).manual_seed(0)
    memory, network = model.memory, model.exemplar_readout.network
    rows = _in_order(memory.store)
    mean = memory.read(rows).double().mean(0).to(memory.null.dtype) if len(rows) else memory.null
    parts: dict[str, list[Tensor]] = {name: [] for name in ("null", "mean", "random", "features", "gradients")}
    with evaluating(model):
        for own in torch.arange(len(x), device=x.device).split(batch_size):
            inputs, null = network.tokens(x[own]), memory.null.expand(len(own), 1, -1)
            others = _random_tokens(memory, rows, len(own), generator)
            for name, tokens in (("null", null), ("mean", mean.expand_as(null)), ("random", others)):
                parts[name].append(network(inputs, tokens).squeeze(1))
            parts["features"].append(network.features(inputs, null).squeeze(1))
            parts["gradients"].append(_gradient_norms(model, x[own], labels[own]))
    whole = {name: torch.cat(found) for name, found in parts.items()}
    features, gradients = whole.pop("features"), whole.pop("gradients")
    return InsideView(whole, features, gradients, labels, model.task)


def inside_attacks(
    forgotten: InsideView,
    others: InsideView,
    known_members: InsideView,
    known_others: InsideView,
    *,
    fpr: float = 0.01,
    resamples: int = 1000,
    generator: torch.Generator | None = None,
) -> dict[str, Attack]:
    """Run all attacks from inside, by name; compare each with the same attack on a retrained model (oracle).

    The attacks are, for each token, the four scores of `membership_scores` and a classifier on confidences; then a
    classifier on features, and the length of the gradient. Classifiers are trained on the known instances.

    Args:
        forgotten: instances whose membership is attacked.
        others: instances that never were members, of the same kind.
        known_members: instances that the attacker knows to be members, such as retained instances.
        known_others: instances that the attacker knows to be no members; none of `others`.
        fpr: see `attack`.
        resamples: see `attack`.
        generator: see `attack`.
    """
    pairs: dict[str, tuple[Tensor, ...]] = {}
    views = (known_members, known_others, forgotten, others)
    for token in forgotten.logits:
        ours, theirs = (_scores(view, token) for view in (forgotten, others))
        pairs |= {f"{token}, {name}": (ours[name], theirs[name]) for name in ours}
        pairs[f"{token}, classifier"] = classifier_scores(*(_confidence(view, token) for view in views))
    pairs["features"] = classifier_scores(*(view.features for view in views))
    pairs["gradients"] = (-forgotten.gradients, -others.gradients)
    return {
        name: attack(ours, theirs, fpr=fpr, resamples=resamples, generator=generator)
        for name, (ours, theirs) in pairs.items()
    }


def _scores(view: InsideView, token: str) -> dict[str, Tensor]:
    """Return scores of membership: four for classes, the loss for any other task."""
    outputs = view.logits[token]
    if isinstance(view.task, Classification):
        return membership_scores(outputs, view.labels)
    return {"loss": -view.task.losses(outputs, view.labels).double()}


def _confidence(view: InsideView, token: str) -> Tensor:
    """Return the features `(n, ...)` for a classifier of members."""
    outputs = view.logits[token]
    if isinstance(view.task, Classification):
        return confidence_features(outputs, view.labels)
    return torch.cat([outputs.double(), view.task.losses(outputs, view.labels).double()[:, None]], 1)


def worst_attack(found: Mapping[str, Attack], oracle: Mapping[str, Attack]) -> str:
    """Return the name of the attack whose area under the curve is farthest from the oracle's, in either direction.

    Args:
        found: attacks on a model after forgetting.
        oracle: the same attacks on a retrained model.

    Raises:
        ValueError: if the attacks are not the same, or there are none.
    """
    if found.keys() != oracle.keys() or not found:
        raise ValueError(f"expected the same attacks on both, found {sorted(found)} and {sorted(oracle)}")
    return max(found, key=lambda name: abs(found[name].auc - oracle[name].auc))


def _in_order(store: KeyStore) -> Tensor:
    """Return the rows by id and view, so that nothing depends on their positions."""
    return store.order()


def _random_tokens(memory: KeyValueMemory, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if not len(rows):
        return memory.null.expand(count, 1, -1)
    return memory.read(rows[torch.randint(len(rows), (count, 1), generator=generator, device=rows.device)])


def _gradient_norms(model: KeyMemoryTransformer, x: Tensor, labels: Tensor) -> Tensor:
    network = model.exemplar_readout.network
    weights = {name: weight.detach() for name, weight in network.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(_Beside(network, model.memory.null.detach()), weights, (x[None],))
        return model.task.losses(logits, label[None])[0]

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no rule for a batch of gradients
        slopes = vmap(grad(loss), in_dims=(None, 0, 0))({f"network.{n}": w for n, w in weights.items()}, x, labels)
    return torch.stack([slope.flatten(1).square().sum(1) for slope in slopes.values()]).sum(0).sqrt()


class _Beside(torch.nn.Module):
    """A network from inputs to logits beside one token."""

    def __init__(self, network: torch.nn.Module, token: Tensor) -> None:
        super().__init__()
        self.network, self.token = network, token

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, n)`."""
        logits: Tensor = self.network(self.network.tokens(x), self.token.expand(len(x), 1, -1))  # type: ignore[operator]
        return logits.squeeze(1)

"""Classifiers that forget by deletion, for comparison with `KeyMemoryTransformer`, and one that does not forget.

    python examples/rivals.py                        # real handwritten digits: each is trained, then forgets a tenth

They are trained and queried as it is: `remember`, `loss`, a call with images, `forget`. All use the same small vision
transformer and the same keys. Copy what you need. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from classify_features import Trees
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from munkey import KeyEncoder, KeyStore, KeyValueMemory, Projection
from munkey.readout.tokens import ImageTokens
from munkey.readout.transformer import TransformerBlock
from treediff.augment import Augment
from treediff.data import load_dataset

Predict = Callable[[Tensor], Tensor]
Fit = Callable[[Tensor, Tensor, int], Predict]


class Features(nn.Module):
    """Features `(B, W)` of images: a class token and the tokens of patches through pre-norm blocks."""

    def __init__(self, shape: tuple[int, ...], patch: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.tokens = ImageTokens((height, breadth), channels, patch, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.width = nn.LayerNorm(width), width

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.start.expand(len(x), 1, -1), self.tokens(x)], 1)
        return self.norm(self.blocks(tokens)[:, 0])


class VectorFeatures(nn.Module):
    """Features `(B, W)` of vectors, such as features of another network or rows of a table: one hidden layer."""

    def __init__(self, inputs: int, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(inputs, elementwise_affine=False), nn.Linear(inputs, width), nn.GELU(), nn.Dropout(0.5)
        )
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Rival(nn.Module):
    """Base of all these classifiers; by default there is nothing to remember."""

    def remember(self, ids: Tensor, x: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> None:
        """Store instances."""

    def forget(self, ids: Tensor) -> None:
        """Delete instances."""


class TrainedRival(Rival, ABC):
    """Base of classifiers that have weights to train."""

    @abstractmethod
    def loss(self, x: Tensor, labels: Tensor, *, ids: Tensor) -> Tensor:
        """Mean loss of instances."""


class Plain(TrainedRival):
    """A network without memory, the input of methods of unlearning after the fact. It deletes nothing."""

    def __init__(self, features: Features | VectorFeatures, classes: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(features.width, classes)

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        return self.head(self.features(x))

    def loss(self, x: Tensor, labels: Tensor, *, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(x), labels)


class NearestNeighbours(Rival):
    """Labels of nearest keys, weighted by similarity. Nothing is trained, so deletion is exact."""

    def __init__(self, encoder: KeyEncoder, classes: int, neighbours: int = 16, temperature: float = 0.1) -> None:
        super().__init__()
        self.memory, self.encoder = KeyValueMemory(KeyStore(encoder.width, 1, scale=0)), encoder
        self.classes, self.neighbours, self.temperature = classes, neighbours, temperature

    def remember(self, ids: Tensor, x: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> None:
        self.memory.remember(ids, self.encoder.keys(x) if keys is None else keys, labels)

    def forget(self, ids: Tensor) -> None:
        self.memory.forget(ids)

    def votes(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Shares `(B, classes)` of rows `(B, k)`; -1 is no row."""
        weights = (scores / self.temperature).masked_fill(rows < 0, -torch.inf).softmax(1).nan_to_num(0)
        labels = self.memory.store.labels[rows.clamp(min=0)]
        return weights.new_zeros(len(rows), self.classes).scatter_add_(1, labels, weights)

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        found = self.memory.neighbours(self.encoder(x) if keys is None else keys, self.neighbours)
        return (self.votes(found.rows, found.scores).float() + 0.01).log()


class RACDelete(TrainedRival):
    """Retrieval-augmented classification (Long et al., arXiv 2202.11233): logits of the image plus logits of the
    retrieved entries, here of the labels of neighbours. An entry can be deleted, but the weights were trained on it."""

    def __init__(self, plain: Plain, encoder: KeyEncoder, classes: int, neighbours: int = 4) -> None:
        super().__init__()
        self.plain, self.nearest = plain, NearestNeighbours(encoder, classes, neighbours)
        self.retrieved = nn.Linear(classes, classes)

    def remember(self, ids: Tensor, x: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> None:
        self.nearest.remember(ids, x, labels, keys=keys)

    def forget(self, ids: Tensor) -> None:
        self.nearest.forget(ids)

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        nearest = self.nearest
        found = nearest.memory.neighbours(nearest.encoder(x) if keys is None else keys, nearest.neighbours)
        return self.plain(x) + self.retrieved(nearest.votes(found.rows, found.scores).float())

    def loss(self, x: Tensor, labels: Tensor, *, ids: Tensor) -> Tensor:
        """Mean loss of instances with their neighbours, where an instance is never its own neighbour."""
        memory = self.nearest.memory
        rows, scores = memory.neighbours_of_rows(memory.store.rows_of(ids), self.nearest.neighbours)
        return F.cross_entropy(self.plain(x) + self.retrieved(self.nearest.votes(rows, scores).float()), labels)


class SemiParametric(TrainedRival):
    """In the manner of deep semi-parametric models (Zheng et al., arXiv 2603.22870): a query is compared with the mean
    features of a sample of each class. A deleted image is never drawn again, but the weights were trained on it."""

    def __init__(
        self, features: Features | VectorFeatures, classes: int, support: int = 128, support_asked: int = 4096
    ) -> None:
        super().__init__()
        self.features, self.classes = features, classes
        self.query, self.key = (nn.Linear(features.width, features.width) for _ in range(2))
        self.support, self.support_asked = support, support_asked
        self.ids, self.images, self.labels = torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)
        self.means: Tensor | None = None

    def remember(self, ids: Tensor, x: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> None:
        parts = ((self.ids, ids), (self.images, x), (self.labels, labels))
        self.ids, self.images, self.labels = (torch.cat([old, new]) if len(old) else new.clone() for old, new in parts)
        self.means = None

    def forget(self, ids: Tensor) -> None:
        stay = ~torch.isin(self.ids, ids)
        self.ids, self.images, self.labels = self.ids[stay], self.images[stay], self.labels[stay]
        self.means = None

    def mean_features(self, rows: Tensor) -> Tensor:
        """Mean features `(classes, W)`; zeros for a class without images."""
        of_class = F.one_hot(self.labels[rows], self.classes).float()
        parts = [self.features(self.images[part]) for part in rows.split(512)]
        return of_class.T @ torch.cat(parts) / of_class.sum(0).clamp(min=1)[:, None]

    def compared(self, x: Tensor, means: Tensor) -> Tensor:
        return self.query(self.features(x)) @ self.key(means).T / self.features.width**0.5

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        if self.means is None:
            drawn = torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(0))[: self.support_asked]
            self.means = self.mean_features(drawn).detach()
        return self.compared(x, self.means)

    def loss(self, x: Tensor, labels: Tensor, *, ids: Tensor) -> Tensor:
        self.means = None
        rows = torch.randint(len(self.ids), (self.support,), generator=self.generator)
        return F.cross_entropy(self.compared(x, self.mean_features(rows)), labels)


def logistic(penalty: float) -> Fit:
    """Logistic regression with an L2 penalty, by L-BFGS to convergence."""

    def fit(x: Tensor, y: Tensor, classes: int) -> Predict:
        mean, spread = x.mean(0), x.std()
        weight = torch.zeros(x.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = F.cross_entropy((x - mean) / spread @ weight + bias, y) + penalty * weight.square().sum()
            found.backward()
            return found

        optimizer.step(loss)
        return lambda q: ((q - mean) / spread @ weight + bias).detach()

    return fit


def boosting(seed: int) -> Fit:
    """Gradient-boosted trees, for tables."""
    return partial(Trees, seed=seed)


class Refitted(Rival):
    """A classifier that is fitted again without what it is to forget: exact, and as slow as fitting."""

    def __init__(self, how: Fit, classes: int) -> None:
        super().__init__()
        self.how, self.classes = how, classes

    def remember(self, ids: Tensor, x: Tensor, labels: Tensor, *, keys: Tensor | None = None) -> None:
        self.ids, self.inputs, self.labels = ids, x, labels
        self.predict = self.how(x, labels, self.classes)

    def forget(self, ids: Tensor) -> None:
        stay = ~torch.isin(self.ids, ids)
        self.remember(self.ids[stay], self.inputs[stay], self.labels[stay])

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        return self.predict(x)


def fit(
    model: TrainedRival,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    augment: Augment | None = None,
    seed: int = 0,
) -> None:
    """A plain PyTorch loop for any of these classifiers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    steps = epochs * -(-len(ids) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=steps, desc=type(model).__name__, mininterval=1.0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(ids), generator=generator).split(batch_size):
            own = ids[rows]
            x = images[own] if augment is None else augment(images[own], generator=generator)
            optimizer.zero_grad()
            model.loss(x, labels[own], ids=own).backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    model.eval()


def main() -> None:
    """Train each classifier, forget a tenth, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--patch", type=int, default=2)
    args = parser.parse_args()
    data = load_dataset(args.data, size=args.size)
    images, labels = data.train_images[:], data.train_labels
    if labels is None or data.test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for the training and the test images, found none")
    shape, classes = tuple(images.shape[1:]), 1 + int(labels.max())
    torch.manual_seed(0)
    encoder = Projection.random(shape, 64)
    models: list[Rival] = [
        NearestNeighbours(encoder, classes),
        RACDelete(Plain(Features(shape, args.patch), classes), encoder, classes),
        SemiParametric(Features(shape, args.patch), classes),
    ]
    everyone = torch.randperm(len(images))
    gone, found = everyone[: len(images) // 10], {}
    for model in models:
        model.remember(everyone, images[everyone], labels[everyone])
        if isinstance(model, TrainedRival):
            fit(model, images, labels, everyone, epochs=args.epochs)
        model.forget(gone)
        with torch.no_grad():
            right = [
                (model(x).argmax(1) == y).float().mean().item()
                for x, y in ((data.test_images[:], data.test_labels), (images[gone], labels[gone]))
            ]
        found[type(model).__name__] = {"test": right[0], "forgotten": right[1]}
    print(json.dumps({"data": data.name, "accuracy": found}))


if __name__ == "__main__":
    main()

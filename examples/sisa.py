"""Unlearning by sharded, isolated, sliced and aggregated training (SISA, Bourtoule et al., arXiv 1912.03817).

    python examples/sisa.py                          # real handwritten digits: train, then two requests in a row

Each shard has a separate model, which learns the slices one after another; its weights are saved after each slice. A
request resets the model of its shard to the weights before the first affected slice. Training is then repeated from
there, without any instance that was ever forgotten. Forgetting is exact, at the price of that training. Copy this file
and change what you like. The last line printed is one JSON object with the results.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable

import torch
from rivals import Features, Plain, TrainedRival, fit
from torch import Tensor, nn

from treediff.data import load_dataset


class SISA(nn.Module):
    """Mean probabilities of models of disjoint shards.

    Args:
        make: returns a new model for a seed.
        train: trains a model on some ids, with a seed.
        ids: ids of all instances; the sizes of shards, and of slices of a shard, differ by at most one.
        shards: number of shards, each with one model.
        slices: number of slices of a shard; a request repeats the training on a part of them.
        seed: seed of the shards, the weights and the training.
    """

    def __init__(
        self,
        make: Callable[[int], TrainedRival],
        train: Callable[[TrainedRival, Tensor, int], None],
        ids: Tensor,
        *,
        shards: int = 5,
        slices: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        self.make, self.train_on, self.seed = make, train, seed
        self.slices = [list(shard.tensor_split(slices)) for shard in order.tensor_split(shards)]
        self.saved: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(shards)]
        self.models = nn.ModuleList(self._trained(shard, 0) for shard in range(shards))

    def _trained(self, shard: int, start: int) -> TrainedRival:
        """The model of a shard, trained from slice number `start` on."""
        seed = 1000 * self.seed + shard
        model = self.make(seed)
        if start:
            model.load_state_dict(self.saved[shard][start - 1])
        for number in range(start, len(self.slices[shard])):
            known = torch.cat(self.slices[shard][: number + 1])
            if len(known):
                self.train_on(model, known, seed + 100 * number)
            self.saved[shard][number] = copy.deepcopy(model.state_dict())
        return model.eval()

    def forget(self, ids: Tensor) -> int:
        """Delete ids permanently; returns the number of retrained slices. KeyError, and no change, for unknown ids."""
        everyone = torch.cat([part for shard in self.slices for part in shard])
        unknown = ids[~torch.isin(ids, everyone)].tolist()
        if unknown:
            raise KeyError(f"ids {unknown[:5]} are not there, or were forgotten before")
        count = 0
        for shard, parts in enumerate(self.slices):
            touched = [number for number, part in enumerate(parts) if torch.isin(part, ids).any()]
            for number in touched:
                parts[number] = parts[number][~torch.isin(parts[number], ids)]
            if touched:
                self.models[shard] = self._trained(shard, touched[0])
                count += len(parts) - touched[0]
        return count

    def forward(self, x: Tensor, *, keys: Tensor | None = None) -> Tensor:
        return torch.stack([model(x).log_softmax(1) for model in self.models]).logsumexp(0) - math.log(len(self.models))


def main() -> None:
    """Train, and forget twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, mnist, or a path")
    parser.add_argument("--size", type=int, help="height and width for images of a folder, if their sizes differ")
    parser.add_argument("--epochs", type=int, default=10, help="epochs for each slice")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--shards", type=int, default=3)
    args = parser.parse_args()
    data = load_dataset(args.data, size=args.size)
    images, labels = data.train_images[:], data.train_labels
    if labels is None or data.test_labels is None:
        raise SystemExit(f"{args.data}: a classifier needs labels for the training and the test images, found none")

    def make(seed: int) -> TrainedRival:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Plain(Features(tuple(images.shape[1:]), args.patch), 1 + int(labels.max()))

    def train(model: TrainedRival, ids: Tensor, seed: int) -> None:
        fit(model, images, labels, ids, epochs=args.epochs, seed=seed)

    def accuracy() -> float:
        with torch.no_grad():
            return (model(data.test_images[:]).argmax(1) == data.test_labels).float().mean().item()

    model = SISA(make, train, torch.arange(len(images)), shards=args.shards)
    found: list[dict] = [{"test": accuracy()}]
    for request in ([3], [5, 14]):
        start = time.perf_counter()
        slices = model.forget(torch.tensor(request))
        found.append({"forgot": request, "slices": slices, "seconds": time.perf_counter() - start, "test": accuracy()})
    print(json.dumps({"data": data.name, "results": found}))


if __name__ == "__main__":
    main()

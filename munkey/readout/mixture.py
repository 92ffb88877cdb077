"""A sum of readouts with one weight for each.

Letters: `B` inputs, `n` outputs, `m` readouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from munkey.readout.base import Query, Readout
from munkey.task import Task

__all__ = ["Mixture", "fitted_weights"]


class Mixture(Readout):
    """A weighted sum of the outputs of readouts, `sum_i w_i o_i` with `w_i >= 0`.

    For classes this is a product of powers of probabilities, whose weights also calibrate: one readout with weight `w`
    has the temperature `1 / w`. A weight may be 0, so that every readout alone can be reached.

    Deletion: that of the parts. The weights are a handful of numbers, fitted to permanent or held-out instances.

    Args:
        readouts: parts by name.
        weights: weight of each part; equal weights that add up to 1 if not given.

    Raises:
        ValueError: if there is no part, parts have different tasks, or the weights are of other parts, negative, or
            not finite.

    Source: logarithmic opinion pool (Genest and Zidek, 1986, section 3.2).
    """

    weights: Tensor

    def __init__(self, readouts: Mapping[str, Readout], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not readouts:
            raise ValueError("a mixture needs at least one readout, found none")
        self.readouts = nn.ModuleDict(dict(readouts))
        tasks = {part.task for part in readouts.values()}
        if len(tasks) > 1:
            raise ValueError(f"all parts of a mixture predict the same, found {sorted(map(str, tasks))}")
        self.task = tasks.pop()
        equal = dict.fromkeys(readouts, 1 / len(readouts))
        self.register_buffer("weights", torch.zeros(len(readouts), dtype=torch.float64))
        self.set_weights(equal if weights is None else weights)

    @property
    def deletion(self) -> str:  # type: ignore[override]
        """The effect of a deletion that is hardest to undo among those of the parts."""
        order = ("rows", "sums", "weights")
        return max((part.deletion for part in self.parts), key=order.index)

    @property
    def neighbours(self) -> int:  # type: ignore[override]
        """The greatest number of neighbours that a part reads."""
        return max(part.neighbours for part in self.parts)

    @property
    def parts(self) -> list[Readout]:
        """The readouts."""
        return list(self.readouts.values())  # type: ignore[arg-type]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weight of each part; errors as for the class."""
        if list(weights) != list(self.readouts) or not all(0 <= w < float("inf") for w in weights.values()):
            raise ValueError(
                f"expected a weight of at least 0 for each of {', '.join(self.readouts)}, found {dict(weights)}"
            )
        self.weights.copy_(torch.tensor(list(weights.values()), dtype=torch.float64))

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless `x` is a batch of inputs of all parts."""
        for part in self.parts:
            part.check(x)

    def outputs(self, query: Query) -> Tensor:
        """Return the outputs of all parts, `(m, B, n)`."""
        with query.memory.store.lock:  # all parts read the same rows
            return torch.stack([part(query) for part in self.parts])

    def forward(self, query: Query) -> Tensor:
        """Return the sum `(B, n)`; a part whose weight is 0 is not computed."""
        total = None
        with query.memory.store.lock:  # all parts read the same rows
            for weight, part in zip(self.weights.tolist(), self.parts, strict=True):
                if weight or total is None:
                    found = weight * part(query)
                    total = found if total is None else total + found
        return total  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """Return the weights."""
        return ", ".join(f"{name}={weight:.3g}" for name, weight in zip(self.readouts, self.weights, strict=True))


def fitted_weights(task: Task, outputs: Tensor, labels: Tensor, *, steps: int = 50) -> Tensor:
    """Return the weights `w >= 0`, `(m,)` float64, that minimise the mean loss of `sum_i w_i o_i`.

    The loss is convex in the weights. Newton steps on the weights that are not held at 0, with a line search along the
    projection to `w >= 0`.

    Args:
        task: defines the loss.
        outputs: `(m, B, n)` of the parts.
        labels: `(B, ...)`.
        steps: at most so many.

    Raises:
        ValueError: if there is no label.
    """
    if not len(labels):
        raise ValueError("weights are fitted to instances with labels, found none")
    o = outputs.detach().double()

    def loss(w: Tensor) -> Tensor:
        return task.losses(torch.tensordot(w, o, 1), labels).mean()

    w = o.new_full((len(o),), 1 / len(o))
    with torch.enable_grad():
        for _ in range(steps):
            gradient = torch.autograd.functional.jacobian(loss, w)
            free = (w > 0) | (gradient < 0)
            if not bool(free.any()) or float(gradient[free].abs().max()) < 1e-9:
                break
            hessian = torch.autograd.functional.hessian(loss, w)[free][:, free]
            hessian.diagonal().add_(1e-9 + 1e-9 * hessian.diagonal().abs().max())
            step = torch.zeros_like(w)
            step[free] = torch.linalg.solve(hessian, -gradient[free])
            w, better = _line_search(loss, w, step)
            if not better:
                break
    return w


def _line_search(loss: Callable[[Tensor], Tensor], w: Tensor, step: Tensor) -> tuple[Tensor, bool]:
    """Return the first better point on the projected path to `w + step`, which is halved up to 30 times."""
    start = float(loss(w))
    for halvings in range(30):
        there = (w + step * 0.5**halvings).clamp_min(0)
        if float(loss(there)) < start:
            return there, True
    return w, False

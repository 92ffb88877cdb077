"""A network that was trained beforehand, as one of several readouts.

Letters: `B` inputs, `n` outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from munkey.encoders.base import check_fitted_on
from munkey.readout.base import Query, Readout, with_no_opinion
from munkey.task import Classification, Task

__all__ = ["ModuleReadout"]


class ModuleReadout(Readout):
    """The outputs of a module for the input alone, such as a classifier that was trained on permanent instances.

    A class that the module was not trained on gets the greatest output of the classes that it knows: whether it is such
    a class is left to the other readouts of a mixture.

    Deletion: none; the weights stay. In exact mode the module must not have been trained on what can be forgotten.

    Args:
        task: kind of label.
        module: from inputs `(B, ...)` to outputs `(B, n)`: logits of classes or properties, or numbers. It is frozen,
            and stays in eval mode.
        fitted_on: data that the module was trained on, one of `munkey.encoders.base.FITTED_ON`.
        known: classes that the module was trained on; all if not given.

    Raises:
        TypeError: if classes are named, and the task has none.
        ValueError: if `fitted_on` is another word, or there are no such classes.
    """

    known: Tensor

    deletion = "weights"

    def __init__(
        self, task: Task, module: nn.Module, *, fitted_on: str, known: Iterable[int] | Tensor | None = None
    ) -> None:
        super().__init__()
        self.task, self.fitted_on = task, check_fitted_on(fitted_on)
        self.module = module.eval().requires_grad_(False)
        classes = torch.arange(task.outputs) if known is None else torch.as_tensor(list(map(int, known)))
        if known is not None and not isinstance(task, Classification):
            raise TypeError(f"known= names classes, found {task}; leave it out")
        if not len(classes) or int(classes.min()) < 0 or int(classes.max()) >= task.outputs:
            raise ValueError(f"known classes must be from 0 to {task.outputs - 1}, found {classes.tolist()}")
        self.register_buffer("known", torch.isin(torch.arange(task.outputs), classes))

    def train(self, mode: bool = True) -> ModuleReadout:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, query: Query) -> Tensor:
        """Return the outputs of the module, `(B, n)`; a mixture takes logits and log-probabilities alike.

        Raises:
            ValueError: if the module returns another shape.
        """
        outputs: Tensor = self.module(query.inputs)
        if outputs.shape != (len(query.inputs), self.task.outputs):
            raise ValueError(
                f"expected outputs of shape {(len(query.inputs), self.task.outputs)} from the module, found "
                f"{tuple(outputs.shape)}"
            )
        return with_no_opinion(outputs, self.known)

"""A network that was trained beforehand, as one of several readouts.

Letters: `B` inputs, `n` outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from munkey.encoders.base import FITTED_ON
from munkey.readout.base import Query, Readout
from munkey.task import Task

__all__ = ["ModuleReadout"]


class ModuleReadout(Readout):
    """The outputs of a module for the input alone, such as a classifier that was trained on permanent instances.

    Deletion: none; the weights stay. In exact mode the module must not have been trained on what can be forgotten.

    Args:
        task: kind of label.
        module: from inputs `(B, ...)` to outputs `(B, n)`: logits of classes or properties, or numbers. It is frozen,
            and stays in eval mode.
        fitted_on: data that the module was trained on, one of `munkey.encoders.base.FITTED_ON`.

    Raises:
        ValueError: if `fitted_on` is another word.
    """

    deletion = "weights"

    def __init__(self, task: Task, module: nn.Module, *, fitted_on: str) -> None:
        super().__init__()
        if fitted_on not in FITTED_ON:
            raise ValueError(f"fitted_on must be one of {', '.join(FITTED_ON)}; found {fitted_on!r}")
        self.task, self.fitted_on = task, fitted_on
        self.module = module.eval().requires_grad_(False)

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
        return outputs

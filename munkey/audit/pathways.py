"""Accuracy of each pathway of a classifier.

The paper's Pathway Sensitivity Score is built on the accuracy of the image pathway alone. We do not know the formula of
the score, so only the accuracies are given.

Letters: `B` inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from munkey.model import KeyMemoryTransformer
from treediff.core.modes import evaluating

__all__ = ["PathwayAccuracies", "pathway_accuracies"]


@dataclass(frozen=True)
class PathwayAccuracies:
    """Mean scores of the task: shares of inputs that are classified correctly, from 0 to 1; NaN without inputs.

    A pathway that a model without a transformer does not have is NaN. For a `Regression`, the score is the negative
    mean squared error; see `munkey.task.Task.scores`.

    Args:
        full: with input and neighbours.
        input: with the null exemplar in place of neighbours.
        memory: with neighbours alone; only the key encoder reads the input.
    """

    full: float
    input: float
    memory: float


@torch.no_grad()
def pathway_accuracies(
    model: KeyMemoryTransformer,
    x: Tensor,
    labels: Tensor,
    *,
    keys: Tensor | None = None,
    batch_size: int = 256,
) -> PathwayAccuracies:
    """Return accuracies on some inputs, in eval mode.

    Args:
        model: the classifier.
        x: `(B, ...)` inputs.
        labels: `(B, ...)`, as the task defines them.
        keys: `(B, D)` precomputed keys of the inputs, as the model's key encoder returns them.
        batch_size: number of inputs in one pass.

    Raises:
        TypeError: if labels are of another kind.
        ValueError: if there is not one label for each input.
    """
    labels = model.task.check(labels, len(x)).to(x.device)
    pathways: list[dict[str, bool]] = [{}]
    if model.has_transformer:
        pathways += [{"use_memory": False}, {"use_input": False}]
    right = torch.zeros(3, dtype=torch.float64, device=x.device)
    right[len(pathways) :] = torch.nan
    with evaluating(model):
        for rows in torch.arange(len(x)).split(batch_size):
            queries = model.key_encoder(x[rows]) if keys is None else keys[rows]
            for row, settings in enumerate(pathways):
                logits = model(x[rows], keys=queries, **settings)
                right[row] += model.task.scores(logits, labels[rows]).sum()
    return PathwayAccuracies(*(right / len(x)).tolist())

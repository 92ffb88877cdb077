"""Fitting of an encoder to instances that stay: with labels, or to images alone.

Letters: `N` instances, `B` batch, `D` width of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from munkey.encoders.base import KeyEncoder
from treediff.core.checks import check_positive
from treediff.core.cpu import has_fast
from treediff.core.noise import drawing_from
from treediff.layers.contrastive import ProjectionHead, nt_xent

__all__ = ["fit_encoder"]

E = TypeVar("E", bound=KeyEncoder)


def fit_encoder(
    encoder: E,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    temperature: float = 0.1,
    augment: Callable[..., Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> E:
    """Fit an encoder so that instances that are alike have similar keys, and freeze it again.

    - With labels, `-log softmax_c(cos(k, w_c) / temperature)` is minimised, where `w_c` is a learned direction for each
      class: keys of a class gather around one direction.
    - Without labels, two changed copies of each input are to have similar keys (SimCLR).

    The directions and the head of the loss are discarded. Only instances that stay for good may be given, if the model
    is to forget exactly: `encoder.fitted_on` must say so.

    Args:
        encoder: with a differentiable `encode`, such as `ConvEncoder` or `PerceptronEncoder`.
        x: `(N, ...)` inputs.
        labels: `(N,)` int64 classes.
        epochs: passes over the inputs.
        batch_size: `B`; a smaller last batch is left out.
        learning_rate: greatest rate of AdamW, after a warm-up and before a decay to 0.
        weight_decay: of AdamW.
        temperature: of cosines.
        augment: from a batch to a changed batch, with a keyword `generator=`; required without labels.
        generator: draws the order, the changes, and the initial head; seed 0 if not given.
        progress: wraps the steps, such as `tqdm`.

    Returns:
        the encoder.

    Raises:
        TypeError: if a number is not whole, or labels are no whole numbers.
        ValueError: if there are fewer inputs than a batch, not one label for each, no labels and no `augment`, or the
            encoder says that it was fitted to nothing.

    Source: Wang et al. (arXiv 1704.06369), eq. 5, without the term for margins; Chen et al. (arXiv 2002.05709), eq. 1.

    Examples:
        >>> from munkey import PerceptronEncoder
        >>> x, y = torch.randn(64, 5), torch.arange(64) % 2
        >>> encoder = PerceptronEncoder(5, 8, fitted_on="permanent split")
        >>> fit_encoder(encoder, x, y, epochs=2, batch_size=32) is encoder
        True
    """
    check_positive(epochs=epochs, batch_size=batch_size)
    _check(encoder, x, labels, batch_size, augment)
    generator = generator or torch.Generator().manual_seed(0)
    with drawing_from(generator):
        head = _head(encoder, labels).to(device=x.device)
    weights = [*encoder.requires_grad_(True).parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)
    each = len(x) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * each + 1)
    order = torch.empty(0, dtype=torch.int64)
    for step in progress(range(epochs * each)):
        if step % each == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % each * batch_size :][:batch_size]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=has_fast(torch.bfloat16)):
            loss = _loss(
                encoder, head, x[rows], None if labels is None else labels[rows], temperature, augment, generator
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.requires_grad_(False)


def _head(encoder: KeyEncoder, labels: Tensor | None) -> nn.Module:
    if labels is None:
        return ProjectionHead(in_features=encoder.width, hidden=encoder.width, out_features=min(64, encoder.width))
    return nn.Linear(encoder.width, 1 + int(labels.max()), bias=False)


def _loss(
    encoder: KeyEncoder,
    head: Any,  # noqa: ANN401 - of one of two classes
    x: Tensor,
    labels: Tensor | None,
    temperature: float,
    augment: Callable[..., Tensor] | None,
    generator: torch.Generator,
) -> Tensor:
    views = [x if augment is None else augment(x, generator=generator) for _ in range(1 if labels is not None else 2)]
    keys = encoder.encode(torch.cat(views))
    if labels is None:
        first, second = head(keys).float().chunk(2)
        return nt_xent(first, second, temperature=temperature)
    cosines = F.normalize(keys.float(), dim=1) @ F.normalize(head.weight.float(), dim=1).T
    return F.cross_entropy(cosines / temperature, labels)


def _check(
    encoder: KeyEncoder, x: Tensor, labels: Tensor | None, batch_size: int, augment: Callable[..., Tensor] | None
) -> None:
    if encoder.fitted_on == "nothing":
        raise ValueError("the encoder says fitted_on='nothing'; make it with fitted_on='permanent split' or other data")
    encoder.check(x)
    if len(x) < batch_size:
        raise ValueError(
            f"expected at least one batch of {batch_size} inputs, found {len(x)}; use a smaller batch_size"
        )
    if labels is None and augment is None:
        raise ValueError("without labels, keys are fitted to changed copies of inputs; pass augment=, or labels")
    if labels is not None and labels.is_floating_point():
        raise TypeError(f"labels must be whole numbers, found {labels.dtype}")
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"expected one label for each of {len(x)} inputs, found {tuple(labels.shape)}")

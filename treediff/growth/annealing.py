"""KL annealing: the weight of the KL terms of the ELBO during training.

A weight that grows from almost 0 lets the decoders learn to use the latents before the KL terms pull the latents to
the prior. The weight is a pure function of progress: there is nothing to step, and only four numbers to save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

__all__ = ["KLAnnealing"]


@dataclass(frozen=True, kw_only=True)
class KLAnnealing:
    """Weight of the KL terms as a function of the epoch: `min(ceiling, start + epoch * step)`.

    With a `period` the epoch is taken modulo the period, so the climb begins again at every multiple of the period.

    The epoch counts **from the beginning of the stage**: TreeVAE restarts the climb for the initial tree, for
    every sub-tree and for the fine-tuning. Fractions are allowed, to change the weight within an epoch.

    Args:
        start: weight at epoch 0.
        step: increase of the weight per epoch.
        ceiling: greatest weight. 1 is the ELBO; above 1 is a beta-VAE.
        period: epochs after which the climb restarts, or None for never.

    Raises:
        ValueError: if a number is negative or not finite, `start` is above `ceiling`, or `period` below 1.
        TypeError: if a field is not a number, or `period` is not an integer.

    Source: TreeVAE's reference implementation (linear, per epoch, up to 1; start and step are 0 and 0.001 for
    MNIST, 0.01 and 0.01 for CIFAR); cycles: Fu et al., "Cyclical Annealing Schedule" (arXiv 1903.10145).

    Examples:
        >>> annealing = KLAnnealing(start=0.01, step=0.01)
        >>> annealing(0), annealing(1), annealing(500)
        (0.01, 0.02, 1.0)
        >>> KLAnnealing.from_dict(annealing.to_dict()) == annealing
        True
    """

    start: float = 0.0
    step: float = 0.001
    ceiling: float = 1.0
    period: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "step", "ceiling"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, found {value!r} of type {type(value).__name__}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, found {value}")
        if self.start > self.ceiling:
            raise ValueError(
                f"start must not lie above ceiling, found start={self.start} and ceiling={self.ceiling}; "
                "raise the ceiling, or use KLAnnealing.constant for a weight that stays"
            )
        if self.period is not None:
            if isinstance(self.period, bool) or not isinstance(self.period, int):
                raise TypeError(f"period must be a whole number of epochs or None, found {self.period!r}")
            if self.period < 1:
                raise ValueError(f"period must be at least 1 epoch, found {self.period}; None means no cycle")

    def __call__(self, epoch: float) -> float:
        """Return the weight at `epoch`, counted from 0 at the beginning of the stage.

        Raises:
            ValueError: if the epoch is negative or not finite.
        """
        if not (math.isfinite(epoch) and epoch >= 0):
            raise ValueError(f"epochs count from 0 at the beginning of the stage; found epoch {epoch}")
        progress = epoch if self.period is None else epoch % self.period
        return float(min(self.ceiling, self.start + progress * self.step))

    @classmethod
    def constant(cls, weight: float = 1.0) -> KLAnnealing:
        """Build an annealing with the same weight throughout.

        Examples:
            >>> KLAnnealing.constant(4.0)(100)
            4.0
        """
        return cls(start=weight, step=0.0, ceiling=weight)

    @classmethod
    def cyclic(cls, period: int, *, climb: float = 0.5, start: float = 0.0, ceiling: float = 1.0) -> KLAnnealing:
        """Climb from `start` to `ceiling` in the first `climb` of every `period`, then stay until it ends.

        Args:
            period: epochs in a cycle.
            climb: share of the cycle spent climbing, above 0 and at most 1 (`R` in the source).
            start: weight at the beginning of each cycle.
            ceiling: weight at the end of the climb.

        Raises:
            ValueError: if `climb` is not in (0, 1], or as for the class itself.

        Source: Fu et al. (arXiv 1903.10145), figure 2, there with `R = 0.5`.

        Examples:
            >>> [KLAnnealing.cyclic(4)(epoch) for epoch in range(6)]
            [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
        """
        if not 0 < climb <= 1:
            raise ValueError(f"climb is a share of the period, above 0 and at most 1; found {climb}")
        # Built flat first, so that the class checks the numbers before the division.
        flat = cls(start=start, step=0.0, ceiling=ceiling, period=period)
        return replace(flat, step=(ceiling - start) / (climb * period))

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the four fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> KLAnnealing:
        """Build the annealing that `to_dict` described.

        Raises:
            ValueError: if a field is missing or unknown, or as for the class itself.
        """
        expected = {field.name for field in fields(cls)}
        if set(settings) != expected:
            raise ValueError(
                f"expected exactly the fields {sorted(expected)}; "
                f"missing {sorted(expected - set(settings))}, unknown {sorted(set(settings) - expected)}"
            )
        return cls(**settings)

"""That a gradient reaches everything, which the tests of all modules ask."""

from __future__ import annotations

from torch import Tensor, nn


def assert_gradient_everywhere(module: nn.Module, *, above: float = 0.0, **inputs: Tensor) -> None:
    """Every parameter, and every input named, has a finite gradient, somewhere larger than `above`."""
    for name, tensor in [*inputs.items(), *module.named_parameters()]:
        gradient = tensor.grad
        assert gradient is not None and gradient.isfinite().all(), f"{name} has no finite gradient: {gradient}"
        assert gradient.dtype == tensor.dtype, f"{name} is of {tensor.dtype}, its gradient of {gradient.dtype}"
        assert gradient.abs().max() > above, f"{name} has no gradient above {above}: {gradient}"

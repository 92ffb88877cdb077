"""Predictions of the network: the noise, the image, or the velocity. Each can be converted to any other.

With `x_t = alpha x_0 + sigma eps` and `v = alpha eps - sigma x_0`, and `alpha^2 + sigma^2 = 1`:

    x_0 = (x_t - sigma eps) / alpha = alpha x_t - sigma v
    eps = (x_t - alpha x_0) / sigma = sigma x_t + alpha v

Predicted noise does not determine the image where `alpha` is 0, and a predicted image does not determine the noise
where `sigma` is 0. The velocity (Salimans and Ho, arXiv 2202.00512, appendix D) works at both ends.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from treediff.core.checks import check_noise

__all__ = ["Prediction", "as_noise", "as_x0", "check_prediction", "target"]

#: 'epsilon' (noise), 'x0' (image) or 'v' (velocity).
Prediction = Literal["epsilon", "x0", "v"]


def check_prediction(prediction: str) -> Prediction:
    """Return the name unchanged if it is a prediction.

    Raises:
        ValueError: if there is no such prediction.
    """
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}; found {prediction!r}")
    return prediction  # type: ignore[return-value]


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the target of the network for `x_t = alpha x0 + sigma noise`.

    Args:
        prediction: 'epsilon', 'x0' or 'v'.
        x0: `(B, *shape)`, clean.
        noise: the noise that was added, of the shape and dtype of `x0`.
        alpha: broadcasts with `x0`.
        sigma: broadcasts with `x0`.

    Raises:
        TypeError: if noise has another dtype.
        ValueError: if there is no such prediction, or noise has another shape.

    Examples:
        >>> import torch
        >>> target("v", torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.6), torch.tensor(0.8))
        tensor(0.4000)
    """
    check_noise(noise, x0, "x0")
    match check_prediction(prediction):
        case "epsilon":
            return noise
        case "x0":
            return x0
        case "v":
            return alpha * noise - sigma * x0


def as_x0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Convert a network's output to an image; infinite or NaN for predicted noise where `alpha` is 0.

    Args:
        prediction: kind of the output.
        output: output of the network.
        x_t: input of the network.
        alpha: a number, or broadcasts with `x_t`.
        sigma: a number, or broadcasts with `x_t`.

    Raises:
        ValueError: if there is no such prediction.
    """
    match check_prediction(prediction):
        case "epsilon":
            return (x_t - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return alpha * x_t - sigma * output


def as_noise(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Convert a network's output to noise; infinite or NaN for a predicted image where `sigma` is 0.

    Arguments and errors are as for `as_x0`. To get any other prediction: `target(wanted, as_x0(...), as_noise(...),
    alpha, sigma)`.
    """
    match check_prediction(prediction):
        case "epsilon":
            return output
        case "x0":
            return (x_t - alpha * output) / sigma
        case "v":
            return sigma * x_t + alpha * output

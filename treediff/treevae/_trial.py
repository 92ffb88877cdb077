"""Trial of the parts of a TreeVAE on two rows of zeros, so that a part that does not fit is refused at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from treediff.core.modes import evaluating, lasting
from treediff.layers.grouped.bank import NodeBank
from treediff.layers.likelihood import Likelihood
from treediff.treevae.banks import NodeBanks, fresh

__all__ = ["try_parts"]

_ROWS = 2  # PyTorch's group norm refuses one row of maps with a single pixel and channel


@torch.no_grad()
@lasting()
def try_parts(
    encoder: nn.Module,
    bottom_up: Sequence[nn.Module],
    banks: NodeBanks,
    likelihood: Likelihood,
    latent: tuple[int, ...],
    inputs: tuple[int, ...],
) -> None:
    """Raise ValueError unless every part runs on what it will get, and returns the shape that `TreeVAE` documents.

    Each part runs in eval mode, on its own device and in its own dtype, so that a model may be moved afterwards. The
    global random state stays as it is.
    """
    double, x = (2 * latent[0], *latent[1:]), torch.zeros(_ROWS, *inputs, device="cpu", dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        features = _run("encoder", encoder, x)
        shape = tuple(features.shape[1:])
        for i, block in enumerate(bottom_up):
            _require(f"bottom_up[{i}]", block, features, shape, "the shape of the encoder's features")
        z = x.new_zeros(_ROWS, *latent)
        gaussian = "the mean and the log-variance of a latent, one after the other along the first axis"
        logit = "one logit for each row; nn.Flatten(0) after a last layer of width 1 returns this"
        _require("head", _network(banks.heads), features, double, gaussian)
        _require("transition", _network(banks.transitions), z, double, gaussian)
        _require("posterior_router", _network(banks.posterior_routers), features, (), logit)
        _require("prior_router", _network(banks.prior_routers), z, (), logit)
        output = _run("decoder", _network(banks.decoders), z)
        with _named(f"likelihood= does not read the decoder's output {_of(output)} for observations {_of(x)}"):
            likelihood.log_prob(_like(likelihood, output), _like(likelihood, x))


def _require(name: str, part: nn.Module, x: Tensor, shape: tuple[int, ...], what: str) -> None:
    found = _run(name, part, x)
    if found.shape != (_ROWS, *shape):
        wanted = _of(x.new_empty(_ROWS, *shape))
        raise ValueError(f"{name}= must map {_of(x)} to {wanted}, {what}; found {_of(found)}")


def _run(name: str, part: nn.Module, x: Tensor) -> Tensor:
    with _named(f"{name}= does not run on its input {_of(x)}; build it for this shape"), evaluating(part):
        found = part(_like(part, x))
    if not isinstance(found, Tensor) or not found.ndim or len(found) != _ROWS:
        what = f"the shape {tuple(found.shape)} for {_ROWS} rows" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name}= must return a tensor with a row for each row of its input {_of(x)}; found {what}")
    return found


@contextmanager
def _named(message: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{message} ({error})") from error


def _network(bank: NodeBank) -> nn.Module:
    return bank.module(bank.nodes[0]) if bank.nodes else fresh(bank)


def _like(module: nn.Module, x: Tensor) -> Tensor:
    """Return a tensor on the device and in the dtype of a module, if it has any."""
    own = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), x)
    return x.to(own)


def _of(x: Tensor) -> str:
    """Return the shape of a batch in words: `(B, 3)`."""
    rows = ("B", *x.shape[1:])
    return f"({', '.join(map(str, rows))}{',' if len(rows) == 1 else ''})"

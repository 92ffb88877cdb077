"""Key encoders: each key of its own input alone, frozen, and known by a fingerprint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import seeded
from torch import Tensor, nn
from train_munkey import efficientnet_lite

from munkey import ConvEncoder, KeyEncoder, KeyMemoryTransformer, ModuleEncoder, Projection


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


class Counted(KeyEncoder):
    """Sums of a row, with what tells rows, places or sizes apart; keeps the sizes of its batches."""

    def __init__(self, fault: str, row_wise: bool = True) -> None:
        super().__init__(width=1, fitted_on="nothing")
        self.fault, self.row_wise, self.sizes = fault, row_wise, list[int]()

    def encode(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        found = x.flatten(1).double().sum(1, keepdim=True).float()
        if self.fault == "rows":
            found += 1e-3 * found.mean(0)
        if self.fault == "place":
            found[7:8] *= 1 + 1e-6
        if self.fault == "size":
            found *= 1 + 1e-6 * len(x)
        if self.fault == "padding":  # cuts off what is empty in all rows, and counts what is left
            found += len(x.flatten(1).any(0).nonzero())
        return found


@pytest.mark.parametrize(
    ("fault", "row_wise", "expected"),
    [
        ("", True, [32, 32, 16]),
        ("size", True, [32, 32, 32]),
        ("rows", True, [1] * 70),
        ("place", True, [1] * 70),
        ("padding", False, [1] * 70),
    ],
)
def test_batches_are_full_where_a_trial_shows_that_it_makes_no_difference(
    fault: str, row_wise: bool, expected: list[int]
) -> None:
    encoder, x = Counted(fault, row_wise), images(70)
    x[:35, :, :4] = 0
    whole = encoder.keys(x)
    assert all(torch.equal(encoder.keys(x[start : start + 5]), whole[start : start + 5]) for start in (0, 33, 65))
    encoder.sizes.clear()
    assert torch.equal(encoder.keys(x.flip(0)), whole.flip(0)) and encoder.sizes == expected


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["conv", "random"])
def test_no_bit_of_a_key_says_how_many_came_with_it(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        encoder, x = ENCODERS[name](), images(39)
        whole = encoder.keys(x)
        for size in (1, 5, 33):
            assert torch.equal(torch.cat([encoder.keys(part) for part in x.split(size)]), whole)
    finally:
        torch.set_num_threads(before)


def test_a_trial_is_made_once_for_each_shape_and_setting() -> None:
    encoder = Counted("")
    encoder.keys(images(32))
    assert len(encoder.sizes) > 1 and len(encoder._full.passed) == 1
    encoder.sizes.clear()
    encoder.keys(images(64))
    assert encoder.sizes == [32, 32]
    encoder.keys(torch.rand(32, 2))
    encoder.keys(images(32).double())
    assert len(encoder._full.passed) == 3 and all(encoder._full.passed.values())


def test_a_trial_is_made_again_for_weights_of_another_kind() -> None:
    encoder, x = conv(), images(32)
    encoder.keys(x)
    encoder.to(memory_format=torch.channels_last).keys(x)
    encoder.double().keys(x)
    encoder.load_state_dict({name: 2 * weight for name, weight in encoder.state_dict().items()})
    encoder.keys(x)
    assert len(encoder._full.passed) == 3


def test_without_row_wise_set_keys_are_those_of_single_inputs() -> None:
    encoder, x = conv(), images(40)
    encoder.row_wise = False
    assert torch.equal(encoder.keys(x), torch.cat([encoder.encode(row[None]) for row in x]))
    torch.testing.assert_close(encoder.keys(x), conv().keys(x))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    assert not ModuleEncoder(net, 5, fitted_on="nothing").row_wise
    batched = ModuleEncoder(net, 5, fitted_on="nothing", row_wise=True)
    assert batched.row_wise and batched.fingerprint() == ModuleEncoder(net, 5, fitted_on="nothing").fingerprint()


class Writing(nn.Module):
    """Flattens, and keeps something of what it saw from call number `first` on."""

    def __init__(self, way: str, first: int = 0) -> None:
        super().__init__()
        self.way, self.first, self.calls = way, first, 0
        self.register_buffer("total", torch.zeros(48), persistent=way != "temporary")
        self.register_buffer("spread", torch.ones(48))
        self.weight = nn.Parameter(torch.zeros(48))
        self.plain = torch.zeros(48)

    def forward(self, x: Tensor) -> Tensor:
        x, self.calls = x.flatten(1), self.calls + 1
        if self.calls <= self.first:
            return x
        if self.way in ("buffer", "temporary"):
            self.total += x.sum(0)
        elif self.way == "another buffer":
            self.total = self.total + x.sum(0)
        elif self.way == "weight":
            self.weight.requires_grad_()
            self.weight.add_(x.sum(0))
        elif self.way == "data":
            self.weight.data += x.sum(0)
        elif self.way == "attribute":
            self.plain += x.sum(0)
        elif self.way == "new attribute":
            self.last = x.sum(0)
        elif self.way == "statistics":
            nn.functional.batch_norm(x.repeat(2, 1), self.total, self.spread, training=True)
        elif self.way == "before an error":
            self.total += x.sum(0)
            raise RuntimeError("stopped")
        return x


def state(module: nn.Module) -> dict[str, Tensor]:
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    plain = {name: tensor for name, tensor in vars(module).items() if isinstance(tensor, Tensor)}
    return {name: tensor.detach().clone() for name, tensor in (found | plain).items()}


WRITTEN = {
    "temporary": "total",
    "another buffer": "total",
    "data": "weight",
    "attribute": "plain",
    "statistics": "total",
}


@pytest.mark.parametrize("look_up", [False, True])
@pytest.mark.parametrize(
    "way", ["buffer", "temporary", "another buffer", "weight", "data", "attribute", "new attribute", "statistics"]
)
def test_an_encoder_that_writes_is_refused_and_keeps_nothing(way: str, look_up: bool) -> None:
    module = Writing(way)
    encoder, before = ModuleEncoder(module, 48, fitted_on="other data"), state(module)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="of the encoder changed while it ran, expected one that is frozen"
        ) as said:
            (encoder if look_up else encoder.keys)(images(3))
        assert "anew" not in str(said.value)
        after = state(module)
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    if way in WRITTEN:
        assert f"'module.{WRITTEN[way]}' of the encoder" in str(said.value) or way == "statistics"


def test_what_an_encoder_wrote_before_an_error_is_taken_back() -> None:
    module = Writing("before an error")
    with pytest.raises(RuntimeError, match="stopped"):
        ModuleEncoder(module, 48, fitted_on="other data").keys(images(3))
    assert not module.total.any()


def test_an_encoder_that_begins_to_write_later_is_to_be_made_anew() -> None:
    encoder = ModuleEncoder(Writing("buffer", first=1), 48, fitted_on="other data")
    encoder.keys(images(1))
    with pytest.raises(ValueError, match=r"'module.total' .* Build the encoder again: it has kept traces of th"):
        encoder.keys(images(1))


def test_an_encoder_that_learned_in_between_is_frozen_all_the_same() -> None:
    encoder, x = conv(), images(40)
    first = encoder.keys(x)
    with torch.no_grad():
        encoder.head.bias += 1
    torch.testing.assert_close(encoder.keys(x), first + 1)
    encoder.load_state_dict(conv().state_dict())
    assert torch.equal(encoder.keys(x), first)


def test_a_part_that_was_put_into_training_mode_is_put_back() -> None:
    encoder, x = module(), images(3)
    before = encoder.keys(x)
    encoder.module.train()
    assert torch.equal(encoder.keys(x), before) and not encoder.module[1].training


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
        return self.result.repeat(len(x), 1)


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
            "this projection takes inputs of 16 dimensions, found 48; it was made for other data, or for images of",
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
    """The recipe of examples/train_munkey.py."""
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = efficientnet_lite(size=32)
    x = torch.rand(3, 3, 20, 16, generator=seeded())
    assert encoder(x).shape == (3, 1280)
    torch.testing.assert_close(encoder.keys(x), encoder(x), rtol=1e-3, atol=1e-4)
    whole = encoder.keys(x[[0, 1, 2] * 11])
    assert all(torch.equal(encoder.keys(x[n % 3][None]), whole[n : n + 1]) for n in (0, 1, 2, 32))
    grey = torch.rand(1, 1, 20, 16, generator=seeded())
    assert torch.equal(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))
    assert efficientnet_lite(size=32).fingerprint() == encoder.fingerprint()


def test_an_encoder_can_take_the_place_of_the_class_that_had_its_weights() -> None:
    """Files of format 1 name a class EfficientNetLite0, whose network stood in the encoder itself."""

    class Old(KeyEncoder):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(5, "other data")
            self.network = network

        def encode(self, x: Tensor) -> Tensor:
            found: Tensor = self.network(x)
            return found

    class Inside(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

    network = nn.Linear(3, 5)
    old, new = Old(network), ModuleEncoder(Inside(network), 5, fitted_on="other data")
    assert new.fingerprint_as("Old", old.config) == old.fingerprint() != new.fingerprint()


def test_whole_numbers_stay_whole() -> None:
    """Ids of tokens, for an encoder of texts."""
    table = nn.EmbeddingBag(10, 4)
    encoder, x = ModuleEncoder(table, 4, fitted_on="other data"), torch.tensor([[1, 2, 9], [0, 0, 3]])
    torch.testing.assert_close(encoder(x), table(x).detach())


def test_a_plain_module_is_no_encoder() -> None:
    message = "key_encoder must be a KeyEncoder, found Linear; for any module use ModuleEncoder(module, width="
    for factory in (KeyMemoryTransformer.for_images, KeyMemoryTransformer.for_vectors):
        shapes = {"size": 8} if "images" in factory.__name__ else {"features": 5}
        with pytest.raises(TypeError, match=re.escape(message)):
            factory(classes=2, key_encoder=nn.Linear(5, 3), **shapes)  # type: ignore[operator]

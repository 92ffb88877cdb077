"""The classifier behind the metrics: what it promises of shapes, rows, weights and files; and that it learns."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import assert_gradient_everywhere
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import quick
from torch import Tensor, nn
from torch.nn import functional as F
from worlds import seeded

from treediff.metrics import FeatureClassifier, frechet_distance

SIZE = (9, 13)


def build(
    size: int | tuple[int, int] = SIZE,
    channels: int = 2,
    *,
    seed: int = 0,
    **settings: Any,  # noqa: ANN401
) -> FeatureClassifier:
    """Small, and with weights away from the special values that norms and the like start with."""
    arguments: dict[str, Any] = {"classes": 5, "features": 6, "width": 4, **settings}
    model = FeatureClassifier(size, channels, generator=seeded(seed), **arguments)
    generator = seeded(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    return model


def images(n: int = 3, size: tuple[int, int] = SIZE, channels: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, channels, *size, generator=seeded(7), dtype=torch.float64).to(dtype)


def convolutions(model: FeatureClassifier) -> list[nn.Conv2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


# --- what it computes -----------------------------------------------------------------------------------------


def test_it_is_the_network_it_says() -> None:
    """Convolutions by `unfold`, norms, means and activations by hand."""
    model, x = build(dtype=torch.float64), images(dtype=torch.float64)
    *layers, pool, flatten, linear, last_act = model.trunk
    assert isinstance(pool, nn.AdaptiveAvgPool2d) and isinstance(flatten, nn.Flatten) and isinstance(last_act, nn.SiLU)
    assert isinstance(linear, nn.Linear)
    y = x
    for conv, norm, act in zip(layers[::3], layers[1::3], layers[2::3], strict=True):
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU)
        stride = conv.stride[0]
        height, width = (-(-side // stride) for side in y.shape[2:])
        patches = F.unfold(y, 3, padding=1, stride=stride)
        y = (torch.einsum("of,bfp->bop", conv.weight.flatten(1), patches) + conv.bias[:, None]).view(
            3, -1, height, width
        )  # type: ignore[index]
        groups = y.unflatten(1, (norm.num_groups, -1))
        mean, variance = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
        y = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
        y = y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        y = y * y.sigmoid()
    hidden = y.mean((2, 3)) @ linear.weight.T + linear.bias
    features = hidden * hidden.sigmoid()
    torch.testing.assert_close(model.features_of(x), features)
    logits = features @ model.last.weight.T + model.last.bias
    torch.testing.assert_close(model(x), logits)
    assert torch.equal(model.predict(x), logits.argmax(1)) and model.predict(x).dtype == torch.int64


@quick
@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 5))
def test_any_size_gives_the_shapes_and_looks_at_the_whole_image(
    height: int, width: int, channels: int, first: int, classes: int
) -> None:
    model = build((height, width), channels, width=first, classes=classes)
    x = images(2, (height, width), channels)
    assert model.features_of(x).shape == (2, 6) and model(x).shape == (2, classes) and model.predict(x).shape == (2,)
    convs = convolutions(model)
    widths = [conv.out_channels for conv in convs]
    assert widths == [*(first * min(2**i, 4) for i in range(len(convs) - 1)), widths[-2]]
    seen, jump = 1, 1
    for conv in convs:
        seen, jump = seen + 2 * jump, jump * conv.stride[0]
    assert seen >= min(height, width)
    small = math.ceil(min(height, width) / jump)
    assert 2 < small <= 4  # no smaller than it has to be
    assert model.trunk[:-4](x).shape[2:] == (math.ceil(height / jump), math.ceil(width / jump))


def test_one_number_is_a_square() -> None:
    assert build(8).inputs == build((8, 8)).inputs == (2, 8, 8)


def test_rows_do_not_know_of_each_other_and_training_changes_nothing() -> None:
    model, x = build(dtype=torch.float64), images(4, dtype=torch.float64)
    together = model(x)
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), together)
    assert (together[0] != together[1]).all()
    assert torch.equal(model.eval()(x), together)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training: bool) -> None:
    model, none = build().train(training), images(0)
    assert model.features_of(none).shape == (0, 6) and model(none).shape == (0, 5) and model.predict(none).shape == (0,)
    model(none).sum().backward()


def test_gradient_reaches_every_parameter_and_every_pixel() -> None:
    model, x = build(dtype=torch.float64), images(dtype=torch.float64).requires_grad_()
    model(x).square().sum().backward()
    assert_gradient_everywhere(model, above=1e-9, x=x)
    assert x.grad is not None and (x.grad != 0).all()


def test_predicting_keeps_nothing_for_a_backward_pass() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model, x = build(), images()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.predict(x)
        assert not kept
        model(x)
    assert kept


def test_it_learns_and_its_features_tell_classes_apart() -> None:
    """A short line somewhere in a noisy image: which way does it lean? New images, in 40 steps."""
    generator = seeded()
    x, target = 0.3 * torch.rand(512, 1, 12, 10, generator=generator), torch.randint(2, (512,), generator=generator)
    at = torch.randint(7, (512, 2), generator=generator)
    for image, leans, (top, left) in zip(x, target.tolist(), at.tolist(), strict=True):
        image[0, top : top + 4, left : left + 4] += 0.7 * (torch.eye(4).flip(0) if leans else torch.eye(4))
    model = FeatureClassifier((12, 10), 1, 2, features=16, width=8, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:256]), target[:256]).backward()
        optimizer.step()
    assert (model.predict(x[256:]) == target[256:]).double().mean() > 0.95
    with torch.no_grad():
        features = model.features_of(x[256:])
    one, two, other = features[target[256:] == 0][:50], features[target[256:] == 0][50:], features[target[256:] == 1]
    assert frechet_distance(one, other) > 10 * frechet_distance(one, two)


# --- weights --------------------------------------------------------------------------------------------------


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.get_rng_state()
    settings: dict[str, Any] = {"size": 8, "channels": 1, "classes": 3}
    models = [FeatureClassifier(**settings, generator=seeded(seed)) for seed in (1, 1, 2)]
    one, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = FeatureClassifier(**settings)
        torch.manual_seed(3)
        second = FeatureClassifier(**settings)
    assert torch.equal(first.last.weight, second.last.weight) and first.last.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_device_and_dtype_are_threaded(dtype: torch.dtype | None) -> None:
    model = FeatureClassifier(8, 1, 3, device="meta", dtype=dtype)
    expected = dtype or torch.float32
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", expected)}
    assert model(torch.empty(2, 1, 8, 8, device="meta", dtype=expected)).shape == (2, 3)
    with torch.device("meta"):
        assert FeatureClassifier(8, 1, 3).last.weight.is_meta
    here = FeatureClassifier(8, 1, 3, dtype=dtype, generator=seeded())
    assert {(p.device.type, p.dtype) for p in here.parameters()} == {("cpu", expected)}
    assert here(images(2, (8, 8), 1, expected)).dtype == expected


def test_autocast_is_close_and_compiling_needs_one_graph() -> None:
    model, x = build(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x.bfloat16())  # another dtype than the weights', which autocast allows
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_round_trip_is_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = build(dtype=dtype), tmp_path / "model.safetensors"
    model.save(path)
    before = torch.get_rng_state()
    found = FeatureClassifier.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.config == model.config and found.inputs == model.inputs
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert found.state_dict()[name].dtype == dtype and torch.equal(found.state_dict()[name], value), name
    assert torch.equal(found(images(dtype=dtype)), model(images(dtype=dtype)))
    found.save(tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_loading_ignores_the_device_in_force(tmp_path: Path) -> None:
    build().save(str(tmp_path / "model"))
    with torch.device("meta"):
        found = FeatureClassifier.load(str(tmp_path / "model"))
    assert torch.equal(found.last.weight, build().last.weight)


def rewrite(path: Path, **changes: Any) -> None:  # noqa: ANN401
    """Change the header of a file, and leave out what is changed to None."""
    with safe_open(path, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["treediff"])
    header = {name: value for name, value in (header | changes).items() if value is not None}
    save_file(tensors, path, metadata={"treediff": json.dumps(header)})


CONFIG = {"size": [9, 13], "channels": 2, "classes": 5, "features": 6, "width": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "does not describe a model: .*must be a mapping, not NoneType"),
        ({"config": [1]}, "does not describe a model: .*must be a mapping, not list"),
        ({"config": CONFIG | {"depth": 3}}, "does not describe a model: .*unexpected keyword argument 'depth'"),
        ({"config": CONFIG | {"width": 0}}, "does not describe a model: width must be at least 1, found 0"),
        ({"config": CONFIG | {"classes": 1.5}}, "does not describe a model: classes must be a whole number, found 1.5"),
        ({"dtype": None}, "names the dtype None, expected one like 'float32'"),
        ({"dtype": "float31"}, "names the dtype 'float31', expected one like"),
        ({"dtype": "int64"}, "names the dtype 'int64', expected one like"),
        ({"dtype": "float64"}, r"does not fit the model at 'last.bias': expected float64 .*, found float32"),
        (
            {"config": CONFIG | {"classes": 4}},
            r"does not fit the model at 'last.bias': expected .*\(4,\), found .*\(5,\)",
        ),
        ({"class": "TreeVAE"}, r"holds a TreeVAE, expected a FeatureClassifier"),
    ],
)
def test_refuses_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    build().save(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        FeatureClassifier.load(path)


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no model file at {str(tmp_path / 'none')!r}")):
        FeatureClassifier.load(tmp_path / "none")


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 7}, ValueError, r"size must be at least 8 on both sides, found \(7, 7\); enlarge the images"),
        ({"size": (30, 5)}, ValueError, r"at least 8 on both sides, found \(30, 5\)"),
        ({"size": (8, 8, 8)}, ValueError, r"size must be \(height, width\), found \(8, 8, 8\)"),
        ({"size": (8.0, 8.0)}, TypeError, r"size must be a tuple of whole numbers"),
        ({"channels": 0}, ValueError, r"channels must be at least 1, found 0"),
        ({"classes": 0}, ValueError, r"classes must be at least 1, found 0"),
        ({"features": -1}, ValueError, r"features must be at least 1, found -1"),
        ({"width": 1.5}, TypeError, r"width must be a whole number, found 1.5"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureClassifier(**{"size": 8, "channels": 1, "classes": 2} | settings)


X = torch.full((2, 2, *SIZE), 0.5)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.numpy(), TypeError, r"expected images as a tensor, found ndarray; torch.as_tensor"),
        (X.byte(), TypeError, r"floating-point images, found torch.uint8; convert them with x.float\(\) / 255"),
        (X[0], ValueError, r"images of shape \(batch, 2, 9, 13\), found \(2, 9, 13\)"),
        (X[:, :1], ValueError, r"images of shape \(batch, 2, 9, 13\), found \(2, 1, 9, 13\)"),
        (X.mT, ValueError, r"images of shape \(batch, 2, 9, 13\), found \(2, 2, 13, 9\)"),
        (
            X.double(),
            TypeError,
            r"dtype of the weights, torch.float32, found torch.float64; .*\.to\(torch.float32\), or",
        ),
        (X * 510, ValueError, r"images must lie in \[0.0, 1.0\], found values from 255 to 255; divide 8-bit images"),
        (X - 1, ValueError, r"found values from -0.5 to -0.5"),
        (
            X.clone().index_fill_(3, torch.tensor([4]), math.nan),
            ValueError,
            r"images must be finite, found NaN or infinity; clean",
        ),
        (X / 0, ValueError, r"images must be finite, found NaN or infinity; clean"),
    ],
)
def test_refuses_images(x: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    model = build()
    for method in (model, model.features_of, model.predict):
        with pytest.raises(error, match=message):
            method(x)


def test_it_prints_its_settings() -> None:
    assert "size=[9, 13], channels=2, classes=5, features=6, width=4" in repr(build())

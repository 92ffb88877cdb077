"""The arguments of the factories: what they make, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GROWN, observations
from torch import nn
from worlds import seeded

from treediff import TreeTopology, TreeVAE
from treediff.core.io import build, record
from treediff.layers import BernoulliLikelihood, GaussianLikelihood, MLPDecoder, PatchDecoder, ResidualDecoder


def images(**settings: Any) -> TreeVAE:  # noqa: ANN401
    return TreeVAE.for_images(**{"size": 8, "width": 8, "latent": 3, "max_depth": 3, "generator": seeded(), **settings})


def vectors(features: Any = 4, **settings: Any) -> TreeVAE:  # noqa: ANN401
    return TreeVAE.for_vectors(features=features, **{"width": 6, "max_depth": 3, "generator": seeded(), **settings})


@pytest.mark.parametrize("network", ["conv", "mlp", "residual"])
@pytest.mark.parametrize("size", [1, 2, 7, (3, 11), (28, 28), (65, 66)])
@pytest.mark.parametrize("latent", [3, (2, 2, 2)])
def test_images_of_any_size_go_in_and_come_out(size: Any, latent: Any, network: str) -> None:  # noqa: ANN401
    model = images(size=size, latent=latent, network=network, topology=TreeTopology.balanced(1))
    height, width = (size, size) if isinstance(size, int) else size
    assert model.inputs == (1, height, width)
    x = observations(model, 2)
    assert model.reconstruct(x).shape == x.shape
    elbo = model.elbo(x).elbo
    elbo.sum().backward()
    assert elbo.isfinite().all()


def test_sizes_may_be_one_number_and_latents_too() -> None:
    for one, pair in ((images(size=6), images(size=(6, 6))), (images(latent=5), images(latent=(5,)))):
        assert one.config == pair.config
        ours, theirs = one.state_dict(), pair.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_a_configuration_is_plain_data_and_holds_every_choice() -> None:
    model = images(size=(5, 6), channels=3, network="mlp", likelihood="gaussian", topology=GROWN)
    expected = {"size": [5, 6], "channels": 3, "latent": [3], "width": 8, "max_depth": 3, "network": "mlp"}
    assert model.config == {"for_images": {**expected, "likelihood": "gaussian"}}
    expected = {"features": 4, "latent": 8, "width": 6, "max_depth": 3, "likelihood": "gaussian_learned"}
    assert vectors().config == {"for_vectors": expected}


@pytest.mark.parametrize(
    ("network", "decoder"), [("mlp", MLPDecoder), ("conv", PatchDecoder), ("residual", ResidualDecoder)]
)
def test_each_network_has_its_decoder(network: str, decoder: type) -> None:
    assert isinstance(images(network=network).banks.decoders.template, decoder)


@pytest.mark.parametrize(
    ("name", "learned"), [("bernoulli", None), ("gaussian", False), ("gaussian_learned", True)], ids=str
)
def test_likelihoods_have_the_range_of_their_data(name: str, learned: bool | None) -> None:
    for model, data_range in ((images(likelihood=name), (0.0, 1.0)), (vectors(likelihood=name), None)):
        if learned is None:
            assert isinstance(model.likelihood, BernoulliLikelihood)
            continue
        assert isinstance(model.likelihood, GaussianLikelihood)
        assert model.likelihood.learned == learned and model.likelihood.data_range == data_range
        assert model.likelihood.logvar.exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_everything_is_stored_as_asked(dtype: torch.dtype) -> None:
    for model in (images(dtype=dtype, likelihood="gaussian"), vectors(dtype=dtype)):
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        model.split(0)
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert model.dtype == dtype and model.device == torch.device("cpu")
        assert model.elbo(observations(model, 2)).elbo.isfinite().all()


def test_weights_follow_the_generator_and_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    for make in (images, vectors):
        one, same, other = (make(topology=GROWN, generator=seeded(s)).state_dict() for s in (0, 0, 1))
        assert all(torch.equal(one[name], same[name]) for name in one)
        differ = {name for name in one if not torch.equal(one[name], other[name])}
        # What starts the same from every seed is a constant: norms are the identity, and the variance is a half.
        assert all(len(one[name].unique()) == 1 for name in one.keys() - differ)
        assert {
            "banks.heads.0",
            "banks.decoders.5",
            "banks.transitions.6",
            "banks.prior_routers.2",
            "banks.posterior_routers.3",
        } <= differ
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lone_root_is_where_growth_begins() -> None:
    assert images().topology == vectors().topology == TreeTopology.balanced(0)
    assert images(topology=GROWN).topology == GROWN


WHOLE = "must be a whole number, found"
IMAGES = [
    ({"size": 0}, ValueError, "size must hold numbers of at least 1, found (0, 0)"),
    ({"size": (8, -1)}, ValueError, "size must hold numbers of at least 1, found (8, -1)"),
    ({"size": (8, 8, 8)}, ValueError, "size must be (height, width), found (8, 8, 8)"),
    ({"size": (8,)}, ValueError, "size must be (height, width), found (8,)"),
    ({"size": 8.0}, TypeError, "size must be a tuple of whole numbers, found 8.0"),
    ({"size": "8"}, TypeError, "size must be a tuple of whole numbers, found '8'"),
    ({"channels": 0}, ValueError, "channels must be at least 1, found 0"),
    ({"channels": 1.5}, TypeError, f"channels {WHOLE} 1.5"),
    ({"latent": 0}, ValueError, "latent must hold numbers of at least 1, found (0,)"),
    ({"latent": (2, 3)}, ValueError, "latent must be (width,) or (channels, height, width), found (2, 3)"),
    ({"latent": 2.5}, TypeError, "latent must be a tuple of whole numbers, found 2.5"),
    ({"width": 0}, ValueError, "width must be at least 1, found 0"),
    ({"width": 8.0}, TypeError, f"width {WHOLE} 8.0"),
    ({"max_depth": -1}, ValueError, "max_depth must be at least 0, found -1"),
    ({"max_depth": 2.0}, TypeError, f"max_depth {WHOLE} 2.0"),
    ({"network": "vit"}, ValueError, "network must be 'conv', 'mlp' or 'residual', found 'vit'"),
    ({"likelihood": "laplace"}, ValueError, "likelihood must be 'bernoulli', 'gaussian' or 'gaussian_learned', found"),
    (
        {"topology": TreeTopology.chain(4)},
        ValueError,
        "a tree of depth 4 needs as many bottom-up blocks, this model has 3",
    ),
    ({"topology": 3}, TypeError, "topology must be a TreeTopology, found 3; TreeTopology.balanced(0) is a single root"),
    ({"dtype": torch.int32}, TypeError, "only accepts floating point"),
]
VECTORS = [
    ({"features": 0}, ValueError, "features must be at least 1, found 0"),
    ({"features": (3,)}, TypeError, f"features {WHOLE} (3,)"),
    ({"latent": 0}, ValueError, "latent must hold numbers of at least 1, found (0,)"),
    ({"latent": (2, 2, 2)}, ValueError, "latents of vectors are vectors: latent must be one number, found (2, 2, 2)"),
    *[row for row in IMAGES if row[0].keys() & {"width", "max_depth", "likelihood", "topology"}],
]


@pytest.mark.parametrize(("settings", "error", "message"), IMAGES, ids=lambda v: str(v)[:30])
def test_errors_of_images_teach(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        images(**settings)


@pytest.mark.parametrize(("settings", "error", "message"), VECTORS, ids=lambda v: str(v)[:30])
def test_errors_of_vectors_teach(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        vectors(**settings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file large enough for the sizes in a configuration."""
    (tmp_path / "file").write_bytes(bytes(1000))
    return tmp_path / "file"


@pytest.mark.parametrize("config", [{}, {"for_audio": {}}, {"for_images": 3}, {"load": {"path": "x"}}])
def test_a_configuration_names_a_factory(config: dict[str, Any], file: Path) -> None:
    message = f"expected a configuration {{name: arguments}} of for_images or for_vectors, found {config!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(TreeVAE, config, file, {})


def test_a_configuration_must_fit_its_factory(file: Path) -> None:
    for config, why in (
        ({"for_images": {"size": 8, "colour": True}}, "unexpected keyword argument 'colour'"),
        ({"for_images": {}}, "missing 1 required keyword-only argument: 'size'"),
        ({"for_vectors": {"features": 2.5}}, "features must be a whole number, found 2.5"),
    ):
        (factory,) = config
        with pytest.raises(ValueError, match=re.escape(f"its configuration does not fit {factory}: ")) as caught:
            build(TreeVAE, config, file, {})
        assert why in str(caught.value)


class Heard(TreeVAE):
    """A model with a factory of its own, and with names that a file must not call."""

    @classmethod
    def for_audio(cls, *, seconds: int, **more: Any) -> Heard:  # noqa: ANN401
        model = cls.for_vectors(features=2 * seconds, **more)
        model.config = record("for_audio", {"seconds": seconds})
        return model

    def for_each(self) -> None:
        raise AssertionError("a file called a method")

    @staticmethod
    def for_free(**_: Any) -> None:  # noqa: ANN401
        raise AssertionError("a file called a function")


def test_a_factory_of_a_custom_class_is_called_by_its_file(tmp_path: Path) -> None:
    model = Heard.for_audio(seconds=3, topology=TreeTopology.balanced(1), generator=seeded(1))
    model.save(tmp_path / "model")
    found = Heard.load(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["for_each", "for_free", "for_nothing", "load"])
def test_a_file_calls_class_methods_that_begin_with_for_alone(name: str, file: Path) -> None:
    with pytest.raises(ValueError, match="of for_audio or for_images or for_vectors, found"):
        build(Heard, {name: {}}, file, {})


def test_parts_that_would_couple_rows_are_refused() -> None:
    parts = {"topology": TreeTopology.balanced(0), "latent": (2,), "inputs": (3,), "bottom_up": []}
    plain = nn.Linear(1, 1)
    names = ("encoder", "head", "transition", "posterior_router", "prior_router", "decoder")
    with pytest.raises(ValueError, match="a per-node network must not keep buffers"):
        TreeVAE(
            **{**dict.fromkeys(names, plain), "decoder": nn.BatchNorm1d(2)}, likelihood=BernoulliLikelihood(), **parts
        )  # type: ignore[arg-type]

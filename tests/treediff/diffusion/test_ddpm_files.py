"""A second stage in a file: what comes back, what is refused, and the settings that a file holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import GROWN, PRUNED, build
from pairs import TINY, conditions, filled, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import quick, topologies
from torch import Tensor
from worlds import seeded

from treediff import LeafConditionedDDPM, TreeCondition, TreeTopology, TreeVAE
from treediff.core.io import FORMAT_VERSION
from treediff.diffusion import Conditioner, CosineSchedule, NodeEmbedding, UNet
from treediff.diffusion.presets import CONDITIONS, DEFAULTS, SCHEDULES, Inputs

Header = dict[str, Any]
TREES = {"lone root": TreeTopology.balanced(0), "grown": GROWN, "pruned": PRUNED}
# The same nodes, leaves and shapes, but 3 and 4 are under 1 in the one and under 2 in the other.
ONE, OTHER = TreeTopology.balanced(1).split(1).split(2), TreeTopology.balanced(1).split(2).split(1)
each_file = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


def check_same(found: LeafConditionedDDPM, model: LeafConditionedDDPM) -> None:
    assert found.config == model.config and found.index.topology == model.index.topology
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype and torch.equal(theirs[name], value), name


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_round_trip_is_bit_equal(tree: TreeTopology, condition: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(tree, condition=condition, dtype=dtype, condition_noise=0.2, shift=0.3, min_snr=3.0, coarsen=0.1)
    model.save(tmp_path / "model")
    for found in (
        LeafConditionedDDPM.load(tmp_path / "model"),
        LeafConditionedDDPM.load(
            str(tmp_path / "model"), model=small(tree, 5, condition=condition, dtype=dtype, condition_noise=0.2)
        ),
    ):
        assert found.index.topology == model.index.topology
        told = conditions(tree, dtype=dtype)
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    found = LeafConditionedDDPM.load(tmp_path / "model")
    check_same(found, model)
    assert torch.equal(found.sample(told, steps=2, generator=seeded()), model.sample(told, steps=2, generator=seeded()))
    x = torch.rand(4, 1, 8, 8, generator=seeded(), dtype=torch.float64).to(dtype)
    assert torch.equal(found.loss(x, told, generator=seeded()), model.loss(x, told, generator=seeded()))


@each_file
@given(topologies(max_steps=8), st.integers(0, 99))
def test_a_round_trip_on_any_tree(tmp_path: Path, tree: TreeTopology, seed: int) -> None:
    model = small(tree, seed, size=2, multipliers=(1,), condition="path_tokens")
    model.save(tmp_path / "model")
    check_same(LeafConditionedDDPM.load(tmp_path / "model"), model)


@pytest.mark.parametrize(
    "chosen",
    [
        {"size": (6, 4), "channels": 3, "latent": (2, 2, 2), "attention": (6,), "heads": 2, "dropout": 0.1},
        {"schedule": "ddpm", "prediction": "epsilon", "min_snr": 5.0, "coarsen": 0.5, "checkpoint": True},
        {"schedule": "sigmoid", "prediction": "x0", "condition_noise": 0.3, "shift": 1.0, "patch": 2},
    ],
    ids=lambda chosen: next(iter(chosen)),
)
def test_every_setting_comes_back(chosen: dict[str, Any], tmp_path: Path) -> None:
    model = small(**chosen)
    model.save(tmp_path / "model")
    found = LeafConditionedDDPM.load(tmp_path / "model")
    check_same(found, model)
    for name in ("prediction", "coarsen", "condition_noise", "shift"):
        assert getattr(found, name) == getattr(model, name)
        assert name not in chosen or getattr(found, name) == chosen[name]
    assert repr(found) == repr(model) and repr(found.schedule) == repr(model.schedule)
    assert found.config is not None and all(
        found.config["for_images"][k] == (list(v) if isinstance(v, tuple) else v) for k, v in chosen.items()
    )
    level = torch.linspace(-5, 5, 7)
    assert torch.equal(found.weighting(level), model.weighting(level))


def test_the_same_model_makes_the_same_bytes_and_says_what_it_is(tmp_path: Path) -> None:
    model = small(PRUNED, dtype=torch.float64)
    for name in ("one", "two"):
        model.save(tmp_path / name)
    LeafConditionedDDPM.load(tmp_path / "one").save(tmp_path / "three")
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1
    assert header_of(tmp_path / "one") == {
        "class": "LeafConditionedDDPM",
        "config": model.config,
        "dtype": "float64",
        "format": FORMAT_VERSION,
        "topology": json.loads(PRUNED.to_json()),
    }


def test_a_model_from_parts_is_filled(tmp_path: Path) -> None:
    def parts(seed: int) -> LeafConditionedDDPM:
        unet = UNet(1, 1, size=8, width=8, multipliers=(1,), blocks=1)
        model = LeafConditionedDDPM(
            unet=unet, conditioner=NodeEmbedding(GROWN, 32), topology=GROWN, schedule=CosineSchedule()
        )
        filled(model, seed)
        return model

    model, other = parts(0), parts(1)
    model.save(tmp_path / "model")
    message = "was built from parts, which a file does not hold; build it the same way and pass it as model="
    with pytest.raises(ValueError, match=message):
        LeafConditionedDDPM.load(tmp_path / "model")
    assert LeafConditionedDDPM.load(tmp_path / "model", model=other) is other
    check_same(other, model)


def test_loading_leaves_global_state_alone(tmp_path: Path) -> None:
    model, state = small(), torch.get_rng_state()
    model.save(tmp_path / "model")
    LeafConditionedDDPM.load(tmp_path / "model")
    LeafConditionedDDPM.load(tmp_path / "model", model=small(seed=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_without_a_dtype_is_one_of_float32(tmp_path: Path) -> None:
    model = small()
    model.save(tmp_path / "model")
    header = header_of(tmp_path / "model")
    del header["dtype"]
    rewrite(tmp_path / "model", header)
    check_same(LeafConditionedDDPM.load(tmp_path / "model"), model)


# --- what is refused ----------------------------------------------------------------------------------------


def header_of(path: Path) -> Header:
    with safe_open(path, framework="pt") as file:
        found: Header = json.loads(file.metadata()["treediff"])
    return found


def rewrite(path: Path, header: Header, tensors: dict[str, Tensor] | None = None) -> None:
    save_file(load_file(path) if tensors is None else tensors, path, metadata={"treediff": json.dumps(header)})


def refuse(path: Path, message: str, error: type[Exception] = ValueError, *, tree: TreeTopology = GROWN) -> None:
    """Loading into a model fails with the message, and the model stays as it was."""
    model = small(tree, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        LeafConditionedDDPM.load(path, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_tree_is_refused_whatever_the_shapes(tmp_path: Path) -> None:
    model = small(ONE)
    model.save(tmp_path / "model")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in small(OTHER).state_dict().items()}
    message = re.escape(f"is on another tree, {ONE}, than the given one, {OTHER}; build one on the tree of the file")
    refuse(tmp_path / "model", message, tree=OTHER)
    refuse(tmp_path / "model", "is on another tree")
    assert LeafConditionedDDPM.load(tmp_path / "model").index.topology == ONE


def test_another_class_another_network_and_no_file(tmp_path: Path) -> None:
    build(GROWN).save(tmp_path / "tree")
    message = re.escape(f"{str(tmp_path / 'tree')!r} holds a TreeVAE, expected a LeafConditionedDDPM")
    refuse(tmp_path / "tree", message)
    with pytest.raises(ValueError, match=message):
        LeafConditionedDDPM.load(tmp_path / "tree")
    small().save(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a LeafConditionedDDPM, expected a TreeVAE"):
        TreeVAE.load(tmp_path / "model")
    small(condition="node").save(tmp_path / "node")
    refuse(tmp_path / "node", "the file does not fit the model at 'conditioner.parts.0.null'")
    small(dtype=torch.float64).save(tmp_path / "double")
    refuse(tmp_path / "double", r"expected float32 of shape \(1, 1, 1\), found float64")
    refuse(tmp_path / "none", "no model file at", FileNotFoundError)


def settings_in(header: Header) -> Any:  # noqa: ANN401
    return header["config"]["for_images"]


DAMAGE: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no config": (lambda h: h.pop("config"), "was built from parts"),
    "config is a list": (lambda h: h.update(config=[1]), r"expected a configuration \{name: value\}, found list"),
    "unknown setting": (
        lambda h: settings_in(h).update(depth=3),
        "does not describe a model: .*unexpected keyword",
    ),
    "missing setting": (
        lambda h: settings_in(h).pop("size"),
        "does not describe a model: .*missing 1 required",
    ),
    "two trees": (
        lambda h: settings_in(h).update(topology=1),
        "does not describe a model: .*multiple values",
    ),
    "odd number": (
        lambda h: settings_in(h).update(multipliers=[1.5]),
        "does not fit for_images: multipliers must be a tuple of",
    ),
    "word for a number": (
        lambda h: settings_in(h).update(coarsen="a"),
        "does not fit for_images: '<=' not supported",
    ),
    "below 1": (lambda h: settings_in(h).update(width=-8), "must be at least 1, found -"),
    "no such condition": (
        lambda h: settings_in(h).update(condition="leaf"),
        "condition must be one of diffuse_tree_vae, ",
    ),
    "no such schedule": (
        lambda h: settings_in(h).update(schedule="none"),
        "schedule must be one of linear, cosine, sigmoid",
    ),
    "no such prediction": (
        lambda h: settings_in(h).update(prediction="eps"),
        "prediction must be one of epsilon, x0, v;",
    ),
    "another width": (
        lambda h: settings_in(h).update(width=16),
        "the file does not fit the model at 'conditioner.parts.1",
    ),
    "no tree": (lambda h: h.pop("topology"), "expected JSON like .*nodes.*, found 'null'"),
    "bad tree": (lambda h: h["topology"].update(next_id=2), "ids must be at least 0 and below next_id"),
    "another tree": (
        lambda h: h.update(topology=json.loads(TreeTopology.balanced(1).to_json())),
        r"does not fit the model at 'conditioner.parts.1.table.weight': expected float32 of shape \(3, 32\)",
    ),
    "no such dtype": (lambda h: h.update(dtype="float31"), "names the dtype 'float31', expected one like 'float32'"),
    "version": (lambda h: h.update(format=99), "has format version 99, this treediff reads versions 1 and 2"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_header(damage: Callable[[Header], Any], message: str, tmp_path: Path) -> None:
    small().save(tmp_path / "model")
    header, state = header_of(tmp_path / "model"), torch.get_rng_state()
    damage(header)
    rewrite(tmp_path / "model", header)
    with pytest.raises(ValueError, match=message):
        LeafConditionedDDPM.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    if "topology" not in header or header["topology"] != json.loads(GROWN.to_json()):
        refuse(tmp_path / "model", "on another tree|expected JSON like|ids must be")


def test_weights_must_all_be_there(tmp_path: Path) -> None:
    small().save(tmp_path / "model")
    header, tensors = header_of(tmp_path / "model"), load_file(tmp_path / "model")
    for change, message in (
        (
            lambda t: t.pop("unet.out.bias"),
            r"at 'unet.out.bias': expected float32 of shape \(1,\), found no such tensor",
        ),
        (lambda t: t.update(more=torch.zeros(1)), "at 'more': expected no such tensor, found float32"),
    ):
        other = dict(tensors)
        change(other)
        rewrite(tmp_path / "model", header, other)
        refuse(tmp_path / "model", message)
        with pytest.raises(ValueError, match=message):
            LeafConditionedDDPM.load(tmp_path / "model")


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_preset_is_made_of_the_parts_it_names(condition: str) -> None:
    model = small(condition=condition)
    kinds = {
        "diffuse_tree_vae": ["ReconstructionConcat", "NodeEmbedding"],
        "tree_diffusion": ["PathEncoder"],
        "reconstruction": ["ReconstructionConcat"],
        "latent": ["LatentEmbedding"],
        "reconstruction_path": ["ReconstructionConcat", "PathEncoder"],
        "path_tokens": ["PathTokens"],
        "node": ["NodeEmbedding"],
    }
    parts = list(model.conditioner.parts)  # type: ignore[arg-type]
    assert [type(part).__name__ for part in parts] == kinds[condition]
    assert type(model.schedule) is CosineSchedule and set(SCHEDULES) == {"linear", "cosine", "sigmoid", "ddpm"}


def test_a_new_condition_is_one_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(NodeEmbedding):
        pass

    def own(of: Inputs) -> Conditioner:
        return Own(of.topology, of.width, **of.factory)

    monkeypatch.setitem(CONDITIONS, "own", (own,))
    model = small(condition="own")
    model.save(tmp_path / "model")
    found = LeafConditionedDDPM.load(tmp_path / "model")
    check_same(found, model)
    assert [type(part) for part in found.conditioner.parts] == [Own]  # type: ignore[union-attr]


def test_settings_are_recorded_whole() -> None:
    model = small(attention=(8,))
    assert model.config is not None and list(model.config) == ["for_images"]
    recorded = model.config["for_images"]
    assert recorded.keys() == {*DEFAULTS, "size", "channels", "latent"} and recorded["attention"] == [8]
    assert json.loads(json.dumps(recorded)) == recorded


def test_a_model_for_a_tree_takes_what_the_tree_has() -> None:
    tree = build(PRUNED, "colour")
    with torch.random.fork_rng(devices=[]):
        model = LeafConditionedDDPM.for_tree(tree, **TINY, condition="tree_diffusion")
    assert model.index.topology is tree.topology and model.unet.size == (8, 8) and model.unet.out_channels == 3
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.sample(TreeCondition.at([0, 7]), steps=1).shape == (2, 3, 8, 8)
    message = re.escape("expected a tree of images (C, H, W), found one of inputs of shape (3,)")
    with pytest.raises(ValueError, match=message):
        LeafConditionedDDPM.for_tree(build(GROWN))


def test_initial_weights_come_from_the_generator_and_the_global_state_is_left_alone() -> None:
    def made(seed: int) -> dict[str, Tensor]:
        build_one = LeafConditionedDDPM.for_images
        return build_one(size=8, latent=(2,), topology=GROWN, **TINY, generator=seeded(seed)).state_dict()

    state = torch.get_rng_state()
    first, again, other = made(1), made(1), made(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["unet.stem.weight"], other["unet.stem.weight"])
    tree = TreeVAE.for_images(size=8, latent=2, topology=GROWN, generator=seeded(0))
    for_tree = LeafConditionedDDPM.for_tree(tree, **TINY, generator=seeded(1)).state_dict()
    assert all(torch.equal(first[name], for_tree[name]) for name in first)
    one, two = (LeafConditionedDDPM.for_tree(tree, **TINY) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(one.unet.stem.weight, two.unet.stem.weight)


def test_a_model_on_the_meta_device_draws_nothing() -> None:
    state = torch.get_rng_state()
    model = LeafConditionedDDPM.for_images(size=8, latent=(2,), topology=GROWN, **TINY, device="meta")
    assert torch.equal(torch.get_rng_state(), state) and all(p.is_meta for p in model.parameters())
    real = small()
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    told = TreeCondition.at(GROWN.leaves)
    found, expected = (m.sample(told, steps=2, generator=seeded(), guidance=2.0) for m in (model, real))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("settings", [{"schedule": "ddpm"}, {"prediction": "epsilon"}])
def test_is_built_inside_of_the_meta_device(settings: dict[str, str]) -> None:
    with torch.device("meta"):
        model = LeafConditionedDDPM.for_images(**{"size": 8, "latent": (2,), "topology": GROWN, **TINY, **settings})
    assert all(p.is_meta for p in model.parameters())

"""What is saved comes back bit by bit, and the same model always makes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear import linear_model
from models import GROWN, KINDS, PRUNED, build, noise_for, observations
from safetensors import safe_open
from strategies import quick, topologies
from torch import nn
from worlds import UNEVEN, seeded, world

from treediff import TreeTopology, TreeVAE
from treediff.core import io as treediff_io
from treediff.core.io import FORMAT_VERSION, load_into, read_header, save_model

TREES = {"lone root": TreeTopology.balanced(0), "chain": TreeTopology.chain(2), "grown": GROWN, "pruned": PRUNED}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_file = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


def check_same(found: TreeVAE, model: TreeVAE) -> None:
    """Tree, ids, configuration, dtypes and every bit."""
    assert found.topology == model.topology and found.config == model.config
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype
        # As integers: NaN is equal to itself and 0 is not -0.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
        assert torch.equal(theirs[name].view(bits), value.view(bits)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_round_trip_is_bit_equal(tree: TreeTopology, kind: str, tmp_path: Path) -> None:
    model = build(tree, kind)
    model.save(tmp_path / "model.safetensors")
    found = TreeVAE.load(tmp_path / "model.safetensors")
    check_same(found, model)
    x, noise = observations(model, 2), noise_for(model, 2)
    assert torch.equal(found.elbo(x, noise=noise).elbo, model.elbo(x, noise=noise).elbo)
    assert torch.equal(found.sample(3, generator=seeded()).images, model.sample(3, generator=seeded()).images)


@each_file
@given(topologies(max_steps=8), st.integers(0, 2**32), st.sampled_from(DTYPES))
def test_a_round_trip_of_any_tree(tmp_path: Path, tree: TreeTopology, seed: int, dtype: torch.dtype) -> None:
    model = build(tree, seed=seed, dtype=dtype)
    with torch.no_grad():
        model.banks.heads.weights_of(tree.root)[:3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)
    model.save(tmp_path / "model")
    check_same(TreeVAE.load(tmp_path / "model"), model)


def test_models_that_grew_and_shrank_come_back(tmp_path: Path) -> None:
    model = build(TreeTopology.balanced(1))
    model.split(1, generator=seeded(1))
    model.split(2, warm_start=True, generator=seeded(2))
    model.prune(3)
    model.save(tmp_path / "model")
    found = TreeVAE.load(tmp_path / "model")
    check_same(found, model)
    # Ids are never used twice, after a restart neither.
    assert found.split(4, generator=seeded()) == model.split(4, generator=seeded()) == (7, 8)


def test_a_model_from_parts_is_filled(tmp_path: Path) -> None:
    model = linear_model(world(UNEVEN))
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="was built from parts, which a file does not hold; build it the same way"):
        TreeVAE.load(tmp_path / "model")
    other = linear_model(world(TreeTopology.chain(3)), seed=3)  # a ladder of the same length
    found = TreeVAE.load(tmp_path / "model", model=other)
    assert found is other
    check_same(found, model)
    x = torch.randn(3, 3, generator=seeded()).double()
    assert torch.equal(found.leaf_log_probs(x), model.leaf_log_probs(x))


def test_a_tree_of_the_same_ids_and_another_shape_replaces_the_old_one(tmp_path: Path) -> None:
    model, other = build(TreeTopology.balanced(1)), build(TreeTopology.chain(2))
    assert model.topology.ids == other.topology.ids
    model.save(tmp_path / "model")
    x = observations(model, 2)
    other.cluster(x)  # a layout of the old tree is kept from now on
    TreeVAE.load(tmp_path / "model", model=other)
    assert torch.equal(other.leaf_log_probs(x), model.leaf_log_probs(x))


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    grown = build(TreeTopology.balanced(1))
    grown.split(2, generator=seeded())
    grown.split(1, generator=seeded())
    for model in (build(PRUNED, "maps"), grown):
        names = ("one", "two", "loaded", "copied")
        one, two, loaded, copied = (tmp_path / name for name in names)
        model.save(one)
        model.save(two)
        TreeVAE.load(one).save(loaded)
        twin = build(model.topology, "maps" if len(model.inputs) == 3 else "vectors", seed=9)
        twin.load_state_dict(model.state_dict())
        twin.save(copied)
        assert one.read_bytes() == two.read_bytes() == loaded.read_bytes() == copied.read_bytes()


def test_the_header_is_one_key_of_canonical_json(tmp_path: Path) -> None:
    model = build(PRUNED, "mlp")
    model.save(tmp_path / "model")
    with safe_open(tmp_path / "model", framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["treediff"]
    header = json.loads(metadata["treediff"])
    assert metadata["treediff"] == json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert header == {
        "class": "TreeVAE",
        "config": model.config,
        "dtype": "float64",
        "format": FORMAT_VERSION,
        "topology": json.loads(PRUNED.to_json()),
    }
    assert read_header(tmp_path / "model", "TreeVAE") == header


def test_a_configuration_makes_the_same_networks(tmp_path: Path) -> None:
    for kind in KINDS:
        model = build(GROWN, kind)
        assert model.config is not None
        model.save(tmp_path / "model")
        found = treediff_io.build(TreeVAE, json.loads(json.dumps(model.config)), tmp_path / "model", {})
        assert found.config == model.config and found.topology == TreeTopology.balanced(0)
        shapes = {name: v.shape for name, v in build(TreeTopology.balanced(0), kind).state_dict().items()}
        assert {name: v.shape for name, v in found.state_dict().items()} == shapes


def test_saving_and_loading_leave_global_state_alone(tmp_path: Path) -> None:
    model, state = build(PRUNED), torch.get_rng_state()
    model.save(tmp_path / "model")
    TreeVAE.load(tmp_path / "model")
    TreeVAE.load(tmp_path / "model", model=build(GROWN))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_model_can_be_trained_and_grown(tmp_path: Path) -> None:
    build(GROWN).save(tmp_path / "model")
    model = TreeVAE.load(tmp_path / "model")
    assert all(p.requires_grad for p in model.parameters())
    model.split(1)
    model.elbo(observations(model, 3)).loss().backward()
    assert model.banks.decoders.weights_of(7).grad is not None


def test_what_is_frozen_in_the_given_model_stays_frozen(tmp_path: Path) -> None:
    build(GROWN).save(tmp_path / "model")
    model = build(GROWN, seed=5)
    model.banks.heads.weights_of(0).requires_grad_(False)
    TreeVAE.load(tmp_path / "model", model=model)
    assert not model.banks.heads.weights_of(0).requires_grad and model.banks.heads.weights_of(1).requires_grad


def test_paths_may_be_text(tmp_path: Path) -> None:
    model = build()
    model.save(str(tmp_path / "model"))
    check_same(TreeVAE.load(str(tmp_path / "model")), model)


def test_any_module_can_be_saved(tmp_path: Path) -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_model(module, tmp_path / "linear", {"of": "mine"})
    assert read_header(tmp_path / "linear", "Linear")["of"] == "mine"
    load_into(other, tmp_path / "linear")
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)


class Noted(nn.Linear):
    """Keeps something in its state that is no tensor."""

    def get_extra_state(self) -> Any:  # noqa: ANN401
        return {"note": 1}

    def set_extra_state(self, state: Any) -> None:  # noqa: ANN401
        pass


def test_only_tensors_and_plain_json_are_written(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(TypeError, match=r"a file holds tensors only, found something else .* at \['_extra_state'\]"):
        save_model(Noted(1, 1), path, {})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save_model(nn.Linear(1, 1), path, {"of": torch.zeros(1)})
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        save_model(nn.Linear(1, 1), path, {"of": float("nan")})
    assert list(tmp_path.iterdir()) == []

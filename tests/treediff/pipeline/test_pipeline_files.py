"""Both stages in one file: what comes back, and what is refused and leaves everything as it was."""

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
from models import GROWN, PRUNED, build, observations
from pairs import TINY, filled, pair
from safetensors.torch import load_file
from strategies import quick, topologies
from test_ddpm_files import ONE, OTHER, header_of, rewrite
from worlds import seeded

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, TreeTopology, TreeVAE
from treediff.diffusion import CosineSchedule, NodeEmbedding, UNet
from treediff.diffusion.presets import CONDITIONS

TREES = {"lone root": TreeTopology.balanced(0), "grown": GROWN, "pruned": PRUNED}
each_file = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)


def check_same(found: DiffuseTreeVAE, model: DiffuseTreeVAE) -> None:
    assert found.tree_vae.topology == model.tree_vae.topology == found.ddpm.index.topology
    assert found.tree_vae.config == model.tree_vae.config and found.ddpm.config == model.ddpm.config
    ours, theirs = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype and torch.equal(theirs[name], value), name


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_a_round_trip_is_bit_equal(tree: TreeTopology, condition: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tree, condition=condition, dtype=dtype)
    model.save(tmp_path / "model")
    found = DiffuseTreeVAE.load(tmp_path / "model")
    check_same(found, model)
    given = pair(tree, condition=condition, dtype=dtype)
    filled(given, 7)
    assert DiffuseTreeVAE.load(str(tmp_path / "model"), model=given) is given
    check_same(given, model)
    x = observations(model.tree_vae, 3)
    for other in (found, given):
        for one, two in (
            (model.generate(3, generator=seeded(), steps=2), other.generate(3, generator=seeded(), steps=2)),
            (model.refine(x, generator=seeded(), steps=2), other.refine(x, generator=seeded(), steps=2)),
        ):
            assert torch.equal(one.images, two.images) and torch.equal(one.coarse, two.coarse)
        assert torch.equal(model.loss(x, generator=seeded()), other.loss(x, generator=seeded()))


@each_file
@given(topologies(max_steps=6), st.sampled_from(["conv", "mlp", "maps"]))
def test_a_round_trip_of_any_tree(tmp_path: Path, tree: TreeTopology, kind: str) -> None:
    model = pair(tree, kind, multipliers=(1,))
    model.save(tmp_path / "model")
    check_same(DiffuseTreeVAE.load(tmp_path / "model"), model)


def test_each_stage_can_be_saved_alone(tmp_path: Path) -> None:
    model = pair(PRUNED)
    model.tree_vae.save(tmp_path / "first")
    model.ddpm.save(tmp_path / "second")
    found = DiffuseTreeVAE(TreeVAE.load(tmp_path / "first"), LeafConditionedDDPM.load(tmp_path / "second"))
    check_same(found, model)


def test_stages_may_have_their_own_precision(tmp_path: Path) -> None:
    tree_vae = build(GROWN, "conv", dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        ddpm = LeafConditionedDDPM.for_images(size=6, latent=(3,), topology=GROWN, **TINY)
    model = DiffuseTreeVAE(tree_vae, ddpm)
    model.save(tmp_path / "model")
    found = DiffuseTreeVAE.load(tmp_path / "model")
    check_same(found, model)
    assert found.tree_vae.dtype == torch.float64 and found.ddpm.unet.out.weight.dtype == torch.float32


def test_one_header_describes_both(tmp_path: Path) -> None:
    model = pair(PRUNED)
    model.save(tmp_path / "one")
    DiffuseTreeVAE.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tree = json.loads(PRUNED.to_json())
    assert header_of(tmp_path / "one") == {
        "class": "DiffuseTreeVAE",
        "format": 2,
        "tree_vae": {"config": model.tree_vae.config, "dtype": "float64", "topology": tree},
        "ddpm": {"config": model.ddpm.config, "dtype": "float64", "topology": tree},
    }


def test_a_stage_from_parts_is_filled(tmp_path: Path) -> None:
    def parts(seed: int) -> DiffuseTreeVAE:
        unet = UNet(1, 1, size=6, width=8, multipliers=(1,), blocks=1)
        ddpm = LeafConditionedDDPM(
            unet=unet, conditioner=NodeEmbedding(GROWN, 32), topology=GROWN, schedule=CosineSchedule()
        )
        filled(ddpm, seed)
        return DiffuseTreeVAE(build(GROWN, "conv", seed=seed, dtype=torch.float32), ddpm)

    model, other = parts(0), parts(1)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="was built from parts, which a file does not hold"):
        DiffuseTreeVAE.load(tmp_path / "model")
    check_same(DiffuseTreeVAE.load(tmp_path / "model", model=other), model)


def test_loading_leaves_global_state_alone(tmp_path: Path) -> None:
    model, state = pair(), torch.get_rng_state()
    model.save(tmp_path / "model")
    DiffuseTreeVAE.load(tmp_path / "model")
    DiffuseTreeVAE.load(tmp_path / "model", model=pair())
    assert torch.equal(torch.get_rng_state(), state)


# --- what is refused ----------------------------------------------------------------------------------------


def refuse(path: Path, message: str, *, tree: TreeTopology = GROWN, alone: bool = True) -> None:
    """Loading fails with the message, into a model (which stays as it was) and, unless said otherwise, without one."""
    model = pair(tree)
    filled(model, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        DiffuseTreeVAE.load(path, model=model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert model.tree_vae.topology == tree == model.ddpm.index.topology
    if alone:
        with pytest.raises(ValueError, match=message):
            DiffuseTreeVAE.load(path)


def test_another_tree_is_refused_whatever_the_shapes(tmp_path: Path) -> None:
    """Nodes and shapes are the same; only who is whose child differs."""
    model = pair(ONE)
    model.save(tmp_path / "model")
    assert model.state_dict().keys() == pair(OTHER).state_dict().keys()
    refuse(
        tmp_path / "model",
        re.escape(f"is on another tree, {ONE}, than the given one, {OTHER}"),
        tree=OTHER,
        alone=False,
    )
    refuse(tmp_path / "model", "is on another tree", alone=False)
    check_same(DiffuseTreeVAE.load(tmp_path / "model"), model)


def test_another_class(tmp_path: Path) -> None:
    model = pair()
    model.tree_vae.save(tmp_path / "first")
    model.ddpm.save(tmp_path / "second")
    model.save(tmp_path / "both")
    refuse(tmp_path / "first", "holds a TreeVAE, expected a DiffuseTreeVAE")
    refuse(tmp_path / "second", "holds a LeafConditionedDDPM, expected a DiffuseTreeVAE")
    with pytest.raises(ValueError, match="holds a DiffuseTreeVAE, expected a TreeVAE"):
        TreeVAE.load(tmp_path / "both")
    with pytest.raises(ValueError, match="holds a DiffuseTreeVAE, expected a LeafConditionedDDPM"):
        LeafConditionedDDPM.load(tmp_path / "both")
    with pytest.raises(FileNotFoundError, match="no model file at"):
        DiffuseTreeVAE.load(tmp_path / "none")


ELSEWHERE = json.loads(PRUNED.to_json())
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no first stage": (lambda h: h.pop("tree_vae"), "is damaged: it describes no two stages"),
    "no second stage": (lambda h: h.pop("ddpm"), "is damaged: it describes no two stages"),
    "a list": (lambda h: h.update(ddpm=[1]), "is damaged: it describes no two stages"),
    "version": (lambda h: h.update(format=3), "has format version 3, this treediff reads versions 1 and 2"),
}
# A model that is given has its own settings, so the file's are not read.
DAMAGE_ALONE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda h: h["ddpm"].update(config=None), "was built from parts"),
    "two trees": (lambda h: h["tree_vae"].update(topology=ELSEWHERE), "both stages must have one tree"),
    "two shapes": (
        lambda h: h["ddpm"]["config"]["for_images"].update(size=8),
        "both stages must have images of one shape",
    ),
    "odd setting": (lambda h: h["ddpm"]["config"]["for_images"].update(heads="a"), "does not describe a model"),
    "another width": (
        lambda h: h["ddpm"]["config"]["for_images"].update(width=16),
        "the file does not fit the model at 'ddpm.",
    ),
    "other latents": (lambda h: h["tree_vae"]["config"]["for_images"].update(latent=[4]), "does not fit .* 'tree_vae."),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_header(damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    pair().save(tmp_path / "model")
    header = header_of(tmp_path / "model")
    damage(header)
    rewrite(tmp_path / "model", header)
    refuse(tmp_path / "model", message)


@pytest.mark.parametrize(("damage", "message"), DAMAGE_ALONE.values(), ids=DAMAGE_ALONE)
def test_a_damaged_description(damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    pair().save(tmp_path / "model")
    header, state = header_of(tmp_path / "model"), torch.get_rng_state()
    damage(header)
    rewrite(tmp_path / "model", header)
    with pytest.raises(ValueError, match=message):
        DiffuseTreeVAE.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["tree_vae.banks.decoders.5", "ddpm.unet.out.weight"])
def test_weights_of_both_must_be_there(name: str, tmp_path: Path) -> None:
    pair().save(tmp_path / "model")
    header, tensors = header_of(tmp_path / "model"), load_file(tmp_path / "model")
    del tensors[name]
    rewrite(tmp_path / "model", header, tensors)
    refuse(tmp_path / "model", f"the file does not fit the model at '{name}': expected .*, found no such tensor")

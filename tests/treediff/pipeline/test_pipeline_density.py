"""A density beside both stages: what is drawn from it, and how it is saved and read with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GROWN, PRUNED, observations
from pairs import filled, pair
from safetensors.torch import load_file
from test_ddpm_files import header_of, rewrite
from test_density import filled_density
from test_pipeline import check_same, each_tree, part_of
from test_pipeline_files import check_same as check_same_model
from test_pipeline_files import refuse
from worlds import seeded

from treediff import DiffuseTreeVAE, TreeTopology
from treediff.core.noise import seed_from
from treediff.diffusion import DDPMSampler
from treediff.pipeline.conditions import condition_of_sample
from treediff.pipeline.density import LeafDensity
from treediff.pipeline.model import Refined


def with_density(
    tree: TreeTopology = GROWN,
    dtype: torch.dtype = torch.float64,
    **settings: Any,  # noqa: ANN401
) -> DiffuseTreeVAE:
    model = pair(tree, **settings)
    return DiffuseTreeVAE(model.tree_vae, model.ddpm, filled_density(model.tree_vae, components=2, dtype=dtype))


# --- drawing ------------------------------------------------------------------------------------------------


@each_tree
@pytest.mark.parametrize("condition", ["reconstruction_path", "path_tokens"])
def test_generating_from_a_density_is_one_stage_after_the_other(condition: str, tree: TreeTopology) -> None:
    model = with_density(tree, condition=condition)
    settings: dict[str, Any] = {"temperature": 0.7, "first_index": 3}
    assert model.density is not None
    for place in (
        {},
        {"node": tree.root},
        {"node": tree.path(tree.leaves[-1])[-1 - (len(tree) > 1)]},
        {"leaf": tree.leaves[-1]},
    ):
        found = model.generate(4, latents="density", **place, **settings, generator=seeded(1), steps=3)
        seed = seed_from(seeded(1))
        node = next(iter(place.values()), None)
        drawn = model.density.sample(model.tree_vae, 4, node=node, **settings, generator=seeded(seed))
        told = condition_of_sample(drawn, tree)
        images = model.ddpm.sample(told, first_index=3, generator=seeded(seed), steps=3)
        check_same(found, Refined(images, drawn.images, drawn.leaf))
        assert set(found.leaf.tolist()) <= set(tree.leaves_under(tree.root if node is None else node))


def test_a_density_changes_what_is_generated_and_nothing_else() -> None:
    model = with_density()
    plain = DiffuseTreeVAE(model.tree_vae, model.ddpm)
    x = observations(model.tree_vae, 3)
    prior = {"latents": "prior"}
    for way, start, settings in (("generate", 3, prior), ("generate_tree", 3, {}), ("refine", x, {})):
        one, two = (getattr(m, way)(start, generator=seeded(1), steps=2, **settings) for m in (model, plain))
        assert torch.equal(one.images, two.images) and torch.equal(one.coarse, two.coarse)
    assert torch.equal(model.loss(x, generator=seeded(1)), plain.loss(x, generator=seeded(1)))
    for latents, same in ((None, model), ("density", model), ("prior", plain)):
        check_same(model.generate(3, latents=latents, generator=seeded(1), steps=2), generate_three(same))
    assert not torch.isclose(generate_three(model).coarse, generate_three(plain).coarse).all()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def generate_three(model: DiffuseTreeVAE) -> Refined:
    return model.generate(3, generator=seeded(1), steps=2)


def test_an_image_from_a_density_does_not_depend_on_its_batch() -> None:
    model = with_density()
    settings: dict[str, Any] = {"latents": "density", "steps": 2, "sampler": DDPMSampler("large")}
    whole = model.generate(7, generator=seeded(5), **settings)
    for first, n in ((0, 1), (3, 1), (2, 4), (7, 0)):
        part = model.generate(n, first_index=first, generator=seeded(5), **settings)
        check_same(part, part_of(whole, slice(first, first + n)))


def test_a_density_may_come_later() -> None:
    model = pair()
    message = (
        "this model has no density to draw latents from; fit one: model.density = LeafDensity.fit(model.tree_vae, "
    )
    with pytest.raises(ValueError, match=re.escape(message + "images)")):
        model.generate(2, latents="density")
    with pytest.raises(ValueError, match="latents must be 'prior' or 'density', found 'posterior'"):
        model.generate(2, latents="posterior")
    x = observations(model.tree_vae, 200)
    model.density = LeafDensity.fit(model.tree_vae, x, components=2, generator=seeded(1))
    found = model.generate(5, latents="density", generator=seeded(2), steps=2)
    drawn = model.density.sample(model.tree_vae, 5, generator=seeded(seed_from(seeded(2))))
    assert torch.equal(found.coarse, drawn.images) and torch.equal(found.leaf, drawn.leaf)
    model.density = None
    with pytest.raises(ValueError, match="this model has no density"):
        model.generate(2, latents="density")


def test_a_density_must_be_of_the_same_tree() -> None:
    model = pair()
    for density in (LeafDensity(PRUNED, (3,)), LeafDensity(GROWN, (4,))):
        with pytest.raises(ValueError, match=r"the density is for latents .* fit a density to this TreeVAE with"):
            DiffuseTreeVAE(model.tree_vae, model.ddpm, density)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_tree
def test_a_density_is_saved_with_the_stages(tree: TreeTopology, dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_density(tree, dtype)
    model.save(tmp_path / "model")
    found = DiffuseTreeVAE.load(tmp_path / "model")
    check_same_model(found, model)
    expected = model.generate(4, latents="density", generator=seeded(), steps=2)
    drawn = found.generate(4, latents="density", generator=seeded(), steps=2)
    assert torch.equal(drawn.images, expected.images) and torch.equal(drawn.coarse, expected.coarse)
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    name = str(dtype).removeprefix("torch.")
    described = {"components": 2, "dtype": name, "latent": [3], "topology": json.loads(tree.to_json())}
    assert header_of(tmp_path / "model")["density"] == described


def test_a_given_model_takes_on_the_density_of_the_file_or_none(tmp_path: Path) -> None:
    plain, dense = pair(), with_density()
    plain.save(tmp_path / "plain")
    dense.save(tmp_path / "dense")
    assert "density" not in header_of(tmp_path / "plain") and DiffuseTreeVAE.load(tmp_path / "plain").density is None
    for build_one in (pair, with_density):
        for name, expected in (("plain", plain), ("dense", dense)):
            model = build_one()
            filled(model, 3)
            assert DiffuseTreeVAE.load(tmp_path / name, model=model) is model
            check_same_model(model, expected)


def test_a_file_that_does_not_fit_leaves_the_density_as_it_was(tmp_path: Path) -> None:
    with_density(PRUNED).save(tmp_path / "pruned")
    pair().save(tmp_path / "plain")
    header, tensors = header_of(tmp_path / "plain"), load_file(tmp_path / "plain")
    rewrite(tmp_path / "plain", header, {**tensors, "odd": torch.zeros(1)})
    model = with_density()
    density = model.density
    for name, message in (("pruned", "is on another tree"), ("plain", "does not fit the model at 'odd'")):
        with pytest.raises(ValueError, match=message):
            DiffuseTreeVAE.load(tmp_path / name, model=model)
        assert model.density is density
        check_same_model(model, with_density())


DAMAGED_DENSITY: dict[str, tuple[Any, str]] = {
    "nothing": (None, "it describes no density, None"),
    "a list": ([1], re.escape("it describes no density, [1]")),
    "no latent": ({"latent": ...}, "is damaged: it describes no density"),
    "no components": ({"components": ...}, "is damaged: it describes no density"),
    "no tree": ({"topology": ...}, "is damaged: it describes no density"),
    "latent": ({"latent": 3}, "does not describe a model: 'int' object is not iterable"),
    "components": ({"components": "2"}, "does not describe a model: components must be a whole number, found '2'"),
    "too few": ({"components": 0}, "components must be at least 1, found 0"),
    "more": ({"components": 3}, "the file does not fit the model at 'density.factors'"),
    "dtype": ({"dtype": "float16"}, "the file does not fit the model at 'density.factors'"),
    "no dtype": ({"dtype": ...}, "names the dtype None, expected one like 'float32'"),
    "elsewhere": ({"topology": json.loads(PRUNED.to_json())}, "the density is for latents"),
    "a tree of nothing": ({"topology": 1}, "expected JSON like"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED_DENSITY.values(), ids=DAMAGED_DENSITY)
def test_a_damaged_description_of_a_density(damage: Any, message: str, tmp_path: Path) -> None:  # noqa: ANN401
    with_density().save(tmp_path / "model")
    header = header_of(tmp_path / "model")
    if isinstance(damage, dict):
        damage = {key: value for key, value in {**header["density"], **damage}.items() if value is not ...}
    rewrite(tmp_path / "model", {**header, "density": damage})
    refuse(tmp_path / "model", message)


@pytest.mark.parametrize("name", ["shares", "weights", "means", "factors"])
def test_every_table_of_a_density_must_be_there(name: str, tmp_path: Path) -> None:
    with_density().save(tmp_path / "model")
    header, tensors = header_of(tmp_path / "model"), load_file(tmp_path / "model")
    del tensors[f"density.{name}"]
    rewrite(tmp_path / "model", header, tensors)
    refuse(
        tmp_path / "model", f"the file does not fit the model at 'density.{name}': expected .*, found no such tensor"
    )

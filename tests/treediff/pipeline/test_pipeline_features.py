"""A tree of features and a second stage of images: the pair is the two, and the map from images to features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import GROWN
from pairs import TINY, filled
from torch import Tensor, nn
from worlds import seeded

from treediff import DiffuseTreeVAE, LeafConditionedDDPM, LeafDensity, TreeVAE
from treediff.core import io
from treediff.core.rows import Rows
from treediff.pictures import summarize_tree
from treediff.pipeline.conditions import condition_of
from treediff.tree.files import header_of

IMAGES = torch.rand(6, 3, 8, 8, generator=seeded(1))


class Network(nn.Module):
    """Six features, with dropout and a norm of batches that only evaluation mode makes a function of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        built = Network()
    return filled(built, 5)  # type: ignore[return-value]


def tree() -> TreeVAE:
    model = TreeVAE.for_vectors(features=6, latent=2, width=8, topology=GROWN, generator=seeded(0))
    return filled(model, 1)  # type: ignore[return-value]


def pair(**settings: Any) -> DiffuseTreeVAE:  # noqa: ANN401
    model = tree()
    ddpm = LeafConditionedDDPM.for_tree(model, size=8, generator=seeded(2), **{**TINY, **settings})
    return DiffuseTreeVAE(model, filled(ddpm, 3), features=network())  # type: ignore[arg-type]


def test_the_tree_observes_features_and_the_second_stage_draws_images() -> None:
    model = pair()
    assert model.ddpm.config is not None and model.ddpm.config["for_images"]["condition"] == "tree_diffusion"
    features = copy.deepcopy(model.features).eval()(IMAGES)  # type: ignore[union-attr]
    assert torch.equal(model.observe(IMAGES), features)
    assert torch.equal(model.cluster(IMAGES), model.tree_vae.cluster(features))
    condition = model.condition_of(IMAGES, generator=seeded(3))
    expected = condition_of(model.tree_vae, features, decode=False, generator=seeded(3))
    assert torch.equal(condition.node, expected.node) and torch.equal(condition.z, expected.z)  # type: ignore[arg-type]
    generator = seeded(4)
    loss = model.loss(IMAGES, generator=generator)
    again = seeded(4)
    expected = condition_of(model.tree_vae, features, decode=False, generator=again)
    assert torch.equal(loss, model.ddpm.loss(IMAGES, expected, generator=again))
    for made in (model.generate(4, steps=2), model.refine(IMAGES, steps=2), model.generate_tree(2, steps=2)):
        assert made.images.shape[-3:] == (3, 8, 8) and made.coarse is None
    assert model.refine(IMAGES, leaf="all", steps=2).coarse is None
    column = model.generate(2, leaf=GROWN.leaves[1], latents="prior", steps=2, generator=seeded(5)).images
    torch.testing.assert_close(model.generate_tree(2, steps=2, generator=seeded(5)).images[:, 1], column)


def test_the_network_is_frozen_and_never_in_training_mode() -> None:
    model = pair().train()
    before = {name: x.clone() for name, x in model.state_dict().items() if name.startswith("features")}
    assert torch.equal(model.observe(IMAGES), model.observe(IMAGES)) and model.features.training  # type: ignore[union-attr]
    model.loss(IMAGES, generator=seeded(0)).backward()
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())
    assert all(weight.grad is None for weight in model.features.parameters())  # type: ignore[union-attr]


def test_the_pair_is_one_file(tmp_path: Path) -> None:
    model = pair()
    observed = Rows(model.observe(torch.rand(300, 3, 8, 8, generator=seeded(6))))
    model.density = LeafDensity.fit(model.tree_vae, observed, components=1, generator=seeded(7))
    model.save(tmp_path / "pair.safetensors")
    with torch.random.fork_rng(devices=[]):
        found = DiffuseTreeVAE.load(tmp_path / "pair.safetensors", features=Network())
    for name, x in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], x), name
    first, second = (each.eval().generate(3, steps=2, generator=seeded(8)).images for each in (model, found))
    assert torch.equal(first, second)
    filled(found, 9)
    DiffuseTreeVAE.load(tmp_path / "pair.safetensors", model=found)
    assert torch.equal(found.observe(IMAGES), model.observe(IMAGES))
    with pytest.raises(ValueError, match=r"has feature map, a Network; found none as features="):
        DiffuseTreeVAE.load(tmp_path / "pair.safetensors")


def test_weights_of_a_network_can_be_left_out_of_the_file(tmp_path: Path) -> None:
    model, whole, short = pair(), tmp_path / "whole.safetensors", tmp_path / "short.safetensors"
    model.save(whole)
    model.save(short, leave_out=["network.1"])
    names = set(io.read_tensors(whole)) - set(io.read_tensors(short))
    assert names == {"features.network.1.weight", "features.network.1.bias"}
    given = network()
    filled(given.network[2], 8)  # what is in the file is filled in
    found = DiffuseTreeVAE.load(short, features=given)
    assert torch.equal(found.observe(IMAGES), model.observe(IMAGES))
    filled(found.ddpm, 9)
    DiffuseTreeVAE.load(short, model=found)
    assert all(torch.equal(found.state_dict()[name], x) for name, x in model.state_dict().items())
    other = network()
    filled(other.network[1], 8)
    for features, message in (
        (
            other,
            r"saved without the weights of module 'network.1' .* found a Linear with other weights; pass features=",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 6)),
            "weights of module 'network.1' of the feature map, found none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DiffuseTreeVAE.load(short, features=features)
    with pytest.raises(
        ValueError, match=r"leave_out names modules of the feature map, \['network', .*found \['', '7'\]"
    ):
        model.save(short, leave_out=["", "7"])


def test_a_damaged_note_of_what_was_left_out_is_refused(tmp_path: Path) -> None:
    model, path = pair(), tmp_path / "pair.safetensors"
    header = {"tree_vae": header_of(model.tree_vae), "ddpm": model.ddpm.header(), "features": "Network"}
    for damaged in (["network"], {"network": 3}):
        io.save_model(model, path, {**header, "left_out": damaged})
        with pytest.raises(ValueError, match="is damaged: 'left_out' is"):
            DiffuseTreeVAE.load(path, features=network())


def test_a_feature_map_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    model = tree()
    pixels = TreeVAE.for_images(size=8, latent=2, width=8, network="mlp", topology=GROWN)
    DiffuseTreeVAE(pixels, LeafConditionedDDPM.for_tree(pixels, **TINY)).save(tmp_path / "pair.safetensors")
    with pytest.raises(ValueError, match="has no feature map; found a Flatten as features="):
        DiffuseTreeVAE.load(tmp_path / "pair.safetensors", features=nn.Flatten())
    assert model.inputs == (6,)


def test_pictures_show_images_of_the_second_stage() -> None:
    model = pair().eval()
    drawn: list[Tensor] = []

    def refine(sample: Any) -> Tensor:  # noqa: ANN401
        drawn.append(model.ddpm.sample(model.condition_of_sample(sample), steps=2, generator=seeded(0)))
        return drawn[-1]

    summary = summarize_tree(
        model.tree_vae, IMAGES, samples=2, generator=seeded(1), observe=model.observe, refine=refine
    )
    leaf_of = model.cluster(IMAGES)
    for node, images in zip(summary.nodes, drawn, strict=True):
        assert np.array_equal(node.samples, images.numpy().clip(0, 1)) and node.refined is None
        if node.id in GROWN.leaves:
            assert node.count == int((leaf_of == node.id).sum())
            assert {image.tobytes() for image in node.members} <= {x.numpy().tobytes() for x in IMAGES}
    with pytest.raises(ValueError, match="for features of images pass observe= and refine="):
        summarize_tree(model.tree_vae, IMAGES, observe=model.observe)


def test_misfits_are_refused() -> None:
    model = tree()
    with pytest.raises(ValueError, match=r"expected a tree of images .*; give size= and channels= of the images"):
        LeafConditionedDDPM.for_tree(model, **TINY)
    ddpm = LeafConditionedDDPM.for_tree(model, size=8, channels=3, **TINY)
    with pytest.raises(ValueError, match=r"both stages must have images of one shape.*needs the map from images"):
        DiffuseTreeVAE(model, ddpm)
    with pytest.raises(
        ValueError, match=r"features of two images have the shape \(2, 192\), the tree observes \(2, 6\)"
    ):
        DiffuseTreeVAE(model, ddpm, features=nn.Flatten())
    blurry = LeafConditionedDDPM.for_tree(model, size=8, condition="diffuse_tree_vae", **TINY)
    with pytest.raises(ValueError, match=r"a tree of features has no images of leaves.*condition='tree_diffusion'"):
        DiffuseTreeVAE(model, blurry, features=network())

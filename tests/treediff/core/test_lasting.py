"""What is made in inference mode and kept can be trained with, and changed in place, afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import GROWN, build, observations
from pairs import TINY, conditions, images, pair, small
from torch import Tensor, nn
from worlds import seeded

from treediff import EMA, DiffuseTreeVAE, LeafConditionedDDPM, LeafDensity, TreeTopology, TreeVAE
from treediff.core.checkpoint import read_checkpoint, save_checkpoint
from treediff.core.io import load_into, save_model
from treediff.core.modes import lasting
from treediff.diffusion import DiscreteSchedule
from treediff.diffusion.condition import NodeIndex
from treediff.layers import NodeBank
from treediff.metrics import FeatureClassifier
from treediff.testing import GaussianMixture


def limited(module: nn.Module) -> list[str]:
    """Names of the tensors that could never be trained with."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_inference()]


@pytest.mark.parametrize("records", [True, False])
def test_only_inference_mode_is_left(records: bool) -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(records):
        with lasting():
            kept = 2 * weight
        assert kept.requires_grad == records and torch.is_grad_enabled() == records
    with torch.inference_mode():
        with lasting():
            kept = 2 * weight
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert not kept.is_inference() and not kept.requires_grad


# --- loading ------------------------------------------------------------------------------------------------


def step(model: nn.Module, loss: Tensor) -> None:
    """One step of training, in which every tensor is used as it would be."""
    loss.backward()
    torch.optim.Adam(model.parameters()).step()
    assert not limited(model)


def train_tree(model: TreeVAE) -> None:
    step(model, model.elbo(observations(model, 3), generator=seeded()).loss())


def train_ddpm(model: LeafConditionedDDPM) -> None:
    step(model, model.loss(images(4), conditions(), generator=seeded()))


def train_pair(model: DiffuseTreeVAE) -> None:
    step(model.ddpm, model.loss(observations(model.tree_vae, 3), generator=seeded()))
    train_tree(model.tree_vae)
    model.load_state_dict(model.state_dict())  # in place, the density too
    assert not limited(model)


def train_classifier(model: FeatureClassifier) -> None:
    step(model, model(torch.rand(2, 1, 8, 8)).square().sum())


def with_density() -> DiffuseTreeVAE:
    model = pair()
    model.density = LeafDensity(model.tree_vae.topology, model.tree_vae.latent, 2)
    return model


LOADERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "TreeVAE": (lambda: build(GROWN, "conv"), train_tree),
    "LeafConditionedDDPM": (small, train_ddpm),
    "DiffuseTreeVAE": (with_density, train_pair),
    "FeatureClassifier": (lambda: FeatureClassifier(size=8, channels=1, classes=2, width=4), train_classifier),
}


@pytest.mark.parametrize(("make", "train"), LOADERS.values(), ids=LOADERS)
def test_models_loaded_in_inference_mode_can_be_trained(
    make: Callable[[], Any], train: Callable[[Any], None], tmp_path: Path
) -> None:
    model = make()
    model.save(tmp_path / "model")
    with torch.inference_mode():
        found = type(model).load(tmp_path / "model")
    assert not limited(found) and all(torch.equal(v, model.state_dict()[k]) for k, v in found.state_dict().items())
    train(found)
    if not isinstance(model, FeatureClassifier):
        with torch.inference_mode():
            type(model).load(tmp_path / "model", model=found)
        train(found)


def test_a_given_tree_that_grows_as_it_is_filled_can_be_trained(tmp_path: Path) -> None:
    build(GROWN, "conv").save(tmp_path / "model")
    given = build(TreeTopology.balanced(0), "conv")
    with torch.inference_mode():
        TreeVAE.load(tmp_path / "model", model=given)
    train_tree(given)


class Replacing(nn.Module):
    """A part that puts new tensors in the place of its own, as a memory does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(2))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:  # noqa: ANN401
        self.rows = state_dict[prefix + "rows"].clone()


def test_parts_that_replace_their_tensors_are_filled_with_lasting_ones(tmp_path: Path) -> None:
    module = Replacing()
    save_model(module, tmp_path / "rows", {})
    with torch.inference_mode():
        load_into(module, tmp_path / "rows")
    assert not module.rows.is_inference()


def test_a_module_made_in_inference_mode_can_still_be_filled(tmp_path: Path) -> None:
    save_model(nn.Linear(2, 2), tmp_path / "linear", {})
    with torch.inference_mode():
        module = nn.Linear(2, 2)
        load_into(module, tmp_path / "linear")
    load_into(module, tmp_path / "linear")
    assert module.weight.is_inference()


def test_a_run_continued_in_inference_mode_goes_on(tmp_path: Path) -> None:
    def parts() -> dict[str, Any]:
        model = nn.Linear(2, 1)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "ema": EMA(model)}

    def go_on(run: dict[str, Any]) -> None:
        run["model"](torch.ones(1, 2)).sum().backward()
        run["optimizer"].step()
        run["ema"].update()

    run, other = parts(), parts()
    go_on(run)
    save_checkpoint(tmp_path / "run", run)
    with torch.inference_mode():
        read_checkpoint(tmp_path / "run").fill(other)
    for each in (run, other):
        each["optimizer"].zero_grad()
        go_on(each)
    assert torch.equal(run["model"].weight, other["model"].weight)


# --- tables and weights that are made on the way ---------------------------------------------------------------


def test_nodes_added_in_inference_mode_can_be_trained() -> None:
    model = build(GROWN, "conv")
    with torch.inference_mode():
        model.split(1, generator=seeded())
        model.split(4, warm_start=True, generator=seeded())
        alone = model.banks.decoders.module(5)
    train_tree(model)
    assert not limited(alone)


def test_a_bank_filled_from_one_made_in_inference_mode_lasts() -> None:
    with torch.inference_mode():
        bank = NodeBank(nn.Linear(2, 2))
        bank.add(0, generator=seeded())
        bank.add(1, like=0)
    assert not limited(bank)


def test_tables_of_a_tree() -> None:
    with torch.inference_mode():
        index = NodeIndex(GROWN)
    assert not limited(index)


def test_a_density_fitted_in_inference_mode_can_be_filled() -> None:
    tree_vae = build(TreeTopology.balanced(0), "conv")
    with torch.inference_mode():
        density = LeafDensity.fit(tree_vae, observations(tree_vae, 30), components=2, generator=seeded())
    assert not limited(density) and not limited(density.index)
    density.load_state_dict(density.state_dict())


def test_a_schedule_keeps_lasting_tables() -> None:
    with torch.inference_mode():
        schedule = DiscreteSchedule.linear(10)
        schedule.log_alpha(torch.zeros(2, device="meta"))
    assert len(schedule._knots) == 2 and not any(table.is_inference() for table in schedule._knots.values())


def test_a_model_of_a_schedule_made_in_inference_mode_can_be_trained() -> None:
    model = LeafConditionedDDPM.for_images(size=8, latent=(2,), topology=GROWN, schedule="ddpm", **TINY)
    with torch.inference_mode():
        model.schedule = DiscreteSchedule.linear(10)
        model.loss(images(4), conditions(), generator=seeded())
        model.sample(conditions(), steps=2, generator=seeded())
    train_ddpm(model)


def test_a_mixture_first_used_in_inference_mode_has_gradients() -> None:
    means = torch.zeros(1, 2, requires_grad=True)
    with torch.inference_mode():
        mixture = GaussianMixture(torch.zeros(1), means, torch.eye(2)[None])
        mixture.log_prob(torch.zeros(1, 2))
    x = torch.ones(1, 2, requires_grad=True)
    mixture.log_prob(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[-1, -1]]

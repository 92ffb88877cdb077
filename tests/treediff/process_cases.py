"""What tests of treediff run on every process, and the same on one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from growing import SETTINGS, blobs, small
from pairs import conditions, images, pair
from pairs import small as second_stage
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import seeded

from treediff import TreeContrast, TreeGrowth, TreeVAE
from treediff.core.distributed import World, data_parallel, start
from treediff.tree.visits import Visits
from treediff.treevae.posterior import TreePosterior


@contextmanager
def without_noise() -> Iterator[None]:
    """Latents at their means, and no luck: what is drawn for a batch does not depend on how it is shared."""
    latents = TreeVAE.latents

    def at_means(self: TreeVAE, features: Tensor, visits: Visits, **settings: Any) -> TreePosterior:  # noqa: ANN401
        noise = features.new_zeros(len(visits.image), *self.latent)
        return latents(self, features, visits, **{**settings, "noise": noise})

    with (
        mock.patch.object(TreeVAE, "latents", at_means),
        mock.patch("torch.rand", lambda *size, dtype=None, **_: torch.full((size[0],), 0.5, dtype=dtype)),
    ):
        yield


def grown(world: World, *, resumed: bool, **settings: Any) -> tuple[dict[str, Tensor], str, str]:  # noqa: ANN401
    """A tree, trained on batches of twelve, with a contrastive term; perhaps saved and resumed half way."""
    data = blobs(30, 24, 18, dtype=torch.float64)
    options = {**SETTINGS, "max_leaves": 3, "min_share": 0.0, "world": world, "batch_size": 16, **settings}
    model = small(dtype=torch.float64)
    growth = TreeGrowth(model, **options)
    stages = 0
    while True:
        for stage in growth.stages(data):
            contrast = TreeContrast(model, weight=1.0, decision_weight=0.5, hidden=4, generator=seeded(), world=world)
            contrast.double()
            train(stage, data, world, contrast)
            stages += 1
            if resumed and stages == 2:
                break
        else:
            break
        state, weights = json.dumps(growth.state_dict()), model.state_dict()
        model = small(model.topology, dtype=torch.float64)
        model.load_state_dict(weights)
        growth = TreeGrowth(model, **options)
        growth.load_state_dict(json.loads(state))
    return model.state_dict(), model.topology.to_json(), json.dumps(growth.state_dict())


def train(stage: Any, data: Tensor, world: World, contrast: TreeContrast) -> None:  # noqa: ANN401
    parameters = [*stage.parameters(), *contrast.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.003)
    loss = data_parallel(stage.loss, stage.model, contrast, unused=bool(stage.splits) or stage.threshold > 0)
    for rows in stage.batches(0, 12):
        x = data[world.share(rows[: len(rows) // 6 * 6])]
        if not len(x):
            continue
        optimizer.zero_grad()
        loss(x, 0.5, view=x + 0.1, contrast=contrast).backward()
        optimizer.step()


def grown_here(resumed: bool, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str, str]:
    with without_noise():
        return grown(start(), resumed=resumed, **settings)


def refining(how: str, world: World) -> tuple[float, dict[str, Tensor], Tensor]:
    """Three steps of the second stage on images whose times and noise are given: the loss, weights, a sample."""
    model = second_stage(coarsen=0.0)
    if how == "fully sharded":
        mesh = init_device_mesh("cpu", (world.size,))
        for part in (*model.unet.down, *model.unet.middle, *model.unet.up, model.unet, model.conditioner):
            fully_shard(part, mesh=mesh)
    loss = model.loss if how == "fully sharded" else data_parallel(model.loss, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, condition, t = images(12), conditions(n=12), torch.linspace(0.1, 0.9, 12)
    noise = torch.randn(x.shape, generator=seeded(9))
    own, value = world.share(torch.arange(12)), torch.zeros(())
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(x[own], condition[own], t=t[own], noise=noise[own])
        value.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = model.eval().sample(conditions(n=3), steps=2, generator=seeded(1))
    state = model.state_dict()
    if how == "fully sharded":
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return value.item(), state, drawn


def refining_here(how: str) -> tuple[float, dict[str, Tensor], Tensor]:
    return refining(how, start())


def generated_here(count: int) -> tuple[Tensor, Tensor]:
    """Images of which each process draws some."""
    world = start()
    model = pair()

    def part(rows: Tensor) -> Tensor:
        return model.generate(len(rows), first_index=int(rows[0]), steps=3, generator=seeded(4)).images

    with torch.no_grad():
        parts = [rows for rows in torch.arange(count).tensor_split(world.size) if len(rows)]
        one_by_one = world.map(part, torch.arange(count).split(1))
        return torch.cat(world.map(part, parts)), torch.cat(one_by_one)


def greatest_here(numbers: list[int]) -> int:
    world = start()
    return world.greatest(numbers[world.rank])

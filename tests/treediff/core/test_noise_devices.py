"""Where a device has no float64 none is made there; a mode that refuses it plays such a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import GROWN, build, observations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import seeded

from treediff import LeafDensity
from treediff.core.noise import _bits, combine_seeds, counter_normal, counter_uniform, widest
from treediff.diffusion import DiscreteSchedule
from treediff.pipeline.conditions import condition_of

INDEX = torch.arange(5000)


class NoFloat64(TorchDispatchMode):
    """Refuses tensors of float64 on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        for found in tree_leaves(result):
            if isinstance(found, Tensor) and found.device.type == self.device and found.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return result


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All devices have float32 at most."""
    for module in ("core.noise", "pipeline.conditions", "pipeline.density", "diffusion.discrete"):
        monkeypatch.setattr(f"treediff.{module}.widest", lambda _: torch.float32)


def test_apples_devices_have_float32_at_most() -> None:
    assert [widest(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [torch.float64] * 2 + [torch.float32]


def test_uniform_numbers_need_nothing_wider_than_themselves() -> None:
    for dtype, digits in ((torch.float16, 11), (torch.bfloat16, 8), (torch.float32, 24), (torch.float64, 53)):
        found = counter_uniform(3, INDEX, dtype=dtype)
        whole = found.double() * 2**digits
        assert torch.equal(whole, whole.round()) and found.max() < 1
        if dtype != torch.float64:
            with NoFloat64("cpu"):
                counter_uniform(3, INDEX, dtype=dtype)


def test_normal_numbers_in_float32_are_the_same_but_for_rounding(narrow: None) -> None:
    with NoFloat64("cpu"):
        found = counter_normal(3, INDEX, (20,))
    assert found.isfinite().all()
    bits = _bits(3, INDEX, 0, 20)
    radius = (((bits >> 32) & 0xFFFFFFFF).double() + 0.5).mul(2.0**-32).log().mul(-2).sqrt()
    exact = radius * ((bits & 0xFFFFFFFF).double() * (2.0**-32 * 2 * torch.pi)).cos()
    # Near 1 a float32 has few digits left for its logarithm.
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-3)


def test_discrete_schedules_in_float32_are_the_same_but_for_rounding(
    narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = torch.rand(100, generator=seeded(1))
    exact = DiscreteSchedule.linear(1000)
    acts: list[Callable[[DiscreteSchedule, Tensor], Tensor]] = [
        lambda schedule, t: schedule.log_alpha(t),
        lambda schedule, t: schedule.d_log_alpha(t),
        lambda schedule, t: schedule.time_of(4 - 8 * t),
    ]
    for act in acts:
        with NoFloat64("meta"):
            assert act(exact, asked.to("meta")).dtype == torch.float32
        found = DiscreteSchedule.linear(1000)
        found._knots = {device: knots.float() for device, knots in found._knots.items()}
        torch.testing.assert_close(act(found, asked).double(), act(exact, asked.double()), rtol=2e-3, atol=1e-4)


def test_places_and_densities_make_no_float64(narrow: None) -> None:
    model = build(GROWN, dtype=torch.float32)
    x, density = observations(model, 9), LeafDensity(GROWN, model.latent)
    with NoFloat64("cpu"):
        condition_of(model, x, prior_share=0.5, generator=seeded(2))
        density.sample(model, 9, generator=seeded(3))
        model.sample(9, generator=seeded(4))


def test_one_seed_from_several_has_the_range_it_says() -> None:
    for numbers in ((0,), (-1, 5), (2**62 - 1, -(2**70)), (2**64,)):
        assert 0 <= combine_seeds(*numbers) < 2**63
    assert combine_seeds(3, 7) == combine_seeds(3, 7 + 2**62) != combine_seeds(3, 7 + 2**61)
    assert combine_seeds(1, -1) != combine_seeds(1, 1)

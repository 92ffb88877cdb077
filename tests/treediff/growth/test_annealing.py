"""The KL weight: known sequences, bounds for any setting, and errors that teach."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff.growth.annealing import KLAnnealing

share = st.floats(0, 1)


def test_climbs_as_the_reference_callback_does() -> None:
    annealing, weight = KLAnnealing(start=0.01, step=0.01), 0.01
    for epoch in range(150):
        assert annealing(epoch) == pytest.approx(weight, abs=1e-12)
        weight = min(1.0, weight + 0.01)
    assert annealing(98) < 1 and annealing(99) == pytest.approx(1.0) and annealing(100) == 1.0


def test_defaults_are_those_of_mnist() -> None:
    assert KLAnnealing()(150) == pytest.approx(0.15)


def test_a_fraction_of_an_epoch_lies_between_its_ends() -> None:
    assert KLAnnealing(start=0.2, step=0.1)(1.5) == pytest.approx(0.35)


def test_constant_never_moves() -> None:
    assert [KLAnnealing.constant(4.0)(epoch) for epoch in (0, 0.5, 1, 10**6)] == [4.0] * 4
    assert KLAnnealing.constant()(0) == 1.0


def test_cycle_by_hand() -> None:
    annealing = KLAnnealing.cyclic(10, climb=0.4, start=0.2, ceiling=1.0)
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [annealing(epoch) for epoch in range(20)] == pytest.approx(expected * 2)


@settings(deadline=None)
@given(share, share, share, st.integers(1, 50), st.floats(0, 1000))
def test_weights_stay_in_bounds_and_cycles_repeat(
    first: float, second: float, step: float, period: int, epoch: float
) -> None:
    start, ceiling = sorted((first, second))
    linear = KLAnnealing(start=start, step=step, ceiling=ceiling)
    cyclic = dataclasses.replace(linear, period=period)
    assert start <= linear(epoch) <= linear(epoch + 1) <= ceiling
    assert start <= cyclic(epoch) <= linear(epoch)
    assert cyclic(math.floor(epoch)) == cyclic(math.floor(epoch) + period)


@pytest.mark.parametrize(
    "annealing",
    [KLAnnealing(start=0.01, step=0.01), KLAnnealing.constant(0), KLAnnealing.cyclic(7, climb=1 / 3)],
)
def test_survives_json(annealing: KLAnnealing) -> None:
    text = json.dumps(annealing.to_dict(), sort_keys=True)
    assert KLAnnealing.from_dict(json.loads(text)) == annealing


def test_is_a_value() -> None:
    assert hash(KLAnnealing()) == hash(KLAnnealing(start=0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        KLAnnealing().start = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"start": -0.1}, ValueError, "start must be finite and at least 0, found -0.1"),
        ({"step": math.inf}, ValueError, "step must be finite and at least 0, found inf"),
        ({"ceiling": math.nan}, ValueError, "ceiling must be finite and at least 0, found nan"),
        ({"start": 2.0}, ValueError, "found start=2.0 and ceiling=1.0; raise the ceiling, or use"),
        ({"period": 0}, ValueError, "period must be at least 1 epoch, found 0; None means no cycle"),
        ({"step": "fast"}, TypeError, "step must be a number, found 'fast' of type str"),
        ({"start": True}, TypeError, "start must be a number, found True of type bool"),
        ({"period": 2.5}, TypeError, "period must be a whole number of epochs or None, found 2.5"),
        ({"period": True}, TypeError, "period must be a whole number of epochs or None, found True"),
    ],
)
def test_refuses_settings(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KLAnnealing(**fields)


@pytest.mark.parametrize("epoch", [-1, -0.5, math.inf, math.nan])
def test_refuses_epochs(epoch: float) -> None:
    with pytest.raises(ValueError, match=f"epochs count from 0 at the beginning of the stage; found epoch {epoch}"):
        KLAnnealing()(epoch)


def test_cyclic_refuses() -> None:
    with pytest.raises(ValueError, match="climb is a share of the period, above 0 and at most 1; found 0"):
        KLAnnealing.cyclic(10, climb=0)
    with pytest.raises(ValueError, match="period must be at least 1 epoch, found 0"):
        KLAnnealing.cyclic(0)
    with pytest.raises(ValueError, match="start must not lie above ceiling"):
        KLAnnealing.cyclic(10, start=1.0, ceiling=0.5)


def test_from_dict_names_what_does_not_fit() -> None:
    saved = KLAnnealing().to_dict()
    del saved["step"]
    with pytest.raises(ValueError, match=r"missing \['step'\], unknown \['speed'\]"):
        KLAnnealing.from_dict({**saved, "speed": 1.0})

"""A file fits whole or changes nothing; and files made to do harm are refused by name, whatever they claim."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import GROWN, build
from pairs import pair
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import quick
from torch import nn

from treediff import DiffuseTreeVAE, LeafDensity, TreeVAE
from treediff.core.checkpoint import read_checkpoint, save_checkpoint
from treediff.core.io import load_into, parse_json, read_header, read_tensors, save_model
from treediff.metrics import FeatureClassifier

# --- all or nothing -----------------------------------------------------------------------------------------


class Fussy(nn.Module):
    """Takes nothing but zeros, and says so when its tensors come: after those of the parts before it."""

    def __init__(self, value: float = 0.0, *, raises: bool = False) -> None:
        super().__init__()
        self.raises = raises
        self.register_buffer("rows", torch.full((2,), value))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:  # noqa: ANN401
        if state_dict[prefix + "rows"].any():
            if self.raises:
                raise RuntimeError("rows must be 0")
            others[-1].append("rows must be 0")
            return
        self.rows = state_dict[prefix + "rows"].clone()  # others than before, as a memory has


class OfParts(nn.Module):
    def __init__(self, fill: float, *fussy: Fussy) -> None:
        super().__init__()
        self.first, self.parts, self.last = nn.Linear(2, 2), nn.ModuleList(fussy), nn.BatchNorm1d(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(fill)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("order", [[1.0], [0.0, 1.0], [1.0, 0.0]])
def test_a_part_that_refuses_leaves_all_as_it_was(order: list[float], raises: bool, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model(OfParts(5.0, *map(Fussy, order)), path, {})
    module = OfParts(1.0, *(Fussy(raises=raises) for _ in order))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    places = [parameter.data_ptr() for parameter in module.parameters()]
    message = rf"{re.escape(repr(str(path)))}: the file does not fit the model, which is as it was: .*rows must be 0"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_into(module, path)
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.data_ptr() for parameter in module.parameters()] == places


def test_an_interruption_leaves_all_as_it_was(tmp_path: Path) -> None:
    save_model(OfParts(5.0), tmp_path / "model", {})
    module = OfParts(1.0)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = module.register_load_state_dict_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        try:
            load_into(module, tmp_path / "model")
        finally:
            handle.remove()
    assert all((parameter == 1).all() for parameter in module.parameters())


def test_the_copies_that_were_kept_are_wiped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kept = OfParts(3.0), []
    save_model(module, tmp_path / "model", {})
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: kept.append(clone(tensor)) or kept[-1])
    load_into(module, tmp_path / "model")
    assert len(kept) >= len(module.state_dict()) and not any(tensor.any() for tensor in kept)


# --- files made to do harm: the container ---------------------------------------------------------------------


def container(header: object, body: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one_tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:  # noqa: ANN401
    about = json.dumps({"format": 1, "class": "TreeVAE"})
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return {"__metadata__": {"treediff": about}, "w": tensor}


CONTAINERS: dict[str, bytes] = {
    "a header of 8 EiB": container({}, length=2**63),
    "a header of 100 MB": container({}, length=99_999_999),
    "a tensor of 2^80": container(one_tensor(shape=[2**40, 2**40])),
    "a tensor of 2^62": container(one_tensor(shape=[2**62], offsets=[0, 2**64 - 4])),
    "a tensor beyond the file": container(one_tensor(shape=[2**30], offsets=[0, 2**32])),
    "an empty tensor with a huge side": container(one_tensor(shape=[0, 2**63], offsets=[0, 0]), b""),
    "a size of 40 digits": container(one_tensor(shape=[10**40])),
    "a negative size": container(one_tensor(shape=[-1])),
    "a dtype of no tensor": container(one_tensor("F6_E2M3", [4], [0, 3]), b"\0" * 3),
    "arrays a million deep": container(b"[" * 10**6),
    "objects a million deep": container(b'{"a":' * 10**6),
    "no object": container(b"[]"),
    "metadata that is a list": container({"__metadata__": [1]}),
    "metadata of objects": container({"__metadata__": {"treediff": {}}}),
}


@pytest.mark.parametrize("content", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"(?s){re.escape(str(path))}' is not a whole safetensors file .*may be damaged"
    ):
        read_tensors(path)
    for door in (lambda: TreeVAE.load(path), lambda: load_into(nn.Linear(1, 1), path)):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            door()


# --- files made to do harm: the header ------------------------------------------------------------------------


def with_density() -> DiffuseTreeVAE:
    model = pair()
    model.density = LeafDensity(model.tree_vae.topology, model.tree_vae.latent, 2)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "TreeVAE": lambda: build(GROWN, "conv"),
    "DiffuseTreeVAE": with_density,
    "FeatureClassifier": lambda: FeatureClassifier(size=8, channels=1, classes=2, width=4),
}


def rewritten(path: Path, change: Callable[[dict[str, Any]], object] | str) -> Path:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["treediff"])
    if not isinstance(change, str):
        change(header)
        change = json.dumps(header)
    other = path.with_name("harmful")
    save_file(tensors, other, metadata={"treediff": change})
    return other


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=True), "has format version True, this treediff reads versions 1 and 2"),
        (lambda h: h.update(format=1.0), "has format version 1.0, this treediff reads versions 1 and 2"),
        (lambda h: h.update(format=[1]), r"has format version \[1\], this treediff reads versions 1 and 2"),
        (lambda h: h.update({"class": [h["class"]]}), r"holds a \['.*'\], expected a "),
        (lambda h: h.update({"class": {"a": 1}}), r"holds a \{'a': 1\}, expected a "),
        ("[" * 10**6, "the header of .* is damaged .*nested at most 200 deep"),
        ('{"a":' * 10**6, "the header of .* is damaged .*nested at most 200 deep"),
        ("[" * 900 + "]" * 900, "the header of .* is damaged .*nested at most 200 deep"),
        ("1" * 10**5, "the header of .* is damaged"),
    ],
)
def test_a_header_that_lies_is_refused(
    make: Callable[[], Any],
    change: Any,  # noqa: ANN401
    message: str,
    tmp_path: Path,
) -> None:
    model = make()
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        type(model).load(rewritten(tmp_path / "model", change))
    assert str(tmp_path / "harmful") in str(caught.value)


def places(value: object, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a header."""
    if above:
        yield above
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*above, key))


BAD = [True, 1.5, -1, 10**9, 10**400, 1e300, float("inf"), float("nan"), "text", None, [], [1], {}, {"a": [{}]}]
each_file = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[type[Any], Path]:
    model, path = request.param(), tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return type(model), path


@each_file
@given(st.data())
def test_whatever_a_header_says_a_load_gives_a_model_or_names_the_file(
    saved: tuple[type[Any], Path], data: st.DataObject
) -> None:
    kind, path = saved

    def change(header: dict[str, Any]) -> None:
        *above, last = data.draw(st.sampled_from(list(places(header))))
        for key in above:
            header = header[key]
        header[last] = copy.deepcopy(data.draw(st.sampled_from(BAD)))

    other = rewritten(path, change)
    try:
        model = kind.load(other)
    except ValueError as error:
        assert str(other) in str(error) and len(str(error)) < 2000
    else:
        assert model.state_dict().keys()


def test_a_size_beyond_the_file_is_not_even_tried(tmp_path: Path) -> None:
    build(GROWN).save(tmp_path / "model")
    other = rewritten(tmp_path / "model", lambda h: h["config"]["for_vectors"].update(max_depth=10**12))
    message = r"harmful' does not describe a model: a file of \d+ bytes names a size beyond its own; .* take a backup"
    with pytest.raises(ValueError, match=message):
        TreeVAE.load(other)
    other = rewritten(tmp_path / "model", lambda h: h["topology"].update(next_id=10**12))
    with pytest.raises(ValueError, match=message):
        TreeVAE.load(other, model=build(GROWN))


def test_what_is_nested_as_deep_as_may_be_is_read() -> None:
    assert parse_json("[" * 200 + "]" * 200)
    with pytest.raises(ValueError, match="expected JSON nested at most 200 deep, found more"):
        parse_json("[" * 201 + "]" * 201)


def test_a_checkpoint_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    save_checkpoint(path, {"rate": 0.5, "seed": 2**62})
    assert read_checkpoint(path)["seed"] == 2**62  # a number is no size here
    for states in ([1], {"rate": {"float": 10**400}}, {"rate": {"tensor": [1]}}, {"rate": {"numbered": {"a": 1}}}, "x"):
        other = rewritten(path, lambda h, states=states: h.update(states=states))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"{re.escape(str(other))}' is damaged"):
            read_checkpoint(other)
    with pytest.raises(ValueError, match="nested at most 200 deep"):
        read_header(rewritten(path, "[" * 10**6), "Checkpoint")

"""Files that must be refused, with a message that says why; and what a failure leaves behind: nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import GROWN, PRUNED, build
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import quick
from torch import Tensor

from treediff import TreeTopology, TreeVAE
from treediff.core import io as treediff_io

many = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    build(PRUNED).save(tmp_path / "model")
    return tmp_path / "model"


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["treediff"])


def rewrite(path: Path, tensors: dict[str, Tensor], header: object) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"treediff": text})


def refuse(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    """Both ways of loading fail with the message, and a model that was given stays as it was."""
    model = build(GROWN, seed=3)
    before, tree = {name: v.clone() for name, v in model.state_dict().items()}, model.topology
    with pytest.raises(error, match=message):
        TreeVAE.load(path, model=model)
    with pytest.raises(error, match=message):
        TreeVAE.load(path)
    after = model.state_dict()
    assert model.topology == tree and after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.cluster(torch.zeros(1, 3).double())


# --- the file itself ----------------------------------------------------------------------------------------


def test_no_file(tmp_path: Path) -> None:
    refuse(tmp_path / "none", re.escape(f"no model file at {str(tmp_path / 'none')!r}"), FileNotFoundError)
    refuse(tmp_path, "no model file at", FileNotFoundError)  # a folder


WHOLE = "is not a whole safetensors file .* it may be damaged, cut short, or of another kind. Nothing else is tried"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_file_cut_short(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refuse(path, WHOLE)


def test_a_file_with_something_behind_it(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")
    refuse(path, WHOLE)


class Bomb:
    """Unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (self.trace,)


def test_pickled_files_are_refused_unread(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name, write in {
        "pickle": lambda file: file.write_bytes(pickle.dumps(Bomb(trace))),
        "torch": lambda file: torch.save({"weights": Bomb(trace)}, file),
        "state": lambda file: torch.save(build().state_dict(), file),
    }.items():
        write(tmp_path / name)
        refuse(tmp_path / name, WHOLE)
    assert not trace.exists()


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain")
    refuse(tmp_path / "plain", r"treediff did not write: its metadata has the keys \[\], expected 'treediff'")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other", metadata={"format": "pt"})
    refuse(tmp_path / "other", r"treediff did not write: its metadata has the keys \['format'\]")


@many
@given(st.data())
def test_flipped_bits_are_refused_or_are_weights(path: Path, data: st.DataObject) -> None:
    """Wherever a bit flips: a ValueError that teaches, or a model; never another error from further inside."""
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    where = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(good) - 1)))
    bad = bytearray(good)
    bad[where] ^= 1 << data.draw(st.integers(0, 7))
    other = path.with_name("flipped")
    other.write_bytes(bad)
    try:
        model = TreeVAE.load(other)
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert model.topology.leaves


# --- the header ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": 3},
            "has format version 3, this treediff reads versions 1 and 2; install the release that wrote it",
        ),
        ({"format": None}, "has format version None, this treediff reads versions 1 and 2"),
        ({"class": "Forest"}, "holds a Forest, expected a TreeVAE"),
        ({"topology": None}, "expected JSON like .* found 'null'"),
        ({"topology": {"nodes": [[0, 1, None]], "next_id": 5}}, "nodes must form one tree"),
        ({"topology": {"nodes": [], "next_id": 5}}, "expected JSON like"),
    ],
)
def test_a_header_that_says_something_else(path: Path, change: dict[str, Any], message: str) -> None:
    tensors, header = contents(path)
    rewrite(path, tensors, {**header, **change})
    refuse(path, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"text"', '{"format":1}', '{"class":"TreeVAE"}', "[" * 100_000]
)
def test_a_header_that_is_damaged(path: Path, text: str) -> None:
    rewrite(path, contents(path)[0], text)
    refuse(path, "the header of .* is damaged")


CONFIGURATION = "expected a configuration {name: arguments} of for_images or for_vectors, found "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, f"{CONFIGURATION}{{}}"),
        ({"config": 3}, "expected a configuration {name: value}, found int"),
        ({"config": "for_vectors"}, "expected a configuration {name: value}, found str"),
        ({"config": {"__init__": {}}}, f"{CONFIGURATION}{{'__init__': {{}}}}"),
        ({"config": {"for_vectors": {}, "for_images": {}}}, CONFIGURATION),
        ({"config": {"for_vectors": [3]}}, CONFIGURATION),
        ({"config": {"for_vectors": {"features": 3, "colour": 1}}}, "does not fit for_vectors: "),
        ({"config": {"for_images": {}}}, "does not fit for_images: "),
        ({"config": {"for_vectors": {"features": "three"}}}, "features must be a whole number, found 'three'"),
        (
            {"config": {"for_vectors": {"features": 3, "max_depth": 1}}},
            "a tree of depth 3 needs as many bottom-up blocks",
        ),
        ({"dtype": None}, "names the dtype None, expected one like 'float32'"),
        ({"dtype": "int64"}, "names the dtype 'int64', expected one like 'float32'"),
        ({"dtype": "nn"}, "names the dtype 'nn', expected one like 'float32'"),
        ({"dtype": "float32"}, "does not fit the model at 'banks.decoders.6"),
    ],
)
def test_a_configuration_that_does_not_make_a_model(path: Path, change: dict[str, Any], message: str) -> None:
    tensors, header = contents(path)
    rewrite(path, tensors, {**header, **change})
    with pytest.raises(ValueError, match=re.escape(message)):
        TreeVAE.load(path)


# --- tensors that do not fit --------------------------------------------------------------------------------

NO = "no such tensor"


def test_a_missing_leaf_is_named(path: Path) -> None:
    tensors, header = contents(path)
    size = len(tensors.pop("banks.decoders.7"))
    rewrite(path, tensors, header)
    refuse(path, rf"does not fit the model at 'banks.decoders.7': expected float64 of shape \({size},\), found {NO}")


def test_a_leaf_too_many_is_named(path: Path) -> None:
    tensors, header = contents(path)
    tensors["banks.decoders.99"] = torch.zeros(3)
    rewrite(path, tensors, header)
    refuse(path, rf"does not fit the model at 'banks.decoders.99': expected {NO}, found float32 of shape \(3,\)")


def test_a_leaf_of_another_shape_or_dtype_is_named(path: Path) -> None:
    tensors, header = contents(path)
    good = tensors["banks.decoders.8"]
    for bad, kind in ((good[:-1].clone(), "float64"), (good.float(), "float32"), (good[None].clone(), "float64")):
        rewrite(path, {**tensors, "banks.decoders.8": bad}, header)
        found = re.escape(f"found {kind} of shape {tuple(bad.shape)}")
        refuse(path, rf"at 'banks.decoders.8': expected float64 of shape \({len(good)},\), {found}")


def test_a_tree_of_other_leaves_is_named(path: Path) -> None:
    tensors, header = contents(path)
    rewrite(path, tensors, {**header, "topology": json.loads(PRUNED.prune(7).to_json())})
    refuse(path, "does not fit the model at 'banks.decoders.7': expected no such tensor")


def test_a_model_of_other_parts_is_refused(path: Path) -> None:
    wider = TreeVAE.for_vectors(features=3, latent=2, width=6, max_depth=4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"does not fit the model at 'banks.decoders.6': .*found"):
        TreeVAE.load(path, model=wider)
    shallow = TreeVAE.for_vectors(features=3, latent=2, width=5, max_depth=2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a tree of depth 3 needs as many bottom-up blocks, this model has 2"):
        TreeVAE.load(path, model=shallow)
    assert wider.topology == shallow.topology == TreeTopology.balanced(0)
    assert wider.cluster(torch.zeros(1, 3).double()).tolist() == [0]


# --- nothing is lost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["to_bytes", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_whole(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(treediff_io if step == "to_bytes" else os, step, fail)
    with pytest.raises(OSError, match="no space left on device"):
        build(GROWN).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [file.name for file in path.parent.iterdir()] == ["model"]  # no half file either
    assert TreeVAE.load(path).topology == PRUNED


def test_the_old_file_stands_until_the_new_one_is_on_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, seen = path.read_bytes(), []
    replace = os.replace

    def watch(source: str, target: str) -> None:
        seen.append(Path(target).read_bytes() == old and treediff_io.read_header(source, "TreeVAE")["format"] == 2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    build(GROWN).save(path)
    assert seen == [True]
    assert TreeVAE.load(path).topology == GROWN


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build().save(tmp_path / "none" / "model")

"""Checkpoints of a memory: whole at every moment, and nothing of them is left when they are gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from classifiers import filled, images, labels, model, train
from disks import FailingDisk, Killed
from torch import Tensor

from munkey import KeyStore
from munkey.io import WipedCheckpoints
from treediff import EMA
from treediff.core.checkpoint import Checkpoint, read_checkpoint, save_checkpoint

OLD, NEW = b"old" * 1000, b"new" * 700


def test_what_is_replaced_or_removed_is_overwritten(tmp_path: Path) -> None:
    files, path = WipedCheckpoints(), str(tmp_path / "a")
    files.write(path, OLD)
    with open(path, "rb") as first:  # a file that no name leads to any more
        files.write(path, NEW)
        assert Path(path).read_bytes() == NEW
        with open(path, "rb") as second:
            files.remove(path)
            assert not first.read().strip(b"\0") and not second.read().strip(b"\0")
    assert os.listdir(tmp_path) == []
    files.remove(path)  # there may be none


def attempts(act: Callable[[WipedCheckpoints, str], None], folder: Path) -> list[tuple[bool, Path, FailingDisk]]:
    """An act on a checkpoint, killed before or failing at each step of the disk in turn."""
    found = []
    for killed in (False, True):
        for at in range(40):
            here = folder / f"{killed} {at}"
            here.mkdir()
            (here / "a").write_bytes(OLD)
            disk = FailingDisk(at, None if killed else OSError(errno.ENOSPC, "No space left on device"))
            try:
                act(WipedCheckpoints(disk), str(here / "a"))
            except OSError as error:
                assert error.errno == errno.ENOSPC and not killed
            except Killed:
                assert killed
            else:
                continue
            disk.die()
            found.append((killed, here, disk))
    return found


def test_whatever_goes_wrong_in_a_save_leaves_one_that_is_whole(tmp_path: Path) -> None:
    failed = attempts(lambda files, path: files.write(path, NEW), tmp_path)
    assert 10 < len(failed) < 80
    for killed, folder, _ in failed:
        assert (folder / "a").read_bytes() in (OLD, NEW)
        assert killed or os.listdir(folder) == ["a"], "no part of a file is left"
        WipedCheckpoints().tidy(str(folder / "a"))
        assert os.listdir(folder) == ["a"] and (folder / "a").read_bytes() in (OLD, NEW)


def test_whatever_goes_wrong_in_a_removal_can_be_made_good(tmp_path: Path) -> None:
    failed = attempts(lambda files, path: files.remove(path), tmp_path)
    assert len(failed) > 4
    for _, folder, _ in failed:
        WipedCheckpoints().remove(str(folder / "a"))
        assert os.listdir(folder) == []


# --- what is in them ----------------------------------------------------------------------------------------


def test_a_memory_goes_on_with_the_moments_of_its_values(tmp_path: Path) -> None:
    """A model that holds no rows yet is filled; what its optimiser knows belongs to the same rows."""

    def parts(memory: bool) -> dict[str, object]:
        built = model()
        if memory:
            order = [7, 3, 11, 0, 2, 9, 10, 1, 8, 4, 6, 5]
            built.remember(order, images(12)[order], labels(12)[order])
            built.memory.store.compact()
        optimizer = torch.optim.AdamW(built.parameters(), lr=1e-2)
        built.attach(optimizer)
        return {"model": built, "optimizer": optimizer}

    def step(own: dict[str, object], ids: list[int]) -> None:
        own["optimizer"].zero_grad()  # type: ignore[attr-defined]
        own["model"].loss(images(12)[ids], labels(12)[ids], ids=ids).backward()  # type: ignore[attr-defined]
        own["optimizer"].step()  # type: ignore[attr-defined]

    def result(own: dict[str, object]) -> dict[str, Tensor]:
        own["model"].forget([3, 8])  # type: ignore[attr-defined]
        own["model"].memory.store.compact()  # type: ignore[attr-defined]
        found = dict(own["model"].state_dict())  # type: ignore[attr-defined]
        moments = own["optimizer"].state[own["model"].memory.store.values]  # type: ignore[attr-defined]
        return found | {"moments": moments["exp_avg"], "squares": moments["exp_avg_sq"]}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = parts(memory=True)
        step(one, [1, 2, 3])
        save_checkpoint(tmp_path / "a", {**one, "luck": torch.default_generator})
        step(one, [8, 5])
        two = parts(memory=False)
        read_checkpoint(tmp_path / "a").fill({**two, "luck": torch.default_generator})
        step(two, [8, 5])
    first, second = result(one), result(two)
    assert first.keys() == second.keys() and first["moments"].shape == (10, 4) and first["moments"].any()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_rows_of_another_width_are_refused() -> None:
    state = Checkpoint.of({"store": KeyStore(3, 2)})
    with pytest.raises(ValueError, match=r"'store/values': expected float32 of shape \(any, 4\), found float32 of"):
        state.fill({"store": KeyStore(3, 4)})


def test_a_memory_that_is_followed_is_not_filled() -> None:
    state, other = Checkpoint.of({"model": filled()}), filled()
    train(other, [1, 2])
    with pytest.raises(
        ValueError, match="an optimiser or an average follows the present rows; load first, then attach"
    ):
        state.fill({"model": other})
    other = filled()
    other.attach(EMA(other))
    with pytest.raises(
        ValueError, match="an optimiser or an average follows the present rows; load first, then attach"
    ):
        state.fill({"model": other})

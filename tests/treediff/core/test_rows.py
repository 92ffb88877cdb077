"""Rows of anything that can be indexed: equal to the same pixels converted at once, and read only when needed."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from worlds import seeded

from treediff.core.rows import Rows

PIXELS = torch.randint(256, (6, 3, 4, 5), dtype=torch.uint8, generator=seeded(0))
FLOATS = PIXELS.float() / 255
LAST = PIXELS.movedim(1, 3).contiguous().numpy()


class Items(Dataset[Any]):
    """Items of any kind, one at a time."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.read = items, list[int]()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        self.read.append(index)
        return self.items[index]


class Batched(Items):
    """Items that are read several at a time, as those of Hugging Face's data sets."""

    def __getitems__(self, index: list[int]) -> list[Any]:
        return [self.items[i] for i in index]


def mapped(folder: Path) -> np.memmap[Any, Any]:
    np.save(folder / "rows.npy", LAST)
    found = np.load(folder / "rows.npy", mmap_mode="r")
    assert isinstance(found, np.memmap)
    return found


SOURCES = {
    "floats": FLOATS,
    "tensor": PIXELS,
    "array": LAST,
    "channels first": PIXELS.numpy(),
    "dataset": TensorDataset(PIXELS, torch.arange(6)),
    "list": list(PIXELS),
    "pictures": Items([(Image.fromarray(image), 0) for image in LAST]),
    "16 bits": (PIXELS.numpy().astype(np.uint16) * 257),
}


@pytest.mark.parametrize("data", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("index", [slice(1, 5, 2), [4, 0], torch.tensor([5, 5, 1]), torch.arange(6) > 3, slice(0, 0)])
def test_rows_are_the_pixels_in_0_to_1_channels_first(data: Any, index: Any) -> None:  # noqa: ANN401
    rows = Rows(data)
    torch.testing.assert_close(rows[index], FLOATS[index])
    assert rows.shape == FLOATS.shape and len(rows) == 6 and rows[index].dtype == torch.float32
    torch.testing.assert_close(rows[2], FLOATS[2])
    torch.testing.assert_close(rows[torch.tensor(2)], FLOATS[2])
    torch.testing.assert_close(torch.cat(list(rows.split(4))), FLOATS)


def test_memory_maps(tmp_path: Path) -> None:
    rows = Rows(mapped(tmp_path))
    torch.testing.assert_close(rows[:], FLOATS)
    rows[:].zero_()  # a copy
    torch.testing.assert_close(rows[:], FLOATS)


def test_columns_of_mappings_and_tuples() -> None:
    items: list[Any] = [{"image": image, "label": 3} for image in PIXELS]
    torch.testing.assert_close(Rows(Batched(items), column="image")[[1, 2]], FLOATS[1:3])
    torch.testing.assert_close(Rows([(3, image) for image in PIXELS], column=1)[[1, 2]], FLOATS[1:3])
    with pytest.raises(
        ValueError, match=r"items have the columns \['image', 'label'\]; name one of them as column=, f"
    ):
        Rows(Items(items))


def test_grey_images_booleans_and_vectors() -> None:
    assert Rows(PIXELS[:, 0]).shape == (6, 1, 4, 5)
    assert Rows(PIXELS[:, 0].numpy()).shape == (6, 1, 4, 5)
    assert Rows(FLOATS[:, 0] > 0.5)[:].unique().tolist() == [0, 1]
    assert torch.equal(Rows(FLOATS.flatten(1))[:], FLOATS.flatten(1))
    assert Rows(FLOATS, dtype=torch.float64)[0].dtype == torch.float64


def test_only_indexed_rows_are_read() -> None:
    data = Items(list(PIXELS))
    rows = Rows(data)
    rows[[3, 1]]
    assert data.read == [0, 3, 1]  # the first one for its shape


def test_rows_of_rows_stay() -> None:
    rows = Rows(PIXELS)
    assert Rows.of(rows) is rows
    assert Rows.of(rows, dtype=torch.float64)[0].dtype == torch.float64
    torch.testing.assert_close(Rows.of(rows, dtype=torch.float64)[:].float(), FLOATS)
    assert repr(rows) == "Rows(Tensor, shape=(6, 3, 4, 5), dtype=torch.float32)"


def test_a_loader_reads_them() -> None:
    loaded = list(DataLoader(Rows(LAST), batch_size=4, collate_fn=lambda rows: rows))
    torch.testing.assert_close(torch.cat(loaded), FLOATS)


@given(
    st.lists(st.integers(-6, 5), max_size=8), st.sampled_from(sorted(SOURCES.keys() - {"list", "pictures", "dataset"}))
)
def test_numbers_count_from_both_ends(index: list[int], source: str) -> None:
    found = Rows(SOURCES[source])[torch.tensor(index, dtype=torch.int64)]  # type: ignore[arg-type]
    torch.testing.assert_close(found, FLOATS[torch.tensor(index, dtype=torch.int64)])


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (
            iter([1]),
            {},
            TypeError,
            "expected rows with a length and .*; found list_iterator; an iterable of batches has",
        ),
        (PIXELS[:0], {}, ValueError, "expected at least one row, found none"),
        (PIXELS, {"dtype": torch.int64}, ValueError, "rows are floating point, found dtype=torch.int64"),
        (PIXELS.long(), {}, TypeError, "or images of 8 or 16 bits, found torch.int64 of shape .*; convert them with"),
        (PIXELS.flatten(1), {}, TypeError, "expected floating-point rows, .* found torch.uint8 of shape"),
    ],
)
def test_what_has_no_rows_is_refused(
    data: Any,  # noqa: ANN401
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        Rows(data, **settings)


_PASS = """
import re, sys
import numpy as np, torch
from treediff.core.rows import Rows

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

rows = Rows(np.load(sys.argv[1], mmap_mode="r"))
before = peak()
for index in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).split(1000):
    rows[index].mean()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is measured as Linux counts it")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    images = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (200_000, 64, 64, 1))  # 819 MB
    images.flush()
    del images
    gc.collect()
    found = subprocess.run([sys.executable, "-c", _PASS, str(tmp_path / "big.npy")], capture_output=True, check=True)
    assert int(found.stdout) < 400_000  # KiB

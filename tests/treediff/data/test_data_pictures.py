"""The reader of picture folders: pixels, splits and sizes, and what does not fit is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from datafiles import from_torch, write_pictures
from PIL import Image

from treediff.data import _pictures, load_dataset


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pictures_are_split_once_and_for_all(tmp_path: Path, mode: str, channels: int) -> None:
    folder = write_pictures(tmp_path / "animals", mode=mode)
    (folder / "zebra" / "notes.txt").write_text("not a picture")
    (folder / "zebra" / ".hidden.png").write_text("not a picture")
    (folder / ".git").mkdir()
    with pytest.warns(UserWarning, match=r"passed over 1 files or folders that are no images .*notes\.txt; images"):
        found = load_dataset(folder)
    assert (found.name, found.class_names) == ("animals", ("ant", "zebra"))
    assert found.train_images.shape[1:] == (channels, 5, 4)
    assert found.train_labels is not None and found.test_labels is not None
    # Frozen: a changed split would change every figure measured with it.
    files = sorted((path.parent.name, path) for path in folder.glob("*/[0-9]*.png"))
    held_out = [f"{name}/{path.stem}" for name, path in _pictures._hold_out(folder, files, 0)[1]]
    assert held_out == ["ant/04", "ant/05", "ant/07", "zebra/00", "zebra/07", "zebra/18", "zebra/28"]
    assert found.test_labels.tolist() == [int(name.startswith("zebra")) for name in held_out]
    pixels = {
        (np.asarray(Image.open(path)).tobytes(), ("ant", "zebra").index(path.parent.name))
        for path in folder.glob("*/[0-9]*.png")
    }
    images = from_torch(torch.cat([found.train_images[:], found.test_images[:]]))
    labels = torch.cat([found.train_labels, found.test_labels]).tolist()
    assert {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)} == pixels
    assert len(images) == 60


def test_a_picture_stays_on_its_side_when_others_go(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path)
    before = {image.numpy().tobytes() for image in load_dataset(folder).test_images[:]}
    for i in range(10):
        (folder / "ant" / f"{i:02d}.png").unlink()
    after = {image.numpy().tobytes() for image in load_dataset(folder).test_images[:]}
    assert after < before
    other = {image.numpy().tobytes() for image in load_dataset(folder, split_seed=1).test_images[:]}
    assert other != after


def test_about_one_name_in_seven_is_held_out(tmp_path: Path) -> None:
    files = [("a", Path(f"{i}.png")) for i in range(7000)]
    train, test = _pictures._hold_out(tmp_path, files, 0)
    assert len(train) + len(test) == 7000
    assert abs(len(test) - 1000) < 5 * (7000 * 6 / 49) ** 0.5


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", per_class=3, kind="jpg")
    write_pictures(tmp_path / "test", per_class=2, kind="jpg")
    found = load_dataset(tmp_path)
    assert len(found.train_images[:]) == 6
    assert found.test_labels is not None and found.test_labels.tolist() == [0, 0, 1, 1]
    first = np.asarray(Image.open(tmp_path / "train" / "ant" / "00.jpg"))
    assert np.array_equal(from_torch(found.train_images[:])[0], first)


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ((3, 9), (3, 9))])
def test_size_makes_all_pictures_alike(tmp_path: Path, size: int | tuple[int, int], shape: tuple[int, int]) -> None:
    folder = write_pictures(tmp_path, per_class=20, mode="L")
    Image.new("1", (30, 7), 1).save(folder / "ant" / "white.png")
    assert load_dataset(folder, size=size).train_images.shape[1:] == (1, *shape)
    palette = Image.new("P", (6, 6), 0)
    palette.putpalette([255, 0, 0])
    palette.save(folder / "ant" / "red.png", transparency=b"\x80")
    Image.new("RGBA", (9, 2), (0, 255, 0, 51)).save(folder / "ant" / "green.png")
    with pytest.warns(UserWarning, match="2 images have transparent parts, which are shown on white"):
        found = load_dataset(folder, size=size)
    assert found.train_images.shape[1:] == (3, *shape)
    images = torch.cat([found.train_images[:], found.test_images[:]])
    for colour in ([1, 1, 1], [1, 127 / 255, 127 / 255], [0.8, 1, 0.8]):  # on white
        plain = torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1).expand(1, 3, *shape)
        assert (images == plain).flatten(1).all(1).sum() == 1


def test_size_is_height_and_width(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path)
    same = load_dataset(folder, size=(5, 4))
    assert torch.equal(same.train_images[:], load_dataset(folder).train_images[:])


def save(path: Path, mode: str = "L", size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def refused(folder: Path, message: str, size: int | None = None) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}.*{message}"):
        load_dataset(folder, size=size)


def test_folders_that_are_no_picture_folders(tmp_path: Path) -> None:
    refused(tmp_path, r"expected the four IDX files, or one sub-folder of images.*found no sub-folder")
    save(tmp_path / "train" / "ant" / "a.png")
    refused(tmp_path, r"train: expected images of one class \(\.bmp, .*none; folders train/ and test/")
    save(tmp_path / "test" / "bee" / "b.png")
    refused(tmp_path, r"expected test classes among \['ant'\], found \['bee'\] that train/ lacks")
    save(tmp_path / "few" / "ant" / "a.png")
    refused(tmp_path / "few", r"to hold out one in 7, found 1, all on one side; add images")


@pytest.mark.parametrize(("mode", "size"), [("L", (3, 5)), ("L", (4, 6)), ("RGB", (4, 5))])
def test_unlike_pictures(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    save(tmp_path / "train" / "ant" / "a.png")
    save(tmp_path / "test" / "ant" / "b.png", mode, size)
    found = re.escape(str((mode, size)))
    refused(tmp_path, rf"b\.png: expected mode and.*a\.png, \('L', \(4, 5\)\), found {found}; give size=")


def test_pictures_that_cannot_be_read_or_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "train" / "ant" / "a.png")
    other = tmp_path / "test" / "ant" / "b.png"
    other.parent.mkdir(parents=True)
    Image.new("CMYK", (4, 5)).save(other, format="TIFF")
    refused(tmp_path, r"b\.png: expected mode 1/L/I;16/P/RGB/RGBA/LA, found CMYK; save it with picture.convert", size=8)
    for content in (b"junk", save(other).read_bytes()[:-30]):
        other.write_bytes(content)
        refused(tmp_path, r"b\.png: expected an image that Pillow can read, found: ")
    save(other)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    refused(tmp_path, r"a\.png: expected an image that Pillow can read, found: .*20 pixels")


def test_one_unusual_mode_everywhere_is_refused(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, mode="P")
    with pytest.raises(ValueError, match=r"00\.png: expected mode 1/L/I;16/RGB/RGBA/LA, found P; save it with"):
        load_dataset(folder)


@pytest.mark.parametrize("size", [0, (8, -1), (1, 2, 3)])
def test_bad_size(tmp_path: Path, size: int | tuple[int, int]) -> None:
    message = rf"size: expected a height and a width of at least 1, found {re.escape(str(size))}"
    with pytest.raises(ValueError, match=message):
        load_dataset(write_pictures(tmp_path), size=size)


# --- grey of 16 bits, and modes that are not read -----------------------------------------------------------


def depths(shape: tuple[int, int] = (8, 8)) -> npt.NDArray[np.uint16]:
    """64 greys, of which conversions of Pillow to other modes leave two."""
    return (np.arange(64).reshape(shape) * 1040).astype(np.uint16)


def both_splits(folder: Path, name: str, write: Callable[[Path], object]) -> Path:
    for part in ("train", "test"):
        (folder / part / "ant").mkdir(parents=True, exist_ok=True)
        write(folder / part / "ant" / name)
    return folder


def pgm(path: Path) -> None:
    path.write_bytes(b"P5\n8 8\n65535\n" + depths().astype(">u2").tobytes())


def tif_of_big_ends(path: Path) -> None:
    Image.frombytes("I;16B", (8, 8), depths().astype(">u2").tobytes()).save(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda path: Image.fromarray(depths()).save(path)),
        ("a.tif", lambda path: Image.fromarray(depths()).save(path)),
        ("a.tiff", tif_of_big_ends),
        ("a.pgm", pgm),
    ],
)
def test_grey_of_16_bits_is_kept(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    folder = both_splits(tmp_path, name, write)
    expected = torch.from_numpy(depths().astype(np.float32) / np.float32(65535))
    for size in (None, 8):
        found = load_dataset(folder, size=size).train_images[:]
        assert found.shape == (1, 1, 8, 8) and found.dtype == torch.float32
        torch.testing.assert_close(found[0, 0], expected, atol=1e-6, rtol=0)
        assert len(found.unique()) == 64


def test_grey_of_16_and_of_8_bits_together(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.png", lambda path: Image.fromarray(depths()).save(path))
    both_splits(tmp_path, "b.png", lambda path: Image.new("L", (8, 8), 51).save(path))
    both_splits(tmp_path, "c.png", lambda path: Image.new("1", (8, 8), 1).save(path))
    deep, grey, white = load_dataset(tmp_path, size=8).train_images[:][:, 0]
    torch.testing.assert_close(deep, torch.from_numpy(depths() / 65535).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(grey, torch.full((8, 8), 0.2))
    assert (white == 1).all()
    refused(tmp_path, r"b\.png: expected mode and \(width, height\) of .*a\.png, \('I;16', \(8, 8\)\), found \('L'")


def test_grey_of_16_bits_among_colours_is_rounded_to_8(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.png", lambda path: Image.fromarray(depths()).save(path))
    both_splits(tmp_path, "b.png", lambda path: Image.new("RGB", (8, 8), (255, 0, 0)).save(path))
    grey, red = load_dataset(tmp_path, size=8).train_images[:]
    torch.testing.assert_close(grey, torch.from_numpy(depths() / 65535).float().expand(3, 8, 8), atol=1 / 500, rtol=0)
    assert (red[0] == 1).all() and not red[1:].any()


def test_grey_of_16_bits_keeps_its_range_when_it_is_made_smaller(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.png", lambda path: Image.fromarray(depths()).save(path))
    small = load_dataset(tmp_path, size=2).train_images[:]
    wide = Image.fromarray((depths() / 65535).astype(np.float32)).resize((2, 2), Image.Resampling.BILINEAR)
    torch.testing.assert_close(small[0, 0], torch.from_numpy(np.array(wide)), atol=1e-6, rtol=0)


def test_pictures_of_one_bit(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.png", lambda path: Image.fromarray(depths() > 30000).save(path))
    found = load_dataset(tmp_path).train_images[:]
    assert torch.equal(found[0, 0], torch.from_numpy(depths() > 30000).float())


@pytest.mark.parametrize("mode", ["P", "PA", "CMYK", "YCbCr"])
def test_the_advice_for_other_modes_keeps_the_picture(tmp_path: Path, mode: str) -> None:
    shades = Image.fromarray((depths() // 257).astype(np.uint8))
    plain = np.asarray(shades.convert("RGB"))
    colours = shades.convert("P" if mode in ("P", "PA") else "RGB")  # the palette of all greys
    both_splits(tmp_path, "a.tif", lambda path: colours.convert(mode).save(path))
    with pytest.raises(ValueError, match=rf"found {mode}; save it with picture\.convert\('RGBA?'\)\.save") as caught:
        load_dataset(tmp_path)
    to = re.search(r"convert\('(\w+)'\)", str(caught.value))
    assert to is not None
    for path in tmp_path.glob("*/ant/a.tif"):
        with Image.open(path) as picture:
            picture.convert(to[1]).save(path.with_suffix(".png"))
        path.unlink()
    found = load_dataset(tmp_path).train_images[0][:3].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - plain).max() <= (3 if mode == "YCbCr" else 1.01)


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_the_advice_for_numbers_without_a_range_keeps_the_picture(tmp_path: Path, mode: str, dtype: type) -> None:
    numbers = (depths().astype(np.float64) * 3 - 7000).astype(dtype)
    both_splits(tmp_path, "a.tif", lambda path: Image.fromarray(numbers).save(path))
    with pytest.raises(ValueError, match=rf"found {mode}; its value of white is unknown; save it as grey of 16"):
        load_dataset(tmp_path)
    for path in tmp_path.glob("*/ant/a.tif"):
        with Image.open(path) as picture:
            x = np.asarray(picture, np.float64)
            Image.fromarray((65535 * (x - x.min()) / np.ptp(x)).round().astype(np.uint16)).save(
                path.with_suffix(".png")
            )
        path.unlink()
    found = load_dataset(tmp_path).train_images[:]
    expected = (numbers - numbers.min()) / np.ptp(numbers.astype(np.float64))
    torch.testing.assert_close(found[0, 0], torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_colours_that_only_a_profile_explains(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.tif", lambda path: Image.new("LAB", (4, 5)).save(path))
    refused(tmp_path, r"a\.tif: .*found LAB; save it as RGB with PIL\.ImageCms")


# --- upright, on white, counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    """As Pillow's own transposition of the pixels that the camera wrote."""
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    both_splits(tmp_path, "a.png", lambda path: Image.fromarray(pixels).save(path, exif=exif))
    found = load_dataset(tmp_path).train_images[0].permute(1, 2, 0).numpy() * 255
    with Image.open(next(tmp_path.glob("train/ant/a.png"))) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    assert found.shape == expected.shape and (found.round() == expected).all()
    assert (expected.shape[:2] == (6, 4)) == (orientation > 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_hidden_colours_stay_hidden(tmp_path: Path, mode: str) -> None:
    colours = (200, 10, 0)[: len(mode) - 1]
    picture = Image.new(mode, (4, 2), (*colours, 255))
    for x in range(2):
        picture.putpixel((x, 0), (*colours, 0))
    both_splits(tmp_path, "a.png", lambda path: picture.save(path))
    with pytest.warns(UserWarning, match="2 images have transparent parts, which are shown on white"):
        found = load_dataset(tmp_path).train_images[0]
    assert found.shape == (len(mode) - 1, 2, 4) and (found[:, 0, :2] == 1).all()
    assert torch.equal(found[:, 1, 3] * 255, torch.tensor(colours, dtype=torch.float32))


def test_opaque_pictures_with_a_channel_for_transparency_say_nothing(tmp_path: Path) -> None:
    both_splits(tmp_path, "a.png", lambda path: Image.new("RGBA", (4, 2), (9, 8, 7, 255)).save(path))
    assert load_dataset(tmp_path).train_images.shape[1:] == (3, 2, 4)


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.gif", "c.jpg"):
        both_splits(tmp_path, name, lambda path: Image.new("L", (4, 5)).save(path, format="PNG"))
    (tmp_path / "train" / "ant" / "deeper").mkdir()
    (tmp_path / "train" / "ant" / "d.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"passed over 2 files or folders that are no images .*d\.heic"):
        assert len(load_dataset(tmp_path).train_images[:]) == 3

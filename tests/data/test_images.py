"""Reading pictures: what is turned, converted, dropped and refused, each with its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.transforms import v2

from tunekit.data.encoding import images
from tunekit.data.encoding.images import ANIMATED, TOO_SMALL, covering, cropped, png_bytes, read_image
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.data_file import content_hash
from tunekit.errors import DataError

COLOURS = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def test_a_plain_picture_is_its_pixels_from_a_file_and_from_bytes(tmp_path: Path) -> None:
    path, notices = saved(tmp_path, "plain.png", Image.fromarray(COLOURS)), Counter[str]()
    assert np.array_equal(read_image(path, notices), COLOURS)
    assert np.array_equal(read_image(Path(path).read_bytes()), COLOURS)
    assert np.array_equal(read_image(png_bytes(COLOURS)), COLOURS)
    assert not +notices


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_put_upright(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif, notices = Image.Exif(), Counter[str]()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](COLOURS))  # as a camera that was held so has it
    path = saved(tmp_path, "turned.png", Image.fromarray(stored), exif=exif)
    assert np.array_equal(read_image(path, notices), COLOURS)
    assert notices["images turned upright, as the EXIF data states"] == 1


def test_ink_depth_and_transparency_are_converted_and_counted(tmp_path: Path) -> None:
    notices = Counter[str]()
    ink = saved(tmp_path, "ink.jpg", Image.fromarray(COLOURS).convert("CMYK"))
    assert read_image(ink, notices).shape == COLOURS.shape
    values = (np.arange(24 * 40, dtype=np.uint16) * 60).reshape(24, 40)
    deep = saved(tmp_path, "deep.png", Image.fromarray(values))
    assert np.array_equal(read_image(deep, notices)[..., 0], np.rint(values / 257.0).astype(np.uint8))
    alpha = np.zeros((24, 40), np.uint8)
    alpha[:, :20] = 255
    clear = saved(tmp_path, "clear.png", Image.fromarray(np.dstack([COLOURS, alpha])))
    found = read_image(clear, notices)
    assert np.array_equal(found[:, :20], COLOURS[:, :20])
    assert (found[:, 20:] == 255).all()
    palette = saved(tmp_path, "palette.png", Image.fromarray(COLOURS).convert("P"))
    assert read_image(palette, notices).shape == COLOURS.shape
    grey = saved(tmp_path, "grey.png", Image.fromarray(COLOURS[..., 0]))
    assert np.array_equal(read_image(grey, notices), np.repeat(COLOURS[..., :1], 3, axis=2))
    assert +notices == {
        "images converted from CMYK to RGB": 1,
        "images with one deep channel (I;16), scaled to 8 bits": 1,
        "images with transparency, placed on a white background": 1,
    }


def test_floats_from_0_to_1_are_all_levels(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 24 * 40, dtype=np.float32).reshape(24, 40)
    found = read_image(saved(tmp_path, "float.tif", Image.fromarray(values)))
    assert np.array_equal(found[..., 0], np.rint(values * 255.0).astype(np.uint8))
    bytes_as_floats = saved(tmp_path, "bytes.tif", Image.fromarray(COLOURS[..., 0].astype(np.float32)))
    assert np.array_equal(read_image(bytes_as_floats)[..., 0], COLOURS[..., 0])


def test_animated_and_tiny_pictures_are_dropped_by_name(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(COLOURS, shift, axis=0)) for shift in (0, 5)]
    moving = saved(tmp_path, "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    one = saved(tmp_path, "one.png", Image.new("RGB", (1, 1)))
    with pytest.raises(Dropped, match=ANIMATED):
        read_image(moving)
    with pytest.raises(Dropped, match=TOO_SMALL):
        read_image(one)


def test_what_cannot_be_read_is_named_with_its_reason(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(COLOURS).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("cut.jpg", "truncated"), ("text.png", "cannot identify"), ("empty.png", "cannot identify")):
        with pytest.raises(DataError, match=f"{name} cannot be read as an image .*(?i:{reason})"):
            read_image(str(tmp_path / name))
    with pytest.raises(DataError, match=r"there is no image .*absent\.png"):
        read_image(str(tmp_path / "absent.png"))


def test_a_bomb_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "large.png", Image.fromarray(COLOURS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"large\.png has too many pixels"):
        read_image(path)


@pytest.mark.parametrize("shorter", [24, 16, 31])
@pytest.mark.parametrize("turned", [False, True])
def test_resizing_is_torchvisions(shorter: int, turned: bool) -> None:
    pixels = np.ascontiguousarray(COLOURS.transpose(1, 0, 2)) if turned else COLOURS
    theirs = v2.Resize(shorter, interpolation=v2.InterpolationMode.BILINEAR)(Image.fromarray(pixels))
    assert np.array_equal(covering(pixels, (shorter, shorter)), np.array(theirs))


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (20, 24), (24, 40), (48, 40)])
def test_what_covers_a_size_is_no_larger_than_it_must_be(size: tuple[int, int]) -> None:
    found = covering(COLOURS, size)
    assert any(side == least for side, least in zip(found.shape, size, strict=False))
    assert all(side >= least for side, least in zip(found.shape, size, strict=False))
    theirs = v2.CenterCrop(size)(torch.from_numpy(found.copy()).permute(2, 0, 1))
    assert torch.equal(torch.from_numpy(cropped(found, size)[0].copy()).permute(2, 0, 1), theirs)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL gives EPS to Ghostscript, whatever the file is called."""
    started: list[str] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image .*the supported formats are JPEG, PNG"):
        read_image(str(tmp_path / "a.png"))
    assert not started


@pytest.mark.parametrize("kind", ["BMP", "DIB", "TIFF", "WEBP", "JPEG2000", "PPM", "TGA", "PCX", "AVIF", "GIF"])
def test_pictures_of_every_kind_are_read_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this PIL writes no {kind}")
    path = saved(tmp_path, "picture.jpg", Image.fromarray(COLOURS), format=kind)
    assert read_image(path).shape == (*COLOURS.shape[:2], 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "RGBA", "LA", "I;16"])
def test_large_pictures_are_converted_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """PIL and numpy would hold a picture of 80 megapixels six times."""
    deep = Image.fromarray((np.arange(24 * 40, dtype=np.uint16) * 60).reshape(24, 40))
    image = deep if mode == "I;16" else Image.fromarray(COLOURS).convert("RGB" if mode == "P" else mode)
    if mode == "P":
        path = saved(tmp_path, "picture.png", image.convert("P"), transparency=3)
    else:
        path = saved(tmp_path, "picture.tif", image)
    whole = read_image(path)
    monkeypatch.setattr(images, "BLOCK_PIXELS", 90)
    assert np.array_equal(read_image(path), whole)


def test_the_files_of_rows_are_hashed_only_if_they_end(tmp_path: Path) -> None:
    for path in ("/dev/zero", str(tmp_path)):
        with pytest.raises(OSError, match="not a regular file"):
            content_hash(Path(path))

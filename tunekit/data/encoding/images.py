"""Reads images from files or bytes, as upright RGB pixels with 8 bits per channel.

Lossy conversions (of colour space, depth or transparency) are counted for the user. Images that cannot be trained on
are dropped and counted. Images that cannot be read raise an error with the file's name.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tunekit.contracts import Array, Pixels
from tunekit.data.encoding.outcomes import Dropped
from tunekit.errors import DataError, InputError
from tunekit.machine.versions import needed

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

HOW_TO_INSTALL = "run: pip install 'tunekit[images]'"
Size = tuple[int, int]  # height and width in pixels
T = TypeVar("T")
BILINEAR = 2  # PIL's number for this filter
ORIENTATION = 0x0112  # the EXIF tag; 1: upright
FORMATS = (  # PIL's names of the formats that are read; other formats, such as EPS, make PIL start programs
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "JPEG2000", "AVIF", "PPM", "TGA", "QOI", "ICO", "PCX"),
)
BLOCK_PIXELS = 2**20  # pixels converted at a time, because PIL and numpy make several copies of a block
LEAST_PIXELS = 16  # minimum of the shorter side, in pixels
ANIMATED = "animated image"
TOO_SMALL = f"less than {LEAST_PIXELS} pixels on a side"
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
BIT_DEPTH_STEP = 257.0  # 65535 / 255


def read_image(source: str | bytes, notices: Counter[str] | None = None) -> Pixels:
    """(H, W, 3) the upright pixels of an image. `source`: the path or the bytes. `notices`: counts of conversions.

    Raises: Dropped for an animated or tiny image; DataError if the file is damaged or not an image; InputError if
        Pillow is not installed.
    """
    return _read(source, partial(_upright_pixels, notices=Counter[str]() if notices is None else notices))


def read_size(source: str | bytes) -> Size:
    """The upright size of an image, from its header alone: damage behind the header is not found. Raises: as
    read_image."""
    return _read(source, _upright_size)


def _read(source: str | bytes, take: Callable[[PilImage], T]) -> T:
    """What `take` reads from the opened image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(*needed("reading images", HOW_TO_INSTALL, error)) from error

    file = source if isinstance(source, str) else None
    if file is not None and not Path(file).is_file():
        how = "check the path; a relative path starts at the folder of the table"
        raise DataError(f"there is no image {file}", how)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            formats = [name for name in FORMATS if name in Image.OPEN]  # older versions of PIL lack some
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
                if getattr(opened, "n_frames", 1) > 1:
                    raise Dropped(ANIMATED)
                return take(opened)
    except Dropped:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        what = "has too many pixels for an image"
        raise DataError(f"{_named(file)} {what}", "make the image smaller") from None
    except Exception as error:  # PIL's decoders raise all kinds of exceptions for damaged files
        reason = str(error).partition("\n")[0].replace(f" {source!r}", "") if file is not None else str(error)
        what = f"{_named(file)} cannot be read as an image ({reason.strip() or type(error).__name__})"
        raise DataError(what, f"repair or remove the file; the supported formats are {', '.join(FORMATS)}") from None


def _upright_size(image: PilImage) -> Size:
    """The height and width of a PIL image. Raises: Dropped for a tiny image."""
    if min(image.size) < LEAST_PIXELS:
        raise Dropped(TOO_SMALL)
    width, height = image.size
    return (width, height) if image.getexif().get(ORIENTATION) in range(5, 9) else (height, width)


def _upright_pixels(image: PilImage, notices: Counter[str]) -> Pixels:
    """(H, W, 3) the RGB pixels of a PIL image."""
    from PIL import ImageOps

    image.load()
    turned = image.getexif().get(ORIENTATION) in range(2, 9)
    notices["images turned upright, as the EXIF data states"] += turned
    ImageOps.exif_transpose(image, in_place=True)
    return _as_pixels(image, notices)


def _named(file: str | None) -> str:
    return "the image" if file is None else file


def _as_pixels(image: PilImage, notices: Counter[str]) -> Pixels:
    """(H, W, 3) the RGB pixels of a PIL image. Raises: Dropped for a tiny image."""
    if min(image.size) < LEAST_PIXELS:
        raise Dropped(TOO_SMALL)
    block_rows = max(BLOCK_PIXELS // image.width, 1)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    to_rgb = _deep_to_rgb(image, notices) if image.mode in DEEP_MODES else _flat_to_rgb(image, notices)
    for top in range(0, image.height, block_rows):
        bottom = min(top + block_rows, image.height)
        pixels[top:bottom] = to_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _deep_to_rgb(image: PilImage, notices: Counter[str]) -> Callable[[PilImage], Array]:
    """Returns a function that converts a block of the image to (H, W, 1) levels of 8 bits. The image has one channel of
    more than 8 bits.
    """
    notices[f"images with one deep channel ({image.mode}), scaled to 8 bits"] += 1
    most = np.asarray(image).max(initial=0)
    scale = 1 / 255 if image.mode == "F" and most <= 1 else 1.0 if most <= 255 else BIT_DEPTH_STEP
    return lambda block: np.clip(np.rint(np.asarray(block).astype(np.float64) / scale), 0, 255)[..., None]


def _flat_to_rgb(image: PilImage, notices: Counter[str]) -> Callable[[PilImage], Array]:
    """Returns a function that converts a block of the image, with 8 bits per channel, to (H, W, 3) RGB pixels."""
    from PIL import Image

    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        notices[f"images converted from {image.mode} to RGB"] += 1
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return lambda block: np.asarray(block.convert("RGB"))
    notices["images with transparency, placed on a white background"] += 1
    white = (255, 255, 255, 255)
    return lambda block: np.asarray(
        Image.alpha_composite(Image.new("RGBA", block.size, white), block.convert("RGBA")).convert("RGB")
    )


def covering(pixels: Pixels, size: Size) -> Pixels:
    """(H, W, 3) the image, resized to the smallest size that covers `size`. The aspect ratio stays the same.

    For a square `size`, this equals torchvision's Resize(side) for a PIL image.
    """
    height, width = pixels.shape[:2]
    is_wide = size[0] * width >= size[1] * height  # wider than `size`, so the height decides the scale
    return resized(pixels, (size[0], size[0] * width // height) if is_wide else (size[1] * height // width, size[1]))


def resized(pixels: Pixels, size: Size, resample: int = BILINEAR) -> Pixels:
    """(H, W, 3) the image, stretched to `size`. `resample`: PIL's number of the filter."""
    from PIL import Image

    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling(resample)), dtype=np.uint8)


def cropped(pixels: Pixels, size: Size, corner: Size | None = None) -> tuple[Pixels, Size]:
    """A crop of the image with shape (*size, 3), and the top left corner of the crop.

    `corner`: the crop's top left corner; None: crop the centre, as in torchvision's CenterCrop.
    """
    (height, width), (high, wide) = pixels.shape[:2], size
    top, left = corner or (round((height - high) / 2.0), round((width - wide) / 2.0))
    return pixels[top : top + high, left : left + wide], (top, left)


def png_bytes(pixels: Pixels) -> bytes:
    """The pixels (H, W, 3) as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()

"""The images of a row of text and images: where they are, and which tokens stand for them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tunekit.contracts import Array, Pixels, Row, Rows
from tunekit.data.encoding.images import read_image
from tunekit.data.encoding.sources import IMAGES
from tunekit.errors import DataError
from tunekit.formats.media import Media
from tunekit.objectives.rows.labels import utf8

SAMPLED = 1000  # rows whose features are counted for a plan


@dataclass(frozen=True)
class RowImage:
    """An image of a row. `size`: the number of its bytes in the part `image_data`; 0 if it is read from `path`.
    `start`, `stop`: the row's tokens that stand for it. `limit`: the maximum number of its tokens, if it was made
    smaller than other rows' images; else 0. `alone`: whether these are the tokens of an only image."""

    path: str
    size: int
    sha256: str
    height: int
    width: int
    start: int
    stop: int
    limit: int = 0
    alone: bool = True


def images_in(row: Row) -> list[RowImage]:
    """The images of a row."""
    text = row.parts[IMAGES].tobytes().decode()
    return [RowImage(**image) for image in json.loads(text)] if text else []


def image_parts(images: Sequence[RowImage], data: bytes) -> dict[str, Array]:
    hashes = bytes.fromhex("".join(image.sha256 for image in images))
    return {
        IMAGES: utf8(json.dumps([asdict(image) for image in images]) if images else ""),
        "image_data": np.frombuffer(data, np.uint8),
        "image_hashes": np.frombuffer(hashes, np.uint8),
    }


def stored_bytes(row: Row, images: Sequence[RowImage], at: int) -> bytes:
    """The bytes of image `at` of a row; empty if it is read from a file."""
    first = sum(each.size for each in images[:at])
    return row.parts["image_data"][first:][: images[at].size].tobytes()


def feature_tokens(rows: Rows, processor_token: int) -> int:
    """About the number of features of the different images of the rows, from SAMPLED of them."""
    places = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED)).astype(int) if len(rows) else ()
    counts = dict[str, int]()
    for row in map(rows.__getitem__, map(int, places)):
        for image in images_in(row):
            counts[image.sha256] = int((row.parts["ids"][image.start : image.stop] == processor_token).sum())
    return round(sum(counts.values()) * len(rows) / max(len(places), 1))


def before_image(images: Sequence[RowImage], stop: int) -> int:
    """The last place up to `stop` that is inside no image."""
    for image in reversed(images):  # a token of two line breaks can belong to two images
        stop = image.start if image.start < stop < image.stop else stop
    return stop


def path_of(image: Media) -> str:
    return str(Path(image.path).absolute()) if image.data is None else ""


def pixels_of(row: Row, images: Sequence[RowImage], at: int) -> Pixels:
    """The pixels (H, W, 3) of image `at` of a row. Raises: DataError if its file changed since the row was encoded."""
    image = images[at]
    try:
        data = Path(image.path).read_bytes() if image.path else stored_bytes(row, images, at)
    except OSError as error:
        raise DataError(f"{row.origin}: {image.path} cannot be read ({error.strerror})", "put the image back") from None
    if hashlib.sha256(data).hexdigest() != image.sha256:
        what = f"{row.origin}: {image.path} has changed since its row was encoded"
        raise DataError(what, "put the image back, or start a new run, which encodes the rows again")
    return read_image(data)

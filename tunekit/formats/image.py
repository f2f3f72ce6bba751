"""`format: image`: a picture, and what it shows where the rows say so, `{"image": "dog.jpg", "text": ...}`.

Comes in: one row.  Goes out: ImageExample.  The picture is a path, seen from the table's folder, or a file's bytes.
"""

from dataclasses import dataclass

from tunekit.formats.fields import Fields, check_text
from tunekit.formats.media import Media, read_media

DESCRIPTION = "image: an image's file; text: what it shows, where the recipe does not say it for all"
FIELDS = ("image", "text")
REQUIRED = ("image",)
EXAMPLE = "image"
MEDIA = ("image",)


@dataclass(frozen=True)
class ImageExample:
    """A picture, and what it shows; None: what the recipe says of all."""

    image: Media
    text: str | None


def make_example(row: Fields) -> ImageExample:
    """The picture and its text."""
    text = row.get("text")
    return ImageExample(read_media(row, "image"), None if text is None else check_text(text, "text"))

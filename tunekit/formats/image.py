"""`format: image`: an image and an optional caption, `{"image": "dog.jpg", "text": ...}`.

The image is a path, relative to the table's folder, or the bytes of a file.
"""

from dataclasses import dataclass

from tunekit.formats.fields import Fields, check_text
from tunekit.formats.media import Media, read_media

DESCRIPTION = "image: an image file; text: its caption, needed if the recipe has no objective.instance_prompt"
FIELDS = ("image", "text")
REQUIRED = ("image",)
EXAMPLE = "image"
MEDIA = ("image",)


@dataclass(frozen=True)
class ImageExample:
    """An image and its caption. If `text` is None, the recipe's caption (objective.instance_prompt) is used."""

    image: Media
    text: str | None


def make_example(row: Fields) -> ImageExample:
    """The image and its caption."""
    text = row.get("text")
    return ImageExample(read_media(row, "image"), None if text is None else check_text(text, "text"))

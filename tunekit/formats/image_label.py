"""`format: image_label`: an image and its label, `{"image": "cat.jpg", "label": ...}`.

In a folder of folders, the label is the folder's name.
"""

from dataclasses import dataclass

from tunekit.formats.fields import Fields
from tunekit.formats.labels import ALIASES as LABEL_ALIASES
from tunekit.formats.labels import LabelValue, read_label
from tunekit.formats.media import Media, read_media

DESCRIPTION = "image: an image file; label: a name or number, or a list of them (objective.problem_type)"
FIELDS = ("image", "label")
REQUIRED = ("image", "label")
ALIASES = LABEL_ALIASES
EXAMPLE = "image_label"
MEDIA = ("image",)


@dataclass(frozen=True)
class ImageLabelExample:
    """An image and the name of its class."""

    image: Media
    label: LabelValue


def make_example(row: Fields) -> ImageLabelExample:
    """The image and its label."""
    return ImageLabelExample(read_media(row, "image"), read_label(row))

"""`format: audio_label`: a recording and its label, `{"audio": "ring.wav", "label": ...}`.

In a folder of folders, the label is the folder's name. The recording is read later.
"""

from dataclasses import dataclass

from tunekit.formats.fields import Fields
from tunekit.formats.labels import ALIASES as LABEL_ALIASES
from tunekit.formats.labels import LabelValue, read_label
from tunekit.formats.media import AUDIO_ALIASES, AUDIO_FIELDS, Media, read_media, renamed

DESCRIPTION = (
    "audio: a recording's path or {bytes, path}; label: a name or number, or a list of them (objective.problem_type)"
)
FIELDS = ("audio", "label")
REQUIRED = ("audio", "label")
ALIASES = AUDIO_ALIASES | LABEL_ALIASES
MEDIA = AUDIO_FIELDS
EXAMPLE = "audio_label"


@dataclass(frozen=True)
class AudioLabelExample:
    """A recording and the name of its class."""

    audio: Media
    label: LabelValue


def make_example(row: Fields) -> AudioLabelExample:
    """The recording and its label."""
    row = renamed(row, AUDIO_ALIASES)
    return AudioLabelExample(read_media(row, "audio"), read_label(row))

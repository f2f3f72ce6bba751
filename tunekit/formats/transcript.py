"""`format: transcript`: a recording and its transcript, `{"audio": ..., "text": ...}`. The recording is read later."""

from collections.abc import Mapping
from dataclasses import dataclass

from tunekit.errors import DataError
from tunekit.formats.fields import Fields, read_optional_text, read_text
from tunekit.formats.media import AUDIO_ALIASES, AUDIO_FIELDS, Media, read_media, renamed

DESCRIPTION = "audio: a file's path or {bytes, path}; text: the transcript, or segments; optional: language and task"
FIELDS = ("audio", "text", "language", "task", "segments")
REQUIRED = ("audio", "text")  # or segments, whose texts are joined
STANDS_FOR = {"text": "segments"}
ALIASES = {**AUDIO_ALIASES, **dict.fromkeys(("sentence", "transcription", "transcript"), "text")}
MEDIA = AUDIO_FIELDS
EXAMPLE = "transcript"
TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class Segment:
    """The transcript between two times of a recording, in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class TranscriptExample:
    """A recording and its transcript. `language`, `task`: None if the row has none. `segments`: the parts of the
    transcript with their times."""

    audio: Media
    text: str
    language: str | None = None
    task: str | None = None
    segments: tuple[Segment, ...] = ()


def make_example(row: Fields) -> TranscriptExample:
    """The recording and its transcript."""
    row = renamed(row, ALIASES)
    segments = _segments(row.get("segments"))
    audio = read_media(row, "audio")
    text = read_optional_text(row, "text") if segments else read_text(row, "text")
    if not text.strip():
        text = " ".join(each.text.strip() for each in segments)
    task = read_optional_text(row, "task") or None
    if task is not None and task not in TASKS:
        raise DataError(f"unknown 'task' {task!r}", f"write {' or '.join(TASKS)}")
    return TranscriptExample(audio, text, read_optional_text(row, "language") or None, task, segments)


def _segments(value: object) -> tuple[Segment, ...]:
    """Reads the segments of a transcript. They must be in order of time and must not overlap."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise DataError("'segments' must be a list of {start, end, text}", "leave segments out if there are none")
    segments: list[Segment] = []
    for number, each in enumerate(value):
        where = f"segments[{number}]."
        if not isinstance(each, Mapping):
            raise DataError(f"'segments[{number}]' must be {{start, end, text}}", "times are seconds")
        start, end = (_seconds(each.get(name), where + name) for name in ("start", "end"))
        before = segments[-1].end if segments else 0.0
        if not before <= start < end:
            what = (
                f"'segments[{number}]' lasts from {start:g} to {end:g} s, but the segment before ends at {before:g} s"
            )
            raise DataError(what, "give the segments in order of time, without overlap")
        segments.append(Segment(start, end, read_text(each, "text", where=where)))
    return tuple(segments)


def _seconds(value: object, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise DataError(f"'{label}' must be a number of seconds, not {str(value)[:40]!r}", "write 0 or more")
    return float(value)

"""Recordings to the features of rows, with their texts to rows, and alone to texts.

Comes in: TranscriptExamples, or Recordings.  Goes out: Rows, or what a model writes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunekit.contracts import Row, Sampling
from tunekit.data.encoding.encode import TOO_LONG, EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.encoding.sounds import heard, mixed, pieces, quietest
from tunekit.data.reading.sound import SILENCE, Sound, opened
from tunekit.errors import DataError, InputError
from tunekit.files.cache_folder import default_cache_folder
from tunekit.files.durable import free_bytes
from tunekit.formats.media import Media
from tunekit.formats.transcript import Segment, TranscriptExample
from tunekit.model.load import LoadedModel
from tunekit.model.speech.features import FeatureExtractor
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.model.speech.transcribe import transcribe, without_padding
from tunekit.recipe.objectives.speech import SpeechSettings

Array = NDArray[Any]
EMPTY = "empty transcript"
SILENT = "silent recording"
COMPUTED = "recordings are heard anew in each step: the cache's disk has less than 5 GiB free for their features"
LEAST_FREE_BYTES = 5 * 2**30  # of the disk of the cache: features of 30 s take about 1 MB
HEARD = {"features": "<f4", "place": "u1", "samples": "<i4"}  # parts of a row of a recording
PARTS = {**HEARD, "answer": "<i4", "text": "u1"}  # with a transcript
SPLIT = "give the row segments, [{start, end, text}], and write data.excess_length: split, or cut the file"


@dataclass(frozen=True)
class Recording:
    """A recording that is to be written down, in a language and for a task, with times or without."""

    media: Media
    language: str | None
    task: str
    timestamps: bool = False


@dataclass(frozen=True)
class Piece:
    """What becomes a row: of an example, the samples start .. stop-1 and what is said in them."""

    example: TranscriptExample
    start: int
    stop: int | None  # None: its end


def make_row(parts: Mapping[str, Array], frames: int, origin: str, number: int = 0) -> Row:
    """A row of a recording of so many frames: what `parts_of` gives; the ids of its `answer` (A + 1,), the first of
    which begins it; and its `text`."""
    tokens = max(len(parts["answer"]) - 1, 0)
    return Row({name: parts[name] for name in PARTS}, (frames, tokens), tokens, origin, number)


@dataclass(frozen=True)
class Span:
    """Samples start .. stop-1 of a recording."""

    media: Media
    start: int
    stop: int

    def features(self, processor: FeatureExtractor) -> Array:
        """(frames, bands) log-mel, as FeatureExtractor.features keeps it. Raises: DataError where the file has gone."""
        with opened(self.media) as sound:
            return processor.features(heard(sound, self.start, self.stop, processor.rate))

    @property
    def place(self) -> Array:
        """Where it can be heard again, as UTF-8."""
        return utf8(json.dumps([os.path.abspath(self.media.path), self.start, self.stop]))


def parts_of(span: Span, processor: FeatureExtractor, notices: Counter[str]) -> dict[str, Array]:
    """The parts HEARD of a row: its `features`, or the `place` where it can be heard again, which then is noticed; and
    how many `samples` it has at the model's rate.

    Raises: Dropped where it is silent.
    """
    with opened(span.media) as sound:
        samples = heard(sound, span.start, span.stop, processor.rate)
    if float(samples.abs().max()) < SILENCE:
        raise Dropped(SILENT)
    count = np.asarray([len(samples)], np.int32)
    if span.media.data is None and free_bytes(default_cache_folder()) < LEAST_FREE_BYTES:
        notices[COMPUTED] += 1
        return {"features": np.zeros(0, np.float32), "place": span.place, "samples": count}
    return {"features": processor.features(samples).reshape(-1), "place": utf8(""), "samples": count}


def features_of(row: Row, processor: FeatureExtractor) -> Array:
    """(bands, frames) of a row, made anew where they are not kept. Raises: DataError where its file has gone."""
    place = row.parts["place"].tobytes().decode()
    if not place:
        return processor.filled(row.parts["features"])
    path, start, stop = json.loads(place)
    return processor.filled(Span(Media(path), start, stop).features(processor).reshape(-1))


def utf8(text: str) -> Array:
    """A text as a part of a row."""
    return np.frombuffer(text.encode(), np.uint8)


class SpeechEncoder:
    """A RowEncoder of recordings with their transcripts."""

    def __init__(self, settings: SpeechSettings, processor: SpeechProcessor, options: EncodeOptions) -> None:
        self.settings, self.processor, self.options = settings, processor, options
        self.notices: Counter[str] = Counter()

    def examples(self, example: TranscriptExample) -> Sequence[Piece]:
        """The whole recording, or pieces of one that is longer than the model hears at once.

        Raises: Dropped or DataError for one that may not be cut, or cannot be.
        """
        most = self.processor.seconds
        with opened(example.audio) as sound:
            if sound.seconds <= most:
                return [Piece(example, 0, None)]
            what = lasts(sound, most)
            if self.options.excess_length == "drop":
                raise Dropped(longer_than(most))
            if self.options.excess_length == "error" or not example.segments:
                raise DataError(what, SPLIT)
            return list(_split(example, sound, most))

    def encode(self, piece: Piece, origin: str) -> Row:
        """The row. Raises: Dropped where there is nothing to hear or to write; DataError where the row is wrong."""
        example, processor = piece.example, self.processor
        if not example.text.strip():
            raise Dropped(EMPTY)
        with opened(example.audio) as sound:
            stop, rate = sound.samples if piece.stop is None else piece.stop, sound.rate
        heard_of = parts_of(Span(example.audio, piece.start, stop), processor, self.notices)
        answer = [*self._prefix(example), *self._text_ids(example, piece.start / rate)]
        if processor.tokenizer.eos_id is not None:
            answer.append(processor.tokenizer.eos_id)
        most = min(self.options.max_length, processor.longest_answer)
        if len(answer) - 1 > most:
            if self.options.excess_length == "drop":
                own = f"transcript longer than the {most} tokens that the model can write"
                raise Dropped(TOO_LONG if most < processor.longest_answer else own)
            what = f"the transcript has {len(answer) - 1} tokens, and an answer may have {most}"
            raise DataError(what, "cut the recording, or leave the row out")
        parts = {**heard_of, "answer": np.asarray(answer, np.int32), "text": utf8(example.text)}
        return make_row(parts, processor.frames_of((stop - piece.start) / rate), origin)

    def _prefix(self, example: TranscriptExample) -> list[int]:
        settings = self.settings
        language, task = example.language or settings.language, example.task or settings.task
        return self.processor.prefix(language, task, settings.timestamps)

    def _text_ids(self, example: TranscriptExample, begun: float) -> list[int]:
        """Of the text, or of its segments between their times, which count from where the piece begins."""
        processor = self.processor
        if not self.settings.timestamps:
            return processor.text_ids(example.text)
        if not example.segments:
            raise DataError("no 'segments', and objective.timestamps asks for times", "write [{start, end, text}]")
        found: list[int] = []
        for each in example.segments:
            times = (processor.timestamp(moment - begun) for moment in (each.start, each.end))
            found += [next(times), *processor.text_ids(each.text), next(times)]
        return found

    def prompt(self, example: TranscriptExample) -> tuple[Recording, str] | None:
        """The recording, and its text."""
        settings = self.settings
        return Recording(
            example.audio, example.language or settings.language, example.task or settings.task
        ), example.text

    def question(self, text: str) -> Recording:
        """The recording in a file."""
        return Recording(Media(text), self.settings.language, self.settings.task, self.settings.timestamps)

    def shown(self, asked: Recording) -> str:
        """The file's name."""
        return asked.media.name


def lasts(sound: Sound, most: float) -> str:
    """What is wrong with a recording that is too long."""
    return f"{sound.name} lasts {sound.seconds:,.1f} s, and the model hears {most:g} s at once"


def longer_than(most: float) -> str:
    """Why such a recording is dropped."""
    return f"recording longer than the {most:g} s that the model hears at once"


def _split(example: TranscriptExample, sound: Sound, most: float) -> list[Piece]:
    """Pieces of whole segments, cut where it is quietest between two of them."""
    found: list[Piece] = []
    start, inside = 0.0, list[Segment]()
    for segment in example.segments:
        if segment.end - segment.start > most:
            what = f"{sound.name}: what is said from {segment.start:g} to {segment.end:g} s is longer than {most:g} s"
            raise DataError(what, "give shorter segments")
        if inside and segment.end - start > most:
            cut = _quiet_between(sound, inside[-1].end, max(min(segment.start, start + most), inside[-1].end))
            found.append(_piece(example, inside, sound, start, cut))
            start, inside = cut, []
        if segment.end - start > most:
            start = segment.start  # after a long pause
        inside.append(segment)
    end = min(sound.seconds, start + most)
    return [*found, _piece(example, inside, sound, start, end)]


def _piece(example: TranscriptExample, segments: list[Segment], sound: Sound, start: float, end: float) -> Piece:
    text = " ".join(each.text.strip() for each in segments)
    part = replace(example, text=text, segments=tuple(segments))
    return Piece(part, round(start * sound.rate), min(round(end * sound.rate), sound.samples))


def _quiet_between(sound: Sound, first: float, last: float) -> float:
    begin, end = (min(round(moment * sound.rate), sound.samples) for moment in (first, last))
    if end <= begin:
        return first
    window = mixed(sound.read(begin, end))
    return (begin + quietest(window, sound.rate, 0, end - begin)) / sound.rate


def transcripts(
    model: LoadedModel,
    processor: SpeechProcessor,
    recordings: Sequence[Recording],
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling,
) -> list[str]:
    """What is said in each recording, in order; several pieces of one are joined.

    Raises: DataError, naming the file.
    """
    parts = [(number, piece) for number, each in enumerate(recordings) for piece in _pieces_of(each, processor)]
    kinds: dict[tuple[str | None, str, bool], list[int]] = {}
    for place, (number, _) in enumerate(parts):
        each = recordings[number]
        kinds.setdefault((each.language, each.task, each.timestamps), []).append(place)
    texts = [""] * len(parts)
    for (language, task, timestamps), places in kinds.items():
        asked = asked_of(processor, language, task)
        named = language or ("en" if processor.multilingual else None)
        room = processor.longest_answer - len(processor.prefix(named, task, timestamps)) - 1
        together = batch_size if processor.padded else 1
        for start in range(0, len(places), together):
            some = places[start : start + together]
            spans = [Span(recordings[number].media, *piece) for number, piece in (parts[at] for at in some)]
            features = [torch.from_numpy(processor.filled(each.features(processor).reshape(-1))) for each in spans]
            found = transcribe(
                model,
                torch.stack(features),
                asked,
                timestamps=timestamps,
                most_tokens=min(max_new_tokens, room),
                place=start,
                sampling=sampling,
            )
            for at, ids in zip(some, found, strict=True):
                texts[at] = processor.text(without_padding(ids, processor.tokenizer.eos_id))
    answers: list[list[str]] = [[] for _ in recordings]
    for (number, _), text in zip(parts, texts, strict=True):
        answers[number].append(text)
    return [" ".join(filter(None, each)) for each in answers]


def asked_of(processor: SpeechProcessor, language: str | None, task: str) -> dict[str, str]:
    """What transformers is told of language and task: of models of English alone, nothing.

    Raises: InputError for a language or task that the model does not know.
    """
    try:
        if processor.multilingual:
            return {"task": task, **({} if language is None else {"language": processor.language_code(language)})}
        processor.prefix(language, task, timestamps=False)
    except DataError as error:
        raise InputError(error.problems[0].what, error.problems[0].how) from None
    return {}


def _pieces_of(recording: Recording, processor: SpeechProcessor) -> list[tuple[int, int]]:
    with opened(recording.media) as sound:
        return list(pieces(sound, processor.seconds))

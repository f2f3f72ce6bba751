"""Rows of recordings with their transcripts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tunekit.contracts import IGNORED, Batch, Row, RowLayout, RowParts, Span
from tunekit.data.batching.pad import lay_end_to_end
from tunekit.data.encoding.encode import TOO_LONG
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.encoding.sounds import mixed, quietest
from tunekit.data.reading.sound import Sound, opened
from tunekit.errors import DataError
from tunekit.formats.media import Media
from tunekit.formats.transcript import Segment, TranscriptExample
from tunekit.model.speech.processor import SpeechProcessor
from tunekit.objectives.rows.labels import utf8
from tunekit.objectives.rows.recordings import SOUND_PARTS, Clip, RecordingRows, lasts, longer_than
from tunekit.objectives.rows.transcribing import Recording
from tunekit.recipe.objectives.speech import SpeechSettings

EMPTY = "empty transcript"
SPLIT = "cut the file, or add segments [{start, end, text}] to the row and write data.excess_length: split"


@dataclass(frozen=True)
class TranscriptPart:
    """A part of an example: the recording's samples from start to stop-1, and the transcript of these samples."""

    example: TranscriptExample
    start: int
    stop: int | None  # None: the end of the recording


@dataclass(frozen=True, eq=False)
class TranscriptRows(RecordingRows):
    """Rows of recordings with transcripts. Parts: SOUND_PARTS; `answer` (A + 1,), ids whose first token begins every
    answer and is not predicted; and `text`, the answer's text. Tokens of language and task are predicted too, as in
    transformers."""

    example = "transcript"
    allowed_options = (
        ("train_on", "assistant", "rows of recordings are always trained on the transcript"),
        (
            "excess_length",
            "drop, split or error",
            "truncating a recording would train on text that is no longer in the audio",
        ),
    )

    settings: SpeechSettings
    processor: SpeechProcessor

    @cached_property
    def layout(self) -> RowLayout:
        """The layout, with two sizes that are padded separately: the number of frames and the number of tokens."""
        padded = self.processor.padded
        return RowLayout(
            {**SOUND_PARTS, "answer": "<i4", "text": "u1"},
            token_parts=("answer",),
            sizes=2,
            token_sizes=(1,),
            minimum=(self.processor.frames, 0) if padded else (),
            identity=("features", "place"),
            batch_key=None if padded else "samples",
        )

    def examples(self, example: TranscriptExample) -> Sequence[TranscriptPart]:
        """The whole recording; or its parts, if it is longer than the model's input.
        Raises: Dropped or DataError for a recording that is longer than the model's input, if the recipe does not split
        recordings, or if this recording has no segments."""
        maximum = self.processor.seconds
        with opened(example.audio) as sound:
            if sound.seconds <= maximum:
                return [TranscriptPart(example, 0, None)]
            if self.options.excess_length == "drop":
                raise Dropped(longer_than(maximum))
            if self.options.excess_length == "error" or not example.segments:
                raise DataError(lasts(sound, maximum), SPLIT)
            return list(_split(example, sound, maximum))

    def encode(self, example: TranscriptPart, origin: str) -> Row:
        """The row of a part. Raises: Dropped for a silent recording or an empty transcript; DataError if the example
        is wrong."""
        spoken, processor = example.example, self.processor
        if not spoken.text.strip():
            raise Dropped(EMPTY)
        with opened(spoken.audio) as sound:
            stop, rate = sound.samples if example.stop is None else example.stop, sound.rate
        sound_parts = self.sound_parts(Clip(spoken.audio, example.start, stop))
        language, task = spoken.language or self.settings.language, spoken.task or self.settings.task
        answer = processor.prefix(language, task, self.settings.timestamps)
        answer += self._text_ids(spoken, example.start / rate)
        if processor.tokenizer.eos_id is not None:
            answer.append(processor.tokenizer.eos_id)
        self._check_length(len(answer) - 1)
        parts = {**sound_parts, "answer": np.asarray(answer, np.int32), "text": utf8(spoken.text)}
        return self._row(parts, processor.frames_of((stop - example.start) / rate), origin)

    def _check_length(self, tokens: int) -> None:
        longest = self.processor.longest_answer
        maximum = min(self.options.max_length, longest)
        if tokens <= maximum:
            return
        if self.options.excess_length == "drop":
            beyond_model = f"transcript longer than the {maximum} tokens that the model can write"
            raise Dropped(TOO_LONG if maximum < longest else beyond_model)
        what = f"the transcript has {tokens} tokens, but an answer may have at most {maximum}"
        raise DataError(what, "cut the recording into shorter ones, or leave the row out")

    def _row(self, parts: RowParts, frames: int, origin: str, number: int = 0) -> Row:
        """A row with these arrays, but without arrays that a step added."""
        parts = {name: parts[name] for name in self.layout.parts}
        return self.make_row(parts, origin, number, (frames, self.units_in(parts)))

    def units_in(self, parts: RowParts) -> int:
        return max(len(parts["answer"]) - 1, 0)

    def _text_ids(self, example: TranscriptExample, start: float) -> list[int]:
        """The ids of the text. With timestamps: the ids of its segments, each between a token for its start time and a
        token for its end time. Times are counted from `start`."""
        processor = self.processor
        if not self.settings.timestamps:
            return processor.text_ids(example.text)
        if not example.segments:
            raise DataError(
                "the row has no 'segments', which objective.timestamps needs",
                "write segments: [{start, end, text}]",
            )
        ids: list[int] = []
        for segment in example.segments:
            first, last = (processor.timestamp(moment - start) for moment in (segment.start, segment.end))
            ids += [first, *processor.text_ids(segment.text), last]
        return ids

    def prompt(self, example: TranscriptExample) -> tuple[Recording, str]:
        """The recording, and its text."""
        language, task = example.language or self.settings.language, example.task or self.settings.task
        return Recording(example.audio, language, task), example.text

    def question(self, text: str) -> Recording:
        """The recording in a file."""
        return Recording(Media(text), self.settings.language, self.settings.task, self.settings.timestamps)

    def readable(self, prompt: Recording) -> str:
        """The file's name."""
        return prompt.media.name

    def cut(self, row: Row, start: int, stop: int) -> Row:
        """The row with the whole recording, and with the tokens from start to stop-1 of its answer."""
        parts = {**row.parts, "answer": row.parts["answer"][start : stop + 1]}
        return self._row(parts, row.sizes[0], row.origin, row.number)

    def fill(self, rows: Iterator[Row], size: int, part: int) -> list[Row]:
        """A row with a recording of the maximum length. Its answer has `size` tokens, but at most as many as the model
        can write."""
        row, processor = next(rows), self.processor
        parts = {**row.parts, "answer": np.resize(row.parts["answer"], min(size, processor.longest_answer) + 1)}
        if not processor.padded:
            samples = np.asarray([processor.seconds * processor.rate], np.int32)
            parts |= {"samples": samples, "features": np.zeros(samples, np.float32), "place": np.zeros(0, np.uint8)}
        return [self._row(parts, processor.frames, row.origin, row.number)]

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Answers need no mask, because padding comes last.

        Shapes: input_features (B, M, F) or input_values (B, N); decoder_input_ids, labels (B, A), where position a
        predicts labels[a].
        """
        rows = [row for (row,) in sequences]
        answers = [row.parts["answer"] for row in rows]
        inputs = {
            self.processor.input_name: self.features_of(rows),
            "decoder_input_ids": lay_end_to_end([[answer[:-1]] for answer in answers], self.processor.tokenizer.pad_id),
        }
        labels = lay_end_to_end([[answer[1:]] for answer in answers], IGNORED)
        size = max([*(row.sizes[0] for row in rows), *self.layout.minimum]) + labels.shape[1]
        return Batch(inputs, {"labels": labels}, tuple(map(tuple, sequences)), line_size=size)

    def spans(self, row: Row) -> list[Span]:
        """The length of the recording, and the answer."""
        answer, title = row.parts["answer"], f"recording: {self.seconds(row):.2f} s"
        return [Span(title=title), Span(answer, np.arange(len(answer)) > 0)]


def _split(example: TranscriptExample, sound: Sound, maximum: float) -> list[TranscriptPart]:
    """The parts of a long recording. Each part has complete segments, and ends at the quietest place between two
    segments."""
    parts: list[TranscriptPart] = []
    start, inside = 0.0, list[Segment]()
    for segment in example.segments:
        if segment.end - segment.start > maximum:
            what = f"the segment from {segment.start:g} to {segment.end:g} s is longer than {maximum:g} s"
            raise DataError(f"{sound.name}: {what}", "give shorter segments")
        if inside and segment.end - start > maximum:
            cut = _quiet_between(sound, inside[-1].end, max(min(segment.start, start + maximum), inside[-1].end))
            parts.append(_part(example, inside, sound, start, cut))
            start, inside = cut, []
        if segment.end - start > maximum:
            start = segment.start  # after a long pause
        inside.append(segment)
    end = min(sound.seconds, start + maximum)
    return [*parts, _part(example, inside, sound, start, end)]


def _part(
    example: TranscriptExample, segments: list[Segment], sound: Sound, start: float, end: float
) -> TranscriptPart:
    text = " ".join(each.text.strip() for each in segments)
    said = replace(example, text=text, segments=tuple(segments))
    return TranscriptPart(said, round(start * sound.rate), min(round(end * sound.rate), sound.samples))


def _quiet_between(sound: Sound, first: float, last: float) -> float:
    begin, end = (min(round(moment * sound.rate), sound.samples) for moment in (first, last))
    if end <= begin:
        return first
    window = mixed(sound, begin, end)
    return (begin + quietest(window, sound.rate, 0, end - begin)) / sound.rate

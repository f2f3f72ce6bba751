"""Rows of recordings with labels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tunekit.contracts import Array, Batch, Labels, Model, Row, RowLayout, RowParts, Span
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.sound import Sound, opened
from tunekit.errors import DataError
from tunekit.formats.audio_label import AudioLabelExample
from tunekit.formats.labels import LabelValue
from tunekit.formats.media import Media
from tunekit.model.speech.features import AudioProcessor
from tunekit.objectives.rows.labels import label_of, never_split, utf8
from tunekit.objectives.rows.recordings import SOUND_PARTS, Clip, RecordingRows, lasts, longer_than
from tunekit.recipe.objectives.audio_classify import AudioClassifySettings

TRUNCATE = "cut the file, or write data.excess_length: truncate to use only its beginning"
UNHEARD: dict[str, Array] = {"features": np.zeros(0, np.float32), "place": utf8(""), "samples": np.zeros(1, np.int32)}


@dataclass(frozen=True)
class LabelledClip:
    """The first part of a recording, as long as the model's input allows. If `beyond`: the later part, which the model
    never reads."""

    clip: Clip
    label: LabelValue
    frames: int
    beyond: bool = False


@dataclass(frozen=True, eq=False)
class LabelledRecordings(RecordingRows):
    """Rows of recordings with labels. Parts: SOUND_PARTS, and `label` as UTF-8."""

    example = "audio_label"
    allowed_options = never_split("recording")

    settings: AudioClassifySettings
    processor: AudioProcessor
    labels: Labels = field(default_factory=Labels)

    @cached_property
    def layout(self) -> RowLayout:
        """The layout: all recordings are padded to the same length."""
        return RowLayout(
            {**SOUND_PARTS, "label": "u1"},
            token_parts=(),
            sizes=1,
            token_sizes=(),
            minimum=(self.processor.frames,),
            identity=("features", "place"),
        )

    def examples(self, example: AudioLabelExample) -> Sequence[LabelledClip]:
        """The recording. If it is truncated, its later part comes first, as an example that is not trained on but
        counts as cut data: the last example decides which rows are equal.
        Raises: Dropped or DataError for a recording that is longer than the model's input, unless the recipe truncates
        recordings."""
        processor = self.processor
        with opened(example.audio) as sound:
            stop, cut = self._stop(sound), sound.seconds > processor.seconds
            if cut and self.options.excess_length == "drop":
                raise Dropped(longer_than(processor.seconds))
            heard = LabelledClip(Clip(example.audio, 0, stop), example.label, processor.frames_of(stop / sound.rate))
            if not cut:
                return [heard]
            if self.options.excess_length != "truncate":
                raise DataError(lasts(sound, processor.seconds), TRUNCATE)
            return [LabelledClip(Clip(example.audio, stop, sound.samples), example.label, 0, beyond=True), heard]

    def _stop(self, sound: Sound) -> int:
        return min(int(self.processor.seconds * sound.rate), sound.samples)

    def encode(self, example: LabelledClip, origin: str) -> Row:
        """The row of a clip. Raises: Dropped for silence; DataError for an unreadable recording or an unlisted
        label."""
        label = self.labels.read(example.label)
        parts = UNHEARD if example.beyond else self.sound_parts(example.clip)
        return self.make_row({**parts, "label": utf8(label)}, origin, sizes=(example.frames,))

    def units_in(self, parts: RowParts) -> int:
        """1; or 0 for the later part of a truncated recording."""
        return int(parts["features"].size > 0 or parts["place"].size > 0)

    def prompt(self, example: AudioLabelExample) -> tuple[Clip, str]:
        """The recording, and its label."""
        return self._prompt(example.audio), self.labels.written(self.labels.read(example.label))

    def question(self, text: str) -> Clip:
        """Read the recording in the file whose path is `text`.

        Raises: DataError if the recording is longer than the model's input, unless the recipe truncates recordings.
        """
        return self._prompt(Media(text))

    def _prompt(self, media: Media) -> Clip:
        with opened(media) as sound:
            if sound.seconds > self.processor.seconds and self.options.excess_length != "truncate":
                raise DataError(lasts(sound, self.processor.seconds), TRUNCATE)
            return Clip(media, 0, self._stop(sound))

    def readable(self, prompt: Clip) -> str:
        """The file's name."""
        return prompt.media.name

    def unlabelled(self, model: Model, prompts: Sequence[Clip]) -> list[Row]:
        """Rows of recordings whose labels are not known."""
        return [self._unlabelled(clip) for clip in prompts]

    def _unlabelled(self, clip: Clip) -> Row:
        parts = {**UNHEARD, "place": clip.place, "label": utf8(self.labels.placeholder)}
        if clip.media.data is not None:
            parts |= {"place": utf8(""), "features": clip.features(self.processor).reshape(-1)}
        return self.make_row(parts, "", sizes=(self.processor.frames,))

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Make the batch. Shapes: input_features (B, M, F); labels (B,)."""
        rows = [row for (row,) in sequences]
        inputs = {"input_features": self.features_of(rows)}
        targets = {"labels": self.labels.targets(map(label_of, rows))}
        return Batch(inputs, targets, tuple(map(tuple, sequences)), line_size=self.processor.frames)

    def spans(self, row: Row) -> list[Span]:
        """The label, and the length of the recording."""
        return [Span(title=f"label: {label_of(row)} (recording: {self.seconds(row):.2f} s)")]

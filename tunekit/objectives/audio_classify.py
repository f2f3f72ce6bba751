"""Audio classification: cross entropy on one label for each recording.

Comes in: recordings with labels, then a Batch and the encoder's last hidden states.  Goes out: rows of log-mel features
and a label, then Loss (sum over recordings).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tunekit.contracts import GREEDY, Batch, ModelOutput, Part, Row, RowLayout, Sampling
from tunekit.data.encoding.encode import EncodeOptions
from tunekit.data.encoding.outcomes import Dropped
from tunekit.data.reading.sound import Sound, opened
from tunekit.errors import DataError
from tunekit.formats.audio_label import AudioLabelExample
from tunekit.formats.media import Media
from tunekit.machine.placing import placed
from tunekit.model.speech.features import AudioProcessor
from tunekit.objectives.labelled import LabelObjective, make_objective_of, refuse_sampling
from tunekit.objectives.recordings import HEARD, Span, lasts, longer_than, parts_of, utf8
from tunekit.objectives.spec_augment import HeardObjective
from tunekit.recipe.objectives.audio_classify import AudioClassifySettings

TRUNCATE = "cut the file, or write data.excess_length: truncate, which keeps its beginning"
BEYOND: dict[str, Any] = {  # of what is not heard
    "features": np.zeros(0, np.float32),
    "place": utf8(""),
    "samples": np.zeros(1, np.int32),
}


@dataclass(frozen=True)
class Labelled:
    """What becomes a row: a recording as far as the model hears it, or (`beyond`) what lies after that."""

    span: Span
    label: str
    frames: int
    beyond: bool = False


class AudioEncoder:
    """A row is a recording and its label as UTF-8."""

    def __init__(self, objective: AudioClassify, options: EncodeOptions) -> None:
        self.objective, self.processor, self.options = objective, objective.processor, options
        self.notices: Counter[str] = Counter()

    def examples(self, example: AudioLabelExample) -> Sequence[Labelled]:
        """The recording; of one that is cut what lies beyond too, so that it is counted.

        Raises: Dropped or DataError for one that is longer than the model hears, and may not be cut.
        """
        processor = self.processor
        with opened(example.audio) as sound:
            stop, cut = self._stop(sound), sound.seconds > processor.seconds
            if cut and self.options.excess_length == "drop":
                raise Dropped(longer_than(processor.seconds))
            span, frames = Span(example.audio, 0, stop), processor.frames_of(stop / sound.rate)
            found = Labelled(span, example.label, frames)
            if not cut:
                return [found]
            if self.options.excess_length != "truncate":
                raise DataError(lasts(sound, processor.seconds), TRUNCATE)
            return [found, Labelled(Span(example.audio, stop, sound.samples), example.label, 0, beyond=True)]

    def _stop(self, sound: Sound) -> int:
        return min(int(self.processor.seconds * sound.rate), sound.samples)

    def encode(self, one: Labelled, origin: str) -> Row:
        """The row. Raises: Dropped for silence; DataError for a recording that cannot be read, and for a label beyond
        those that were given."""
        self.objective.check_label(one.label)
        parts = BEYOND if one.beyond else parts_of(one.span, self.processor, self.notices)
        return make_row(parts, one.label, one.frames, origin)

    def prompt(self, example: AudioLabelExample) -> tuple[Span, str]:
        """The recording, and its label."""
        return self._asked(example.audio), example.label

    def question(self, text: str) -> Span:
        """The recording in a file. Raises: DataError for one that is longer than the model hears and may not be cut."""
        return self._asked(Media(text))

    def _asked(self, media: Media) -> Span:
        with opened(media) as sound:
            if sound.seconds > self.processor.seconds and self.options.excess_length != "truncate":
                raise DataError(lasts(sound, self.processor.seconds), TRUNCATE)
            return Span(media, 0, self._stop(sound))

    def shown(self, asked: Span) -> str:
        """The file's name."""
        return asked.media.name


def make_row(parts: Mapping[str, Any], label: str, frames: int, origin: str) -> Row:
    """A row of what `parts_of` gives of a recording, and its label; of no frames nothing is learnt."""
    return Row({**parts, "label": utf8(label)}, (frames,), int(frames > 0), origin)


class AudioClassify(HeardObjective, LabelObjective):
    """loss = sum over rows of -log p(label | recording); divided by the step's number of rows."""

    metrics: Sequence[str] = ("loss", "accuracy", "macro_f1")
    whole = "recording"
    settings: AudioClassifySettings
    processor: AudioProcessor

    def __init__(self, settings: AudioClassifySettings, processor: AudioProcessor, *given: Any) -> None:
        super().__init__(settings, processor, *given)
        self.layout = RowLayout(
            {**HEARD, "label": "u1"},
            token_parts=(),
            sizes=1,
            token_sizes=(),
            least=(processor.frames,),
            told_by=("features", "place"),
        )

    def labels_of(self, row: Row) -> list[str]:
        return [row.parts["label"].tobytes().decode()]

    def row_encoder(self, options: EncodeOptions) -> AudioEncoder:
        """Raises: RecipeError where a long recording would be split."""
        self.check_options(options)
        return AudioEncoder(self, options)

    def collate(self, sequences: Sequence[Sequence[Row]]) -> Batch:
        """Shapes: input_features (B, M, F); labels (B,)."""
        inputs = {"input_features": self.heard([row for (row,) in sequences])}
        targets = {"labels": self.numbers(sequences)}
        return Batch(inputs, targets, tuple(map(tuple, sequences)), line_size=self.processor.frames)

    def scores(self, output: ModelOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        assert output.hidden is not None
        assert output.head is not None
        mean = output.hidden.mean(dim=1)  # (B, D)
        return output.head.logits(mean), placed(batch.targets["labels"], mean.device)

    def spans(self, row: Row) -> list[Part]:
        """The label, and how long the recording is."""
        title = f"label: {self.labels_of(row)[0]} (recording: {self.seconds(row):.2f} s)"
        return [Part(np.zeros(0, np.int64), np.zeros(0, np.bool_), title)]

    def answer(
        self,
        model: Any,
        prompts: Sequence[Span],
        *,
        max_new_tokens: int,
        batch_size: int,
        template: str | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """The most likely label of each recording. Raises: InputError where one should be drawn."""
        refuse_sampling(sampling)
        return self.most_likely(model, [self._asked(span) for span in prompts], batch_size)

    def _asked(self, span: Span) -> Row:
        """A row of a recording whose label is not known: it has the first one."""
        parts = {**BEYOND, "place": span.place}
        if span.media.data is not None:
            parts = {**BEYOND, "features": span.features(self.processor).reshape(-1)}
        return make_row(parts, self.labels[0], self.processor.frames, "")


def make(settings: AudioClassifySettings, processor: AudioProcessor, facts: Mapping[str, Any]) -> AudioClassify:
    """The objective of `objective: audio_classify`; facts are what an adapter's folder says of it."""
    return make_objective_of(AudioClassify, settings, processor, facts)
